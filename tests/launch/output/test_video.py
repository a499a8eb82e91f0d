"""Videos that are written; nothing is left of a file that was not finished."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from engine import files
from launch.options import Options
from launch.output.display import Display
from launch.output.sinks import VideoSinks
from launch.output.video import BackgroundWriter, VideoWriter
from launch.plan import plan_videos, video_names
from models.errors import InputError
from parallel.cluster.messages import Admitted, ChunkMade, GangReady, VideoDone
from tests.launch.process import short_files

COLOURS = torch.tensor([[224, 33, 33], [31, 189, 51], [38, 64, 235], [237, 219, 36], [31, 209, 219], [128, 128, 128]])


def _writer(path: Path) -> VideoWriter:
    return VideoWriter(path, fps=24)


def _bars(count: int) -> Tensor:
    """Six bars of colour, 16 pixels wide."""
    row = COLOURS.to(torch.uint8).repeat_interleave(16, dim=0)
    return row.expand(count, 64, 96, 3)


def _noise(count: int) -> Tensor:
    return torch.randint(256, (count, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_video_reads_back_with_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "bars.mp4"
    with _writer(path) as writer:
        writer.write(_bars(10))
        writer.write(_bars(14))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 24
    for frame in (frames[0], frames[-1]):
        assert frame.shape == (64, 96, 3)
        assert abs(frame[32, 8::16].astype(int) - COLOURS.numpy()).max() <= 6
    assert os.listdir(tmp_path) == ["bars.mp4"]


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    wave = torch.arange(24 * 64 * 96 * 3).reshape(24, 64, 96, 3) / 997
    frames = (128 + 100 * wave.sin()).to(torch.uint8)
    files = set()
    for number in range(5):
        path = tmp_path / f"{number}.mp4"
        with _writer(path) as writer:
            writer.write(frames)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_a_video_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "late.mp4"
    path.write_bytes(b"the older one")
    with _writer(path) as writer:
        writer.write(_noise(60))
        assert path.read_bytes() == b"the older one"
        hidden = [name for name in os.listdir(tmp_path) if name not in ("late.mp4", "late.partial.mp4")]
        assert len(hidden) == 1 and hidden[0].startswith(".")
    assert path.read_bytes() != b"the older one"


@pytest.mark.parametrize("background", [False, True])
def test_an_error_leaves_nothing_behind(tmp_path: Path, background: bool) -> None:
    writer = _writer(tmp_path / "broken.mp4")
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(writer) if background else writer as sink:
        sink.write(_noise(10))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "full.mp4"
    writer = _writer(path)
    with (
        short_files(50_000),
        pytest.raises(InputError, match=r"cannot write .*full.mp4: no space left there"),
        BackgroundWriter(writer) if background else writer as sink,
    ):
        for _ in range(20):
            sink.write(_noise(10))
    assert os.listdir(tmp_path) == []


def test_background_frames_are_all_there_in_order(tmp_path: Path) -> None:
    path = tmp_path / "grey.mp4"
    with BackgroundWriter(_writer(path), depth=1) as writer:
        for level in range(0, 240, 10):
            writer.write(torch.full((2, 64, 96, 3), level, dtype=torch.uint8))
    with av.open(str(path)) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert levels == pytest.approx([level for level in range(0, 240, 10) for _ in range(2)], abs=3)


def test_no_thread_outlives_the_writer(tmp_path: Path) -> None:
    with BackgroundWriter(_writer(tmp_path / "short.mp4")) as writer:
        writer.write(_bars(1))
        assert any(thread.name.startswith("video") for thread in threading.enumerate())
    assert not any(thread.name.startswith("video") for thread in threading.enumerate())


def test_a_video_whose_end_was_interrupted_is_not_called_missing(
    tmp_path: Path, random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the main thread while it waits for the thread that gives the file its name."""
    prompts = ["a red circle moving right", "a blue cross moving up"]
    plans = plan_videos(Options(prompts=prompts, out=tmp_path / "videos", weights=random_weights, chunks=1))
    stream, slow = io.StringIO(), threading.Event()
    flush = files._flush

    def slowly(path: Path) -> None:
        slow.set()
        time.sleep(0.5)
        flush(path)

    monkeypatch.setattr(files, "_flush", slowly)
    interrupt = threading.Thread(target=lambda: slow.wait() and signal.raise_signal(signal.SIGINT))
    interrupt.start()
    sinks = VideoSinks(plans, [None, None], Display(Console(file=stream, width=200)), 0.0)
    with pytest.raises(KeyboardInterrupt), sinks:
        frames, latents = _noise(24).numpy()[:, :, :64], np.zeros((1, 1, 1, 1, 1), dtype=np.float32)
        sinks.handle(GangReady())
        for video in ("0", "1"):
            sinks.handle(Admitted(video=video, number=int(video), first=0))
            sinks.handle(ChunkMade(video=video, index=0, frames=frames, latents=latents))
        sinks.handle(VideoDone(video="0", computed=1.0, kv_bytes=1))
    interrupt.join()
    first, second = (f"{name}.mp4" for name in video_names(prompts))
    assert os.listdir(tmp_path / "videos") == [first]
    assert stream.getvalue().endswith(f"1 of 2 videos in {tmp_path / 'videos'} are complete; missing: {second}\n")


def test_no_thread_is_started_once_there_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while one starts would have another one end the file beside it."""
    writer = BackgroundWriter(_writer(tmp_path / "a.mp4"))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ValueError, match="of the video"), writer:
        raise ValueError("of the video")
    assert os.listdir(tmp_path) == []
