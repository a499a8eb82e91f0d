"""What is kept of a video on disk: damage is seen, full disks leave nothing, and what lies there goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import av
import numpy as np
import pytest

from engine.files import Damaged, DiskFull, write_sealed
from launch.output.formats import MP4
from launch.output.segments import encode_segment
from launch.resume.saved import SegmentFiles
from tests.launch.process import short_files


def frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def chunk_files(folder: Path, said: list[str] | None = None) -> SegmentFiles:
    say = ([] if said is None else said).append
    return SegmentFiles(folder=folder / "parts", frames=4, height=32, width=32, say=say)


def chunk(seed: int = 0, frames: int = 4, height: int = 32) -> bytes:
    pictures = np.random.default_rng(seed).integers(0, 255, (frames, height, 32, 3), dtype=np.uint8)
    return encode_segment(pictures, MP4.codec, 24)


def finish(files: SegmentFiles, path: Path, chunks: int, stop: bool = False) -> None:
    event = threading.Event()
    if stop:
        event.set()
    files.finish(MP4, path, chunks, 24, event)


def test_a_full_disk_leaves_nothing_of_a_chunk(tmp_path: Path) -> None:
    files = chunk_files(tmp_path)
    files.write(0, chunk())
    with short_files():
        with pytest.raises(DiskFull, match=r"000001\.mp4: no space left there, .* MB are free"):
            files.write(1, chunk())
        with pytest.raises(DiskFull, match=r"a\.mp4: no space left there"):
            finish(files, tmp_path / "a.mp4", 1)
    assert files.count() == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"parts", "000000.mp4"}


def test_a_video_that_is_not_wanted_any_more_leaves_no_file(tmp_path: Path) -> None:
    files = chunk_files(tmp_path)
    files.write(0, chunk())
    with pytest.raises(CancelledError):
        finish(files, tmp_path / "a.mp4", 1, stop=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"parts", "000000.mp4"}


def hole(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:3000] + bytes(1000) + content[4000:])


def another(path: Path, content: bytes, *, sealed: bool = True) -> None:
    write_sealed(path, content) if sealed else path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    (path / "below").mkdir(parents=True)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zeros in the middle": hole,
    "cut off": lambda path: os.truncate(path, 3000),
    "empty": lambda path: os.truncate(path, 0),
    "a text": lambda path: another(path, b"frames"),
    "half a segment": lambda path: another(path, chunk(1)[:900]),
    "too large to be read": lambda path: os.truncate(path, 1 << 40),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "without a checksum": lambda path: another(path, chunk(1), sealed=False),
    "another height": lambda path: another(path, chunk(1, height=16)),
    "too many frames": lambda path: another(path, chunk(1, frames=5)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_chunk_is_said_deleted_and_written_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    said: list[str] = []
    files, path = chunk_files(tmp_path, said), tmp_path / "parts" / "000001.mp4"
    for index in (0, 1, 2, 4):
        files.write(index, chunk(index))
    assert files.count() == 3 and not said
    damage(path)
    with pytest.raises(Damaged, match=r"000001\.mp4"):
        finish(files, tmp_path / "video.mp4", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    assert files.count() == 1
    assert len(said) == 1 and said[0].startswith(str(path)) and "\n" not in said[0]
    files.write(1, chunk(1))
    assert files.count() == 3
    finish(files, tmp_path / "video.mp4", 3)
    assert frames(tmp_path / "video.mp4") == 12


def test_the_first_chunk_after_a_clip_is_shorter(tmp_path: Path) -> None:
    files = chunk_files(tmp_path)
    files.write(0, chunk(frames=3))
    files.write(1, chunk())
    assert files.count() == 2
