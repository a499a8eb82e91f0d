"""From options to a file, in one process; the weights are random, so the videos show noise."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from engine.engine import Engine
from engine.schedule import Schedule, Timetable
from launch.generate import EngineBackend, generate, make_videos
from launch.media import Frame, read_video
from launch.options import Options
from launch.output.display import summary_text
from launch.output.video import VideoWriter
from parallel.cluster.messages import ChunkMade, Event, Progressed, VideoOrder
from parallel.cluster.scheduler import VideoSize
from tests.engine.tiny import TinyPipeline, request, tiny_config
from tests.launch.videos import generate_video

PROMPT = "a red circle moving right"


@pytest.fixture
def options(random_weights: Path, tmp_path: Path) -> Options:
    return Options(prompts=[PROMPT], out=tmp_path / "video.mp4", weights=random_weights, steps=4, threads=1)


def _make(options: Options, **changes: object) -> Path:
    made = replace(options, **changes)
    generate_video(made)
    return made.out


def test_a_video_is_as_long_as_asked(options: Options) -> None:
    summary = generate_video(options)
    frames = read_video(options.out, Frame(height=64, width=64), fps=24, end="start")
    assert (summary.frames, summary.chunks) == (96, 4)
    assert len(frames) == 32 and frames.float().std() > 5  # noise, not a blank screen
    assert summary.making > 0 and summary.loading > 0 and summary.memory > 100_000_000
    text = summary_text([summary], making=summary.making)
    assert "96 frames of 64x64, 4.0 s of video" in text and "s per chunk" in text and "peak memory" in text
    assert f"{summary.computed:.0%} of the steps computed (flowcache-slow); keys and values " in text
    assert os.listdir(options.out.parent) == ["video.mp4"]


@pytest.mark.slow
def test_reuse_leaves_steps_out(options: Options) -> None:
    assert generate_video(replace(options, steps=8, cache="none")).computed == 1
    summary = generate_video(replace(options, steps=8, cache_threshold=1e6, cache_warmup=1))
    assert summary.computed == (4 + 1) / 32  # each first step, and the last tick


@pytest.mark.slow
def test_a_budget_bounds_the_memory_of_a_long_video(options: Options) -> None:
    kv = {"kv_budget": 1, "kv_retention": "frame", "kv_queries": "chunk"}
    sizes = [generate_video(replace(options, chunks=chunks, **kv)).kv_bytes for chunks in (5, 9)]
    assert sizes[0] == sizes[1] > 1_000_000


def test_a_seed_names_a_video(options: Options, tmp_path: Path) -> None:
    first = _make(options, chunks=1, seed=3, out=tmp_path / "first.mp4").read_bytes()
    assert _make(options, chunks=1, seed=3, out=tmp_path / "again.mp4").read_bytes() == first
    assert _make(options, chunks=1, seed=4, out=tmp_path / "other.mp4").read_bytes() != first


def test_image_to_video_has_one_chunk_more(options: Options, tmp_path: Path) -> None:
    """Specification part 3: 24 frames asked for, 48 made."""
    picture = tmp_path / "start.png"
    Image.new("RGB", (64, 64), (10, 200, 30)).save(picture)
    assert _frames(_make(options, image=picture, chunks=1)) == 48


def test_video_to_video_goes_on_from_32_frames(options: Options, tmp_path: Path) -> None:
    """Specification part 3: 24 frames asked for, 37 made."""
    clip = tmp_path / "start.mp4"
    with VideoWriter(clip, fps=24) as writer:
        writer.write(torch.full((40, 64, 64, 3), 90, dtype=torch.uint8))
    assert _frames(_make(options, video=clip, chunks=1)) == 37


def test_threads_are_set(options: Options) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generate(replace(options, chunks=1, threads=1), [])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def _frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_nothing_is_kept_of_videos_that_have_ended() -> None:
    backend = EngineBackend(Engine(TinyPipeline(tiny_config())), 2)
    size = VideoSize(schedule=Timetable(spans=(Schedule(first=0, chunks=2, num_steps=8, window=4),)), kv_bytes=0)

    def handle(event: Event) -> None:
        if isinstance(event, ChunkMade):
            backend.stored(event.video, event.index + 1)
        elif isinstance(event, Progressed) and event.video == "2":
            backend.cancel("2")

    wanted = [VideoOrder(video=str(n), request=request(chunks=2), size=size, confirmed=True) for n in range(3)]
    make_videos(backend, wanted, handle)
    backend.stored("0", 2)  # a writer that is late
    assert [name for name, held in vars(backend).items() if isinstance(held, dict | deque) and held] == []
