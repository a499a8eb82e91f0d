"""Makes the same videos in three ways, and says how long it took: on Ray gangs, on ranks of torchrun, in one process.

Seconds are from the first video's submission to its last chunk, with all ranks loaded and warm. Every run starts its
ranks anew, so that none runs beside the idle ranks of another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.cluster_making import Making, Outcome, digest, warm_up
from benchmarks.pipeline_job import Case, Job, launch
from benchmarks.pipeline_model import build
from benchmarks.processes import in_fresh_process
from engine.engine import Engine
from launch.ray_cluster import ray_cluster
from parallel.cluster.controller import Controller
from parallel.cluster.messages import ChunkMade, GangDown, GangLost


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """What a video is, as digests."""

    chunks: tuple[str, ...]  # of each chunk
    whole: str  # of all of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A run."""

    seconds: float
    start: float | None = None  # seconds until all ranks were warm; None where it was not looked at
    chunks: tuple[tuple[str, ...], ...] = ()  # a digest of each chunk of each video, from gangs of a cluster
    wholes: tuple[str, ...] = ()  # a digest of each video, from ranks of torchrun
    item: float = 0.0  # mean seconds of a stage's items, from ranks of torchrun
    losses: tuple[str, ...] = ()  # why gangs were lost; there should be none


def alone(making: Making, videos: int) -> list[Latents]:
    """The videos of one process, with one thread."""
    return in_fresh_process(_alone, making, videos)


def _alone(making: Making, videos: int) -> list[Latents]:
    torch.set_num_threads(1)
    engine = Engine(build(making.spec), making.cache, making.kv)
    found = []
    for request in making.requests(videos):
        chunks = [chunk.latents.numpy() for chunk in engine.generate(request)]
        found.append(Latents(chunks=tuple(digest([chunk]) for chunk in chunks), whole=digest(chunks)))
    return found


def on_ray(making: Making, videos: int) -> Timed:
    """The videos on gangs of a Ray cluster that is started for them."""
    began = time.perf_counter()
    with ray_cluster(cpus=making.ranks), Controller(making.settings()) as engine:
        warm_up(engine, making)
        outcome, losses = Outcome(), []
        start, ended = time.perf_counter() - began, 0.0
        began = time.perf_counter()
        outcome.submit(
            engine, [making.order(f"video-{place}", one) for place, one in enumerate(making.requests(videos))]
        )
        for event in engine.run():
            outcome.hear(event)
            if isinstance(event, ChunkMade):
                ended = time.perf_counter()
            elif isinstance(event, GangLost | GangDown):
                losses.append(f"{event.gang}: {event.message}")
    return Timed(
        seconds=ended - began,
        start=start,
        chunks=tuple(tuple(made) for made in outcome.chunks.values()),
        losses=tuple(losses),
    )


def on_ranks(making: Making, videos: int) -> Timed:
    """The same videos on ranks that torchrun starts, all in flight at once.

    Raises:
        GangError: a rank has failed.
    """
    job = Job(
        model=making.spec,
        layout=making.layout,
        cases=(Case(videos=videos, cache=making.cache),),
        chunks=making.chunks,
        steps=making.steps,
    )
    ((made,),) = launch(job, torchrun=True)
    busy, items = (sum(float(rank[name]) for rank in made.ranks) for name in ("busy", "items"))
    return Timed(seconds=made.seconds, wholes=made.latents, item=busy / items)


def differing(runs: Sequence[Timed], wanted: Sequence[Latents]) -> list[str]:
    """Videos that are not those of one process, and gangs that were lost; one line each."""
    found = []
    for place, run in enumerate(runs, 1):
        found += [f"run {place}: {loss}" for loss in run.losses]
        made: tuple[object, ...] = run.chunks or run.wholes
        expected = [one.chunks if run.chunks else one.whole for one in wanted]
        same = [one == other for one, other in zip(made, expected, strict=True)]
        found += [f"run {place}: video {number} has other latents" for number, one in enumerate(same) if not one]
    return found
