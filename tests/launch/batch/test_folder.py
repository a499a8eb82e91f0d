"""The folder of a batch: what counts as done, what is cleaned up, results, and disks that are full."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.files import Damaged, DiskFull, part_of, write_sealed
from launch.batch.folder import RESULTS, ChunkFiles, OutputFolder, is_whole
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


def chunk_files(folder: Path, said: list[str] | None = None) -> ChunkFiles:
    say = ([] if said is None else said).append
    return ChunkFiles(folder=folder / "parts", frames=4, height=32, width=32, say=say)


def chunk(seed: int = 0, frames: int = 4, height: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (frames, height, 32, 3), dtype=np.uint8)


def test_a_full_disk_leaves_nothing_of_a_chunk(tmp_path: Path) -> None:
    files = chunk_files(tmp_path)
    files.write(0, chunk())
    with short_files():
        with pytest.raises(DiskFull, match=r"000001\.npy: no space left there, .* MB are free"):
            files.write(1, chunk())
        with pytest.raises(DiskFull, match=r"a\.mp4: no space left there"):
            files.encode(tmp_path / "a.mp4", 1, 24, threading.Event())
    assert files.count() == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"parts", "000000.npy"}


def test_a_video_that_is_not_wanted_any_more_leaves_no_file(tmp_path: Path) -> None:
    files, stop = chunk_files(tmp_path), threading.Event()
    files.write(0, chunk())
    stop.set()
    with pytest.raises(CancelledError):
        files.encode(tmp_path / "a.mp4", 1, 24, stop)
    assert {path.name for path in tmp_path.rglob("*")} == {"parts", "000000.npy"}


def hole(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:3000] + bytes(4000) + content[7000:])


def another(path: Path, frames: NDArray[Any], *, sealed: bool = True) -> None:
    content = io.BytesIO()
    np.save(content, frames)
    if sealed:
        write_sealed(path, content.getbuffer())
    else:
        path.write_bytes(content.getbuffer())


def an_npz(path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, frames=chunk())
    write_sealed(path, content.getbuffer())


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "below").mkdir(parents=True)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zeros in the middle": hole,
    "cut off": lambda path: os.truncate(path, 9000),
    "empty": lambda path: os.truncate(path, 0),
    "an npz": an_npz,
    "too large to be read": lambda path: os.truncate(path, 1 << 40),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "without a checksum": lambda path: another(path, chunk(1), sealed=False),
    "another height": lambda path: another(path, chunk(1, height=16)),
    "another dtype": lambda path: another(path, chunk(1).astype(np.int16)),
    "too many frames": lambda path: another(path, chunk(1, frames=5)),
    "no frames": lambda path: another(path, chunk(1, frames=0)),
    "a number": lambda path: another(path, np.zeros((), dtype=np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_chunk_is_said_deleted_and_written_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    said: list[str] = []
    files, path = chunk_files(tmp_path, said), tmp_path / "parts" / "000001.npy"
    for index in (0, 1, 2, 4):
        files.write(index, chunk(index))
    assert files.count() == 3 and not said
    damage(path)
    with pytest.raises(Damaged, match=r"000001\.npy"):
        files.encode(tmp_path / "video.mp4", 3, 24, threading.Event())
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    assert files.count() == 1
    assert len(said) == 1 and said[0].startswith(str(path)) and "\n" not in said[0]
    files.write(1, chunk(1))
    assert files.count() == 3
    files.encode(tmp_path / "video.mp4", 3, 24, threading.Event())
    assert frames(tmp_path / "video.mp4") == 12


def test_the_first_chunk_after_a_clip_is_shorter(tmp_path: Path) -> None:
    files = chunk_files(tmp_path)
    files.write(0, chunk(frames=3))
    files.write(1, chunk())
    assert files.count() == 2
