"""Memory that a video needs: no more than it really takes, growing with its size, and said with what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import plan
from launch.options import Options
from launch.plan import bytes_needed, check_memory, free_bytes, plan_requests
from models.errors import InputError


def _needed(weights: Path, **given: object) -> int:
    plan = plan_requests(Options(prompts=["a red circle moving right"], weights=weights, **given), [Path("x.mp4")])[0]
    return bytes_needed(plan)


def test_it_follows_the_size_of_the_video(random_weights: Path) -> None:
    small = _needed(random_weights)
    assert 10**6 < small < 10**8  # a process with this video peaks at some 400 MB
    assert _needed(random_weights, height=128, width=128) == pytest.approx(4 * small, rel=0.01)
    assert _needed(random_weights, pp=2) < small and _needed(random_weights, cp=2) == pytest.approx(small / 2, rel=0.01)
    assert _needed(random_weights, chunks=1_000_000) < 2 * small  # what a video holds does not grow with its length


def test_too_little_is_said_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes()
    assert free is not None and free > 10**8
    monkeypatch.setattr(plan, "free_bytes", lambda: 3 * 10**9)
    check_memory("a video", 3 * 10**9)
    with pytest.raises(InputError, match=r"a video needs 9.5 GB, 3.0 GB are free: ask for a smaller --height"):
        check_memory("a video", 9_500_000_000)
