"""Whole videos, made as every command makes them: time, steps that are computed, and memory against the estimate."""

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import Row, peak_rss, reset_peak, rss, save_text
from benchmarks.gpu.bench import Bench
from benchmarks.workload import PROMPT
from launch.generate import make_videos, this_process
from launch.option_fields import from_values
from launch.options import CacheName, Options
from launch.plan import job, plan_requests
from models.errors import InputError
from parallel.cluster.messages import ChunkMade, Event, VideoDone, VideoFailed

CHUNKS, STEPS = 10, 16
_THRESHOLDS: dict[CacheName, float] = {"flowcache-slow": 0.1, "flowcache-fast": 0.15, "teacache": 0.06}
"""Chunks of random weights change by as much from step to step whatever their size, and by more than those of a trained
model; with these thresholds about half of the steps are computed, or a third."""


class _OutOfTime(Exception):  # noqa: N818 - reads as what it says
    pass


def video(bench: Bench, cache: CacheName) -> Iterator[Row]:
    """Videos of 10 chunks of 16 steps by preset of reuse, with thresholds that suit random weights."""
    save_text(bench.config_file, json.dumps(bench.config.to_dict(), indent=1))
    reuse = {} if cache == "none" else {"cache_threshold": _THRESHOLDS[cache]}
    size = {"chunks": CHUNKS, "steps": STEPS, "height": bench.size[0], "width": bench.size[1]}
    options = from_values(
        Options, config=bench.config_file, weights=Path("random"), cache=cache, prompts=[PROMPT], **reuse, **size
    )
    plan = plan_requests(options, [Path()])[0]
    before = _start_counting(bench)
    began = time.monotonic()
    made: list[float] = []  # when each chunk was
    done: list[VideoDone] = []

    def handle(event: Event) -> None:
        match event:
            case VideoFailed():
                raise InputError(event.message)
            case ChunkMade():
                made.append(time.monotonic())
                if bench.left < 0:
                    raise _OutOfTime
            case VideoDone():
                done.append(event)

    with this_process(plan.model, 1) as backend:
        loaded = time.monotonic()
        try:
            make_videos(backend, [plan.order("0")], handle)
        except _OutOfTime:
            pass
    later = [after - before for before, after in zip(made, made[1:])]
    peak, estimate = _peak(bench) - before, job(plan).total(shared=not bench.cuda)
    yield {
        "cache": cache,
        "chunks": len(made),
        "seconds": made[-1] - loaded,
        "seconds a chunk": median(later) if later else None,
        "first chunk s": made[0] - loaded,
        "loading s": loaded - began,
        "computed": done[0].computed if done else None,
        "peak GB": peak / 1e9,
        "estimate GB": estimate / 1e9,
        "peak / estimate": peak / estimate,
    }


def _start_counting(bench: Bench) -> int:
    """Begin anew with the peak of memory; bytes that are in use already and belong to nothing that is measured."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_peak()
    return rss()


def _peak(bench: Bench) -> int:
    return torch.cuda.max_memory_allocated() if bench.cuda else peak_rss()
