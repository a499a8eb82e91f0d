"""Videos from a script: the documented example, frames that are those of the command line, errors in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.record import RunRecord
from launch.api import VideoEngine, load
from launch.ending import CommandFailed
from launch.options import Options
from models.errors import InputError
from models.pocket.words import VOCABULARY
from tests.launch.process import ROOT, environment, overflowing_weights
from tests.launch.videos import generate_video

PROMPT, OTHER = "a red circle moving right", "a blue cross moving up"
SHORT = {"chunks": 2, "steps": 4}


@pytest.fixture(scope="module")
def engine(random_weights: Path) -> VideoEngine:
    return load(weights=random_weights, cache="none", threads=1, concurrency=2)


def _example(path: Path) -> str:
    """The first Python block of a page that loads a model."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return next((block for block in blocks if "launch.api" in block), "")


@pytest.mark.slow
def test_the_documented_example_runs(tmp_path: Path) -> None:
    text = _example(ROOT / "docs" / "library.md")
    assert _example(ROOT / "README.md") in ("", text)
    (tmp_path / "example.py").write_text(text)
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{index} (24, 64, 64, 3) uint8" for index in range(4)]
    assert os.listdir(tmp_path) == ["example.py"]


def test_several_videos_have_seeds_of_their_own(engine: VideoEngine) -> None:
    together: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for chunk in engine.generate_many([PROMPT, OTHER], seed=5, **SHORT):
        assert chunk.index == len(together[chunk.video]) and chunk.latents.dtype == np.float32
        together[chunk.video].append(chunk.frames)
    second = [chunk.frames for chunk in engine.generate(OTHER, seed=6, **SHORT)]
    assert np.array_equal(np.concatenate(together[1]), np.concatenate(second))
    assert second[0].dtype == np.uint8 and second[0].shape == (24, 64, 64, 3)


def test_a_file_is_that_of_the_command_line(engine: VideoEngine, random_weights: Path, tmp_path: Path) -> None:
    (summary,) = engine.save(PROMPT, tmp_path / "a.mp4", record=tmp_path / "run", seed=2, **SHORT)
    options = Options(prompts=[PROMPT], out=tmp_path / "b.mp4", weights=random_weights, cache="none", seed=2)
    generate_video(Options(**{**_values(options), **SHORT, "threads": 1}))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert summary.frames == 48 and RunRecord.load(tmp_path / "run").settings["prompt"] == PROMPT
    engine.save([PROMPT, OTHER], str(tmp_path / "videos"), chunks=1, steps=4)
    assert len(os.listdir(tmp_path / "videos")) == 2


def test_a_video_that_comes_to_nan_is_an_error_and_the_next_one_is_made(tmp_path: Path) -> None:
    word = VOCABULARY.index("blue")
    weights = overflowing_weights(tmp_path / "weights", "y_embedder.y_proj_xattn.0.weight", slice(word, word + 1))
    with load(weights=weights, cache="none", threads=1) as engine:
        with pytest.raises(CommandFailed, match=r"^rank 0 has computed NaN or infinity at tick 0, chunk 0: "):
            list(engine.generate(OTHER, **SHORT))
        with pytest.raises(CommandFailed, match=r"^rank 0 has computed NaN"):
            engine.save(OTHER, tmp_path / "video.mp4", **SHORT)
        # One chunk has no pass without a text, whose embedding has something of every word.
        assert [chunk.index for chunk in engine.generate(PROMPT, chunks=1, steps=4)] == [0]
    assert os.listdir(tmp_path) == ["weights"]


def _values(options: Options) -> dict[str, object]:
    return {name: getattr(options, name) for name in Options.__slots__}


def test_a_loop_that_is_left_drops_the_rest(engine: VideoEngine) -> None:
    for _ in engine.generate(PROMPT, chunks=1000, steps=4):
        break
    assert [chunk.index for chunk in engine.generate(PROMPT, **SHORT)] == [0, 1]


def test_one_call_at_a_time(engine: VideoEngine) -> None:
    first = engine.generate(PROMPT, **SHORT)
    next(first)
    with pytest.raises(InputError, match="makes a video already"):
        next(engine.generate(OTHER, **SHORT))
    assert [chunk.index for chunk in first] == [1]


def test_bad_input_is_said_in_the_words_of_the_options(engine: VideoEngine) -> None:
    for given, said in (
        ({"chunks": 0}, "--chunks 0 cannot be used: give 1 to 1,000,000"),
        ({"height": "tall"}, "height='tall' cannot be used, not of type int"),
        ({"lenght": 3}, "there is no option lenght: known are prompts, model"),
        ({"cache": "none"}, "cache is no option of a video"),
        ({"image": "missing.png"}, "cannot read the image missing.png"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            list(engine.generate(PROMPT, **given))
    for given, said in (
        ({"cache": "fast"}, "cache='fast' cannot be used: choose from none, teacache"),
        ({"seconds": 3}, "seconds is no option of load"),
        ({"model": "magi-9b"}, "unknown model 'magi-9b'"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            load(**given)


RANKS = """
import sys
from launch.api import load
with load(weights=sys.argv[1], cache="none", threads=1, pp=2, kv_offload=True) as engine:
    for chunk in engine.generate("a red circle moving right", seconds=2, steps=4):
        print(chunk.index, int(chunk.frames.astype("int64").sum()), flush=True)
sys.exit("torch._dynamo" in sys.modules)  # the compiler takes as long to import as torch itself
"""


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_script_over_ranks_makes_the_same(
    engine: VideoEngine, tmp_path: Path, random_weights: Path, torchrun: bool
) -> None:
    (tmp_path / "script.py").write_text(RANKS)
    program = [sys.executable]
    if torchrun:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*program, "script.py", str(random_weights)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    alone = [f"{chunk.index} {int(chunk.frames.astype('int64').sum())}" for chunk in engine.generate(PROMPT, **SHORT)]
    assert done.stdout.splitlines() == alone
