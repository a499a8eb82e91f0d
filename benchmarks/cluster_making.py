"""How benchmarks make videos on gangs of a Ray cluster: the model, the orders, and what has come of them.

It knows neither failures nor figures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.pipeline_job import Job, ModelSpec
from benchmarks.pipeline_model import BenchPipeline, build, model_config, requests
from engine.checkpoint.files import CheckpointConfig
from engine.kv.size import KVSettings
from engine.request import Request
from engine.reuse.settings import ReuseSettings
from parallel.cluster.config import ClusterSettings, RankTask, VideoSize, video_size
from parallel.cluster.controller import Controller
from parallel.cluster.messages import ChunkMade, Event, VideoDone, VideoFailed, VideoOrder
from parallel.cluster.placement import GangShape
from parallel.cluster.queue import GangSize
from parallel.health.timeouts import Timeouts
from parallel.ranks.worker import StageModel
from parallel.topology.mesh import Layout, Mesh
from parallel.topology.split import stage_range


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSource:
    """A model of the benchmarks, without an autoencoder: latents are what counts."""

    spec: ModelSpec

    @property
    def identity(self) -> str:
        """A digest of what the model is made of."""
        return hashlib.sha256(repr(sorted(asdict(self.spec).items())).encode()).hexdigest()[:16]

    def lead(self, mesh: Mesh, device: str) -> BenchPipeline:
        """The first stage's layers and the text encoder."""
        return build(self.spec, stage_range(model_config(self.spec), mesh))

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        """A rank's layers."""
        return build(self.spec, stage_range(model_config(self.spec), mesh)).stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """What is made, and with what."""

    spec: ModelSpec
    layout: Layout  # of each gang
    gangs: int  # how many
    chunks: int  # of every video
    steps: int  # of every chunk
    concurrency: int = 1  # videos that a gang makes at a time
    cache: ReuseSettings = field(default_factory=ReuseSettings)  # which steps are reused
    kv: KVSettings = field(default_factory=KVSettings)  # how much of the past is held
    timeouts: Timeouts = field(default_factory=Timeouts)  # how long ranks wait for others
    max_restarts: int = 0  # of all gangs together

    @property
    def ranks(self) -> int:
        """Of all gangs together."""
        return self.gangs * self.layout.world_size

    def requests(self, count: int) -> list[Request]:
        """Videos that differ in their noise."""
        return requests(Job(model=self.spec, layout=None, cases=(), chunks=self.chunks, steps=self.steps), count)

    def settings(self, seed: int = 0) -> ClusterSettings:
        """How to use the cluster; one thread per rank.

        Raises:
            InputError: the model cannot make such videos, or does not fit the layout.
        """
        task = RankTask(
            layout=self.layout,
            source=BenchSource(spec=self.spec),
            cache=self.cache,
            kv=self.kv,
            timeouts=self.timeouts,
            threads=1,
        )
        size = self._size(self.requests(1)[0])
        room = GangSize(slots=self.concurrency * size.window, kv_bytes=self.concurrency * size.kv_bytes)
        return ClusterSettings(
            gangs=self.gangs,
            shape=GangShape(layout=self.layout, gpus=False),
            task=task,
            size=room,
            max_restarts=self.max_restarts,
        )

    def order(self, video: str, request: Request, checkpoint: CheckpointConfig | None = None) -> VideoOrder:
        """A video to make."""
        return VideoOrder(video=video, request=request, size=self._size(request), checkpoint=checkpoint)

    def _size(self, request: Request) -> VideoSize:
        config = model_config(self.spec)
        return video_size(config, request, cache=self.cache, kv=self.kv, layout=self.layout)


@dataclass(slots=True)
class Outcome:
    """What has come of videos so far."""

    chunks: dict[str, list[str]] = field(default_factory=dict)  # a digest of the latents of each chunk, by video
    done: set[str] = field(default_factory=set)  # videos that are said to be complete
    failed: dict[str, str] = field(default_factory=dict)  # why others are not
    problems: list[str] = field(default_factory=list)  # chunks that did not come in their order

    @property
    def waiting(self) -> int:
        """Videos that have neither come nor failed."""
        return len(self.chunks) - len(self.done) - len(self.failed)

    def submit(self, engine: Controller, orders: Iterable[VideoOrder]) -> None:
        """Queue videos, and expect them."""
        for order in orders:
            engine.submit(order)
            self.chunks[order.video] = []

    def hear(self, event: Event) -> None:
        """Something has happened."""
        if isinstance(event, ChunkMade):
            made = self.chunks[event.video]
            if event.index != len(made):
                self.problems.append(f"{event.video}: chunk {event.index} came where {len(made)} was due")
            made.append(digest([event.latents]))
        elif isinstance(event, VideoDone):
            self.done.add(event.video)
        elif isinstance(event, VideoFailed):
            self.failed[event.video] = event.message


def digest(chunks: Iterable[NDArray[np.float32]]) -> str:
    """A digest of latents, as `benchmarks.pipeline` takes it."""
    made = hashlib.sha256()
    for chunk in chunks:
        made.update(np.ascontiguousarray(chunk).tobytes())
    return made.hexdigest()


def warm_up(engine: Controller, making: Making, on_event: Callable[[Event], None] = lambda event: None) -> None:
    """Make short videos until every gang has made one, so that none is starting or new to its work."""
    short, rounds = replace(making, chunks=1), 0
    warm: set[str] = set()
    while len(warm) < making.gangs:
        for number, request in enumerate(short.requests(making.gangs)):
            engine.submit(making.order(f"warm-up-{rounds}-{number}", request))
        rounds += 1
        for event in engine.run():
            on_event(event)
            if isinstance(event, VideoDone):
                warm.add(event.gang)
