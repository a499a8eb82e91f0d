"""The folder of a batch: what counts as done, what is cleaned up, results, and disks that are full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import pytest

from engine.files import part_of
from launch.batch.folder import RESULTS, OutputFolder, is_whole
from launch.output.display import Row, State
from launch.output.video import VideoWriter
from models.errors import InputError
from tests.launch.output.test_video import _noise
from tests.launch.process import short_files

NAME = "001-a-red-circle-0123456789ab.mp4"
DIGEST = "0123456789ab"


def video(path: Path) -> Path:
    with VideoWriter(path, fps=24) as writer:
        writer.write(_noise(4))
    return path


def record(folder: OutputFolder, line: int, **changes: object) -> None:
    row = Row(line=line, title="ä", state=State.DONE, chunks=3, chunks_done=3, computed=0.5, gang="gang 0")
    folder.record(replace(row, **changes), name=NAME, seconds=1.5)


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_whole_file_is_done_whatever_its_line_was(tmp_path: Path) -> None:
    video(tmp_path / "017-a-red-circle-0123456789ab.mp4")
    with OutputFolder(tmp_path) as folder:
        assert folder.done == {DIGEST}


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_was_cut_off_is_not_done(tmp_path: Path, keep: int) -> None:
    path = video(tmp_path / NAME)
    assert is_whole(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert not is_whole(path)
    with OutputFolder(tmp_path) as folder:
        assert not folder.done


def test_other_things_under_the_name_are_not_done(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / "002-text-ba9876543210.mp4").write_text("not a video, but long enough for a head")
    with OutputFolder(tmp_path) as folder:
        assert not folder.done


def test_parts_of_dead_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = dead_process()
    own = part_of(tmp_path / NAME)
    stale, another = (own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{pid}.")) for pid in (dead, 1))
    kept = [
        own,  # somebody is at it
        another,  # likewise, somebody else
        tmp_path / "notes.part",
    ]
    for path in (stale, *kept):
        path.write_bytes(b"x")
    with OutputFolder(tmp_path) as folder:
        assert not folder.done
    assert not stale.exists() and all(path.exists() for path in kept)


def test_results_are_added_line_by_line(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "new" / "folder") as folder:
        record(folder, 1)
    with OutputFolder(tmp_path / "new" / "folder") as folder:
        record(folder, 2, state=State.FAILED, computed=None, gang=None, error="no space")
    first, second = results(tmp_path / "new" / "folder")
    assert (first["line"], first["status"], first["prompt"], first["error"]) == (1, "done", "ä", None)
    assert (second["status"], second["computed"], second["error"]) == ("failed", None, "no space")


def test_results_say_which_videos_are_done_whatever_else_is_in_there(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as folder:
        record(folder, 1, state=State.FAILED)
    nonsense = b'{"status": "done"}\n[]\n\xff\n{"status": "done", "name": 3}\n' + b"[" * 100_000 + b"\n"
    (tmp_path / RESULTS).write_bytes((tmp_path / RESULTS).read_bytes() + nonsense)
    with OutputFolder(tmp_path) as folder:
        assert not folder.recorded
        record(folder, 1)
    with OutputFolder(tmp_path) as folder:
        assert folder.recorded == {DIGEST}


def test_a_line_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text('{"line": 1}\n{"line": 2')
    with OutputFolder(tmp_path) as folder:
        record(folder, 3)
    assert [one["line"] for one in results(tmp_path)] == [1, 3]


def test_a_full_disk_leaves_the_results_as_they_were(tmp_path: Path) -> None:
    with short_files(), OutputFolder(tmp_path) as folder:
        record(folder, 1)
        before = (tmp_path / RESULTS).read_bytes()
        with pytest.raises(InputError, match=r"results\.jsonl: no space left"):
            record(folder, 2, error="x" * 2000)
        assert (tmp_path / RESULTS).read_bytes() == before
        record(folder, 3)
    assert [one["line"] for one in results(tmp_path)] == [1, 3]


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    with OutputFolder(tmp_path), pytest.raises(InputError, match="another batch is writing to .*give another folder"):
        OutputFolder(tmp_path).__enter__()
    with OutputFolder(tmp_path):
        pass


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        OutputFolder(tmp_path / "file" / "below").__enter__()
