"""Videos that go on: after SIGKILL from their checkpoints, and when they are finished from their saved state.

On a cluster they are tested in `tests/parallel/cluster/test_joined.py`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import run
from tests.launch.process import short_files
from tests.launch.resume.going_on import OTHER, PROMPT, generate, killed_and_going_on


@pytest.fixture
def options(tmp_path: Path, random_weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--steps", "8", "--weights", str(random_weights), "--threads", "1"]


def extend(*arguments: object) -> int:
    return run(["continue", *map(str, arguments)])


@pytest.mark.parametrize(
    ("before", "more", "how"),
    [
        (5, 2, ["--checkpoint-every", "3"]),
        (1, 1, []),  # fewer chunks than the window holds
        (6, 3, ["--kv-budget", "1", "--cache", "teacache"]),
        (2, 1, ["--image", "start.png"]),
    ],
)
def test_a_longer_video_is_as_if_asked_for_at_once(options: list[str], before: int, more: int, how: list[str]) -> None:
    Image.new("RGB", (64, 64), (10, 200, 30)).save("start.png")
    made = before + ("--image" in how)  # chunks
    generate(*options, *how, "--chunks", before, "--out", "a.mp4", "--keep-state")
    assert extend("a.mp4", "--seconds", more, "--prompt", OTHER) == 0
    generate(*options, *how, "--chunks", before + more, "--prompt-at", f"{made}s", OTHER, "--out", "whole.mp4")
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert sorted(os.listdir()) == ["a.mp4", "a.state", "start.png", "whole.mp4"] and len(os.listdir("a.state")) == 1


def test_a_video_is_made_longer_twice_and_elsewhere(options: list[str]) -> None:
    generate(*options, "--chunks", 2, "--out", "a.webm", "--checkpoint", "kept", "--keep-state")
    before = Path("a.webm").read_bytes()
    assert extend("kept", "--seconds", 0.5, "--out", "b.webm", "--prompt", OTHER) == 0
    assert extend("b.webm", "--seconds", 1) == 0
    generate(*options, "--chunks", 4, "--prompt-at", "2s", OTHER, "--out", "whole.webm")
    assert Path("b.webm").read_bytes() == Path("whole.webm").read_bytes() and Path("a.webm").read_bytes() == before
    assert sorted(os.listdir()) == ["a.webm", "b.state", "b.webm", "kept", "whole.webm"]


def test_a_state_is_what_it_was_made_for(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with it, the video stays as it is."""
    Image.new("RGB", (64, 64), (10, 200, 30)).save("start.png")
    generate(*options, "--chunks", 1, "--out", "a.mp4", "--keep-state", "--image", "start.png")
    video, (state,) = Path("a.mp4").read_bytes(), Path("a.state").iterdir()
    manifest = (state / "video.json").read_text()

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert extend(*arguments) == 2 and Path("a.mp4").read_bytes() == video
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1].startswith("flowcache: error: ") and "Traceback" not in "".join(shown)
        return shown[-1]

    assert "there is no state of b.mp4: make it with --keep-state" in refused("b.mp4", "--seconds", 1)
    assert "--seconds 0.0 cannot be used" in refused("a.mp4", "--seconds", 0)
    assert "Missing option '--seconds'" in refused("a.mp4")
    assert "unknown word 'dog'" in refused("a.mp4", "--seconds", 1, "--prompt", "a dog")
    assert "must end in .mp4" in refused("a.mp4", "--seconds", 1, "--out", "a.txt")
    shutil.copytree(state, state.with_name("other"))
    assert "a.state holds the states of several videos" in refused("a.state", "--seconds", 1)
    assert "was made of other files or settings" in refused(state.with_name("other"), "--seconds", 1)
    shutil.rmtree(state.with_name("other"))
    for text in ("", "{", "[]", '{"options": 3}', '{"options": {"colour": 1}}', '{"options": {"seed": "x"}}'):
        (state / "video.json").write_text(text)
        assert (
            "video.json" in (said := refused("a.mp4", "--seconds", 1)) or "there is no option" in said or "seed" in said
        )
    (state / "video.json").write_text(manifest)
    Image.new("RGB", (64, 64), (200, 200, 30)).save("start.png")
    assert "other files or settings than there are now" in refused("a.mp4", "--seconds", 1)
    os.remove("start.png")
    assert "cannot read the image" in refused("a.mp4", "--seconds", 1)


def test_damage_is_said_and_made_again(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    generate(*options, "--chunks", 5, "--out", "a.mp4", "--keep-state")
    (segment,) = Path("a.state").glob("*/segments-libx264/000001.mp4")
    segment.write_bytes(segment.read_bytes()[::-1])
    capsys.readouterr()
    assert extend("a.mp4", "--seconds", 1) == 0
    assert "000001.mp4 is damaged: it does not match its checksum; it was deleted" in capsys.readouterr().err
    generate(*options, "--chunks", 6, "--out", "whole.mp4")
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "file"], "file is not a folder"),
        (["--checkpoint", "c", "--checkpoint-every", "0"], "--checkpoint-every 0 keeps nothing"),
        (["--checkpoint", "c", "--record", "run"], "--record is of a whole run"),
        (["--keep-state", "--out", "-"], "--keep-state has no place beside standard output"),
    ],
)
def test_what_cannot_be_kept_is_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("file").write_text("")
    assert run(["generate", PROMPT, *options, *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and os.listdir() == ["file"]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options, "--chunks", "5", "--checkpoint", "c", "--checkpoint-every", "1"]
    with short_files(60_000):
        assert run(["generate", PROMPT, *arguments]) == 2
    assert "no space left there" in capsys.readouterr().err.splitlines()[-1] and os.listdir() == ["c"]
    generate(*arguments)
    generate(*options, "--chunks", 5, "--out", "whole.mp4")
    assert Path("video.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert sorted(os.listdir()) == ["video.mp4", "whole.mp4"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("how", "times"), [([], 3), (["--pp", "2"], 2)])
def test_a_video_that_was_killed_goes_on_and_ends_with_the_same_frames(
    tmp_path: Path, options: list[str], how: list[str], times: int
) -> None:
    killed_and_going_on(tmp_path, options, how, times)
