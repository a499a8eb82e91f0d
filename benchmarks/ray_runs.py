"""Runs on the gangs of a Ray cluster: how they are set up, what is ordered, and what has come of it.

It knows neither failures nor what is wanted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

from benchmarks.workload import Made, ModelSpec, Workload, build, digest, model_config
from engine.checkpoint.files import CheckpointConfig
from engine.request import Request
from launch.cluster import ray_cluster
from models.magi.pipeline import MagiPipeline
from parallel.cluster.config import ClusterSettings, RankTask, VideoSize, video_size
from parallel.cluster.controller import Controller
from parallel.cluster.messages import ChunkMade, Event, GangDown, GangLost, VideoDone, VideoFailed, VideoOrder
from parallel.cluster.placement import GangShape
from parallel.cluster.scheduler import GangSize
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh, stage_range
from parallel.ranks.worker import StageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSource:
    """A model of the benchmarks, without an autoencoder: latents are what counts."""

    spec: ModelSpec

    @property
    def identity(self) -> str:
        """A digest of what the model is made of."""
        return hashlib.sha256(repr(sorted(asdict(self.spec).items())).encode()).hexdigest()[:16]

    def lead(self, mesh: Mesh, device: str) -> MagiPipeline:
        """The first stage's layers and the text encoder."""
        return build(self.spec, stage_range(model_config(self.spec), mesh))

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        """A rank's layers."""
        pipeline = self.lead(mesh, device)
        return StageModel(model=pipeline.model, attention=pipeline.attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class GangSetup:
    """Gangs, and what they make."""

    workload: Workload
    layout: Layout  # of each gang
    gangs: int  # how many
    concurrency: int = 1  # videos that a gang makes at a time
    timeouts: Timeouts = field(default_factory=Timeouts)  # how long ranks wait for others
    max_restarts: int = 0  # of all gangs together

    @property
    def settings(self) -> ClusterSettings:
        """How to use the cluster, one thread per rank; an `InputError` if model, videos and layout do not fit."""
        own, source = self.workload, BenchSource(spec=self.workload.model)
        task = RankTask(
            layout=self.layout, source=source, reuse=own.reuse, kv=own.kv, timeouts=self.timeouts, threads=1
        )
        size = self._size(own.requests[0])
        room = GangSize(slots=self.concurrency * size.schedule.window, kv_bytes=self.concurrency * size.kv_bytes)
        shape = GangShape(layout=self.layout, gpus=False)
        return ClusterSettings(gangs=self.gangs, shape=shape, task=task, size=room, max_restarts=self.max_restarts)

    def order(self, video: str, request: Request, checkpoint: CheckpointConfig | None = None) -> VideoOrder:
        """A video to make."""
        return VideoOrder(video=video, request=request, size=self._size(request), checkpoint=checkpoint)

    def _size(self, request: Request) -> VideoSize:
        own = self.workload
        return video_size(model_config(own.model), request, reuse=own.reuse, kv=own.kv, layout=self.layout)


@dataclass(slots=True)
class Outcome:
    """What has come of videos so far."""

    chunks: dict[str, list[str]] = field(default_factory=dict)  # digests of the latents of each chunk, by video
    done: set[str] = field(default_factory=set)  # videos that were reported complete
    failed: dict[str, str] = field(default_factory=dict)  # why others are not
    problems: list[str] = field(default_factory=list)  # chunks that did not come in their order

    @property
    def waiting(self) -> int:
        """Videos that have neither come nor failed."""
        return len(self.chunks) - len(self.done) - len(self.failed)

    def submit(self, controller: Controller, orders: Iterable[VideoOrder]) -> None:
        """Queue videos, and expect them."""
        for order in orders:
            controller.submit(order)
            self.chunks[order.video] = []

    def on_event(self, event: Event) -> None:
        """Note what has happened."""
        if isinstance(event, ChunkMade):
            made = self.chunks[event.video]
            if event.index != len(made):
                self.problems.append(f"{event.video}: chunk {event.index} came where {len(made)} was due")
            made.append(digest(event.latents))
        elif isinstance(event, VideoDone):
            self.done.add(event.video)
        elif isinstance(event, VideoFailed):
            self.failed[event.video] = event.message


def warm_up(controller: Controller, setup: GangSetup, on_event: Callable[[Event], None] = lambda event: None) -> None:
    """Make short videos until every gang has made one, so that none is starting or new to its work."""
    short, rounds = replace(setup, workload=replace(setup.workload, chunks=1, videos=setup.gangs)), 0
    warm: set[str] = set()
    while len(warm) < setup.gangs:
        for number, request in enumerate(short.workload.requests):
            controller.submit(short.order(f"warm-up-{rounds}-{number}", request))
        rounds += 1
        for event in controller.run():
            on_event(event)
            if isinstance(event, VideoDone):
                warm.add(event.gang)


def on_ray(setup: GangSetup) -> Made:
    """The videos of a workload on gangs of a Ray cluster that is started for them."""
    began = time.perf_counter()
    with ray_cluster(cpus=setup.gangs * setup.layout.world_size), Controller(setup.settings) as controller:
        warm_up(controller, setup)
        outcome, losses = Outcome(), []
        start, ended = time.perf_counter() - began, 0.0
        orders = [setup.order(f"video-{place}", one) for place, one in enumerate(setup.workload.requests)]
        began = time.perf_counter()
        outcome.submit(controller, orders)
        for event in controller.run():
            outcome.on_event(event)
            if isinstance(event, ChunkMade):
                ended = time.perf_counter()
            elif isinstance(event, GangLost | GangDown):
                losses.append(f"{event.gang}: {event.message}")
    latents = tuple(tuple(made) for made in outcome.chunks.values())
    return Made(seconds=ended - began, latents=latents, start=start, losses=tuple(losses))
