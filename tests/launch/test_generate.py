"""From options to a plan and to a file, in one process; the weights are random, so the videos show noise."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from engine.kv.size import KVSettings
from engine.reuse.settings import ReuseSettings
from launch.cache_presets import CacheName, CacheOptions, KVOptions, TokenUnit, cache_preset
from launch.generate import generate_video
from launch.output.media import read_video
from launch.output.video import VideoWriter
from launch.plan import Options, Plan, plan_video
from models.errors import InputError
from models.pocket.preset import pocket_config

PROMPT = "a red circle moving right"


@pytest.fixture
def options(random_weights: Path, tmp_path: Path) -> Options:
    return Options(prompt=PROMPT, out=tmp_path / "video.mp4", weights=random_weights, steps=4, threads=1)


def _plan(options: Options, **changes: object) -> Plan:
    values = {name: getattr(options, name) for name in Options.__slots__}
    return plan_video(Options(**(values | changes)))


def _make(options: Options, **changes: object) -> Path:
    values = {name: getattr(options, name) for name in Options.__slots__} | changes
    generate_video(Options(**values))
    return values["out"]


def test_what_is_not_given_comes_from_the_model(options: Options) -> None:
    request = _plan(options, steps=None).request
    assert (request.prompt, request.chunks, request.num_steps, request.seed) == (PROMPT, 4, 16, 0)
    assert (request.height, request.width, request.prefix) == (64, 64, None)


def test_what_is_given_replaces_it(options: Options) -> None:
    request = _plan(options, steps=8, chunks=7, height=96, width=32, seed=5).request
    assert (request.num_steps, request.chunks, request.height, request.width, request.seed) == (8, 7, 96, 32, 5)


@pytest.mark.parametrize(("seconds", "chunks"), [(1, 1), (4, 4), (4.001, 5), (0.01, 1), (2.5, 3)])
def test_seconds_are_rounded_up_to_chunks(options: Options, seconds: float, chunks: int) -> None:
    assert _plan(options, seconds=seconds).request.chunks == chunks


def test_seconds_of_another_frame_rate(options: Options, tmp_path: Path) -> None:
    values = pocket_config().to_dict()
    values["runtime_config"]["fps"] = 30
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert _plan(options, config=path, seconds=4).request.chunks == 5  # 120 frames in chunks of 24


def test_precision_and_attention_reach_the_model(options: Options) -> None:
    loading = _plan(options, precise=False, attention="auto").loading
    assert (loading.precise, loading.attention) == (False, "auto")


def test_reuse_is_on_unless_it_is_turned_off(options: Options) -> None:
    assert _plan(options).cache == cache_preset(CacheName.FLOWCACHE_SLOW, "magi-pocket")
    assert _plan(options, cache=CacheOptions(preset=CacheName.NONE)).cache == ReuseSettings()
    assert _plan(options).kv == KVSettings()


def test_a_configuration_file_has_the_figures_of_magi_1(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(pocket_config().to_dict()))
    assert _plan(options, config=path).cache == cache_preset(CacheName.FLOWCACHE_SLOW, "magi-4.5b")


def test_a_guided_model_has_no_copy_pass(options: Options) -> None:
    with pytest.raises(InputError, match="--copy-pass is for distilled models"):
        _plan(options, model="magi-4.5b", steps=None, cache=CacheOptions(copy_pass=True))


def test_a_record_needs_a_folder_before_anything_is_read(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        _plan(options, record=tmp_path / "file", weights=tmp_path / "missing")


def test_an_image_becomes_a_prefix_of_one_frame(options: Options, tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (30, 50), (10, 200, 30)).save(picture)
    prefix = _plan(options, image=picture).request.prefix
    assert prefix is not None and prefix.frames.shape == (1, 64, 64, 3)
    assert prefix.frames[0, 32, 32].tolist() == pytest.approx([10, 200, 30], abs=2)


def test_the_size_is_checked_before_a_prefix_is_read(options: Options, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="height of 70 pixels is not a multiple of 16"):
        _plan(options, height=70, image=tmp_path / "missing.png")


def test_weights_that_were_not_downloaded_are_named(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(options.out.parent)
    with pytest.raises(InputError, match=r"no weights in ./downloads/4.5B_base: download ckpt/magi/4.5B_base from"):
        _plan(options, model="magi-4.5b", weights=None)


def test_a_video_is_as_long_as_asked(options: Options) -> None:
    summary = generate_video(options)
    frames = read_video(options.out, fps=24, height=64, width=64)
    assert (summary.frames, summary.chunks, summary.fps) == (96, 4, 24)
    assert len(frames) == 32 and frames.float().std() > 5  # noise, not a blank screen
    assert summary.making > 0 and summary.loading > 0 and summary.memory > 100_000_000
    text = summary.text()
    assert "96 frames of 64x64, 4.0 s of video" in text and "s per chunk" in text and "peak memory" in text
    assert f"{summary.computed:.0%} of the steps computed (flowcache-slow); keys and values " in text
    assert os.listdir(options.out.parent) == ["video.mp4"]


def test_reuse_leaves_steps_out(options: Options) -> None:
    everything = CacheOptions(preset=CacheName.NONE)
    nearly_nothing = CacheOptions(threshold=1e6, warmup=1)
    assert generate_video(replace(options, steps=8, cache=everything)).computed == 1
    summary = generate_video(replace(options, steps=8, cache=nearly_nothing))
    assert summary.computed == (4 + 1) / 32  # each first step, and the last tick


def test_a_budget_bounds_the_memory_of_a_long_video(options: Options) -> None:
    kv = KVOptions(budget=1, retention=TokenUnit.FRAME, queries=TokenUnit.CHUNK)
    sizes = [generate_video(replace(options, chunks=chunks, kv=kv)).kv_bytes for chunks in (5, 9)]
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
    with VideoWriter(clip, fps=24, height=64, width=64) as writer:
        writer.write(torch.full((40, 64, 64, 3), 90, dtype=torch.uint8))
    assert _frames(_make(options, video=clip, chunks=1)) == 37


def test_threads_are_set(options: Options) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _make(options, chunks=1, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def _frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
