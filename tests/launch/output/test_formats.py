"""Segments, the stream that they make, and the files that a video becomes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from launch.output.formats import FORMATS, MP4
from launch.output.names import suffix_of
from launch.output.preview import Preview
from launch.output.segments import FragmentStream, count_frames, decode, encode_segment
from launch.output.video import VideoWriter
from models.errors import InputError
from tests.launch.process import short_files

LENGTHS = (3, 8, 8)  # frames of chunks; the first one after a clip is shorter


def chunks(height: int = 64) -> list[NDArray[np.uint8]]:
    """A pattern that moves."""
    y, x = np.mgrid[:height, :96]
    shown = [128 + 100 * np.sin((x + 2 * t) / 17) * np.cos(y / 23) for t in range(sum(LENGTHS))]
    frames = np.stack([np.stack([one, 255 - one, one / 2], axis=-1) for one in shown]).astype(np.uint8)
    return np.split(frames, np.cumsum(LENGTHS)[:-1])


def frames_of(file: Path | io.BytesIO) -> NDArray[np.uint8]:
    with av.open(str(file) if isinstance(file, Path) else file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def written(path: Path, name: str) -> NDArray[np.uint8]:
    with VideoWriter(path, fps=24, form=FORMATS[suffix_of(name)]) as writer:
        for chunk in chunks():
            writer.write(chunk)
    if path.is_dir():
        return np.concatenate([frames_of(picture) for picture in sorted(path.iterdir())])
    return frames_of(path)


@pytest.mark.parametrize(("name", "most"), [("a.mp4", 3), ("a.webm", 3), ("a.gif", 12), ("frames/", 0)])
def test_every_format_has_all_frames_in_order(tmp_path: Path, name: str, most: float) -> None:
    path = tmp_path / name
    difference = np.abs(written(path, name).astype(int) - np.concatenate(chunks()))
    assert difference.shape == (sum(LENGTHS), 64, 96, 3) and difference.mean(axis=(1, 2, 3)).max() <= most
    assert os.listdir(tmp_path) == [path.name]
    if name == "a.mp4":
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == sum(LENGTHS)  # of its index


def test_names_say_the_format() -> None:
    assert [suffix_of(name) for name in ("a.MP4", "b.webm", "c.gif", "d/", "-")] == [
        ".mp4",
        ".webm",
        ".gif",
        "",
        ".mp4",
    ]
    with pytest.raises(InputError, match=r"a\.png: the name of the video must end in \.mp4, \.webm, \.gif, or in /"):
        suffix_of("a.png")


def test_a_stream_plays_after_each_fragment_and_has_the_frames_of_the_file(tmp_path: Path) -> None:
    stream, ends = io.BytesIO(), []
    fragments = FragmentStream(stream.write)
    for chunk in chunks():
        fragments.add(encode_segment(chunk, MP4.codec, 24))
        ends.append(len(stream.getvalue()))
    whole = written(tmp_path / "a.mp4", "a.mp4")
    for end, count in zip(ends, np.cumsum(LENGTHS), strict=True):
        assert (frames_of(io.BytesIO(stream.getvalue()[:end])) == whole[:count]).all()
    with av.open(io.BytesIO(stream.getvalue())) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([frame / 24 for frame in range(sum(LENGTHS))])


def test_a_chunk_gives_the_same_frames_whatever_came_before_it() -> None:
    alone = encode_segment(chunks()[1], MP4.codec, 24)
    assert encode_segment(chunks()[1], MP4.codec, 24) == alone and count_frames(alone) == 8


def test_a_chunk_of_many_frames_with_cuts_is_one_fragment():
    """The encoder sets key frames at cuts, which end no fragment."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    segment, written = encode_segment(noise, MP4.codec, 24), []
    fragments = FragmentStream(written.append)
    for _ in range(2):
        fragments.add(segment)
    assert segment.count(b"moof") == 1 and count_frames(segment) == 60 and fragments.frames == 120
    assert sum(1 for _ in decode([io.BytesIO(b"".join(written))])) == 120


@pytest.mark.parametrize("segment", [b"", b"nothing", bytes(200), encode_segment(chunks()[0], MP4.codec, 24)[:820]])
def test_what_is_no_segment_is_a_value_error(segment: bytes) -> None:
    with pytest.raises(ValueError):
        FragmentStream(io.BytesIO().write).add(segment)


def test_chunks_of_another_size_are_not_joined() -> None:
    fragments = FragmentStream(io.BytesIO().write)
    fragments.add(encode_segment(chunks()[0], MP4.codec, 24))
    with pytest.raises(ValueError, match="another way"):
        fragments.add(encode_segment(chunks(32)[0], MP4.codec, 24))


@pytest.mark.parametrize("keep", [False, True])
def test_what_there_is_of_an_interrupted_video_is_kept_if_asked_for(tmp_path: Path, keep: bool) -> None:
    partial = tmp_path / "a.partial.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", fps=24, keep_partial=keep) as writer:
        writer.write(chunks()[0])
        assert len(frames_of(partial)) == 3
        assert partial.is_symlink() != keep  # so that it goes, or stays, with the hidden file of a killed process
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ([partial.name] if keep else [])
    if keep:
        assert len(frames_of(partial)) == 3
        written(tmp_path / "a.mp4", "a.mp4")
        assert os.listdir(tmp_path) == ["a.mp4"]


def test_two_that_write_the_same_video_do_not_meet(tmp_path: Path) -> None:
    """As two processes do: each has a hidden file of its own, and the visible name is of the one that came last."""
    path, other = tmp_path / "a.mp4", tmp_path / "b"
    with VideoWriter(path, fps=24) as writer:
        writer.write(chunks()[0])
        other.write_bytes(b"of another process")
        os.replace(other, tmp_path / "a.partial.mp4")
    assert (tmp_path / "a.partial.mp4").read_bytes() == b"of another process" and len(frames_of(path)) == 3


def test_a_disk_that_is_full_at_the_end_leaves_no_file(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.gif", fps=24, form=FORMATS[".gif"])
    writer.__enter__()
    for chunk in chunks():
        writer.write(chunk)
    with short_files(1), pytest.raises(InputError, match=r"a\.gif: no space left there"):
        writer.__exit__(None, None, None)
    assert os.listdir(tmp_path) == []


def test_a_preview_shows_a_picture_of_each_chunk(tmp_path: Path) -> None:
    path, levels = tmp_path / "a.png", [60, 120, 180]
    preview = Preview(path)
    for level in levels:
        preview.add(np.full((64, 96, 3), level, dtype=np.uint8))
    (sheet,) = frames_of(path)
    assert {24, *levels} == set(sheet.flatten().tolist()) and sheet[60, 84, 0] == 60 and sheet[60, 248, 0] == 120
    for level in range(150):
        preview.add(np.full((64, 96, 3), level, dtype=np.uint8))
    (sheet,) = frames_of(path)
    assert sheet.size < 4_000_000 and os.listdir(tmp_path) == ["a.png"]
