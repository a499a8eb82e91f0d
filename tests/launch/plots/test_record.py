"""`generate --record`: a real run, what it leaves behind, and its plots."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.kv.selection import SelectionSettings
from engine.record import NOT_ACTIVE, RunRecord
from engine.reuse.policy import ReuseSettings
from launch import __version__
from launch.cli import run
from launch.output.video import VideoWriter

PROMPT = "a red circle moving right"


@pytest.mark.slow
def test_record_then_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--chunks", "3", "--steps", "8", "--seed", "5", "--weights", str(random_weights), "--record", "run"]
    kept = ["--kv-budget", "1", "--kv-offload", "--threads", "1"]
    assert run(["generate", PROMPT, *options, "--cache-threshold", "0.2", "--reuse", "velocity", *kept]) == 0
    shown = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["run", "video.mp4"]
    assert sorted(os.listdir(tmp_path / "run")) == ["record.json", "record.npz"]
    record = RunRecord.load(tmp_path / "run")
    assert run(["plot", "kv", "run"]) == 0 and capsys.readouterr() == ("run/kv.png\n", "")
    assert (tmp_path / "run" / "kv.png").read_bytes().startswith(b"\x89PNG")

    settings = dict(record.settings)
    assert f"{record.computed_fraction:.0%} of the steps computed" in shown
    on_host = settings.pop("kv_host_bytes")
    assert on_host == 6 * 96 * 2 * 2 * 48 * 4  # a chunk of 96 tokens, keys and values of 2 heads of 48, 6 layers, fp32
    said = f"keys and values {settings['kv_bytes'] / 1e6:.1f} MB and {on_host / 1e3:.1f} kB on the host"
    assert said in shown
    seconds = settings.pop("seconds")
    assert 0 < record.tick_seconds.sum() < seconds["making"] and seconds["loading"] > 0
    assert settings.pop("computed_fraction") == pytest.approx(record.computed_fraction)
    assert settings.pop("kv_bytes") > 1_000_000
    cache = ReuseSettings(**settings.pop("cache"))
    assert (cache.policy, cache.threshold, cache.reuse) == ("flowcache", 0.2, "velocity")
    assert settings.pop("kv") == {"budget": 1, "selection": asdict(SelectionSettings()), "offload": True}
    assert settings == {
        "version": __version__,
        "model": "magi-pocket",
        "prompt": PROMPT,
        "script": [],
        "negative_prompt": None,
        "fps": 24,
        "seed": 5,
        "chunks": 3,
        "prefix_frames": 0,
        "height": 64,
        "width": 64,
        "steps": 8,
        "window": 4,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "pp": 1,
        "cp": 1,
        "layers": [6],
        "cache_preset": "flowcache-slow",
        "attention": "sdpa",
    }


def test_a_run_without_reuse_records_distances_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--chunks", "2", "--steps", "4", "--weights", str(random_weights), "--threads", "1"]
    assert run(["generate", PROMPT, *options, "--cache", "none", "--record", "deep/run"]) == 0
    record = RunRecord.load(Path("deep/run"))
    active = record.flags != NOT_ACTIVE
    assert record.computed_fraction == 1 and record.flags.shape == (5, 2) and active.sum() == 8
    first_steps = [record.distances[active[:, chunk], chunk][0] for chunk in range(2)]
    assert np.isnan(first_steps).all() and np.isfinite(record.distances).sum() == 6
    assert record.tick_items.sum() > 8  # at least the clean pass of chunk 0 on top
    assert json.loads(Path("deep/run/record.json").read_text())["cache_preset"] == "none"


@pytest.mark.slow
def test_a_clip_that_is_gone_on_from_is_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(Path("clip.mp4"), fps=24) as writer:
        writer.write(torch.full((32, 64, 64, 3), 90, dtype=torch.uint8))
    options = ["--chunks", "2", "--steps", "4", "--weights", str(random_weights), "--threads", "1"]
    assert run(["generate", PROMPT, *options, "--video", "clip.mp4", "--record", "run"]) == 0
    record = RunRecord.load(Path("run"))
    assert record.settings["prefix_frames"] == 32
    assert (record.flags[:, 0] == NOT_ACTIVE).all() and (record.flags[:, 1:] != NOT_ACTIVE).any(axis=0).all()
    assert run(["plot", "kv", "run"]) == 0
