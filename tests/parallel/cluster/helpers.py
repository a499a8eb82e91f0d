"""Making videos with a cluster, and what came of it."""

import time
from dataclasses import dataclass, field

import torch

from engine.checkpoint.files import CheckpointConfig
from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from parallel.cluster.config import ClusterSettings, RankTask
from parallel.cluster.messages import ChunkMade, VideoDone, VideoFailed, VideoOrder
from parallel.cluster.placement import GangShape
from parallel.cluster.scheduler import GangSize
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout
from tests.parallel.cluster.sources import SmallSource, size

WINDOW = 4
TIMEOUTS = Timeouts(silent=15.0, first=120.0, step=60.0, grace=1.0)  # a machine with other tests may stand still


def settings(*, gangs=2, pp=2, cp=1, source=None, concurrency=1, cpus=1, **changes):
    layout = Layout(pp=pp, cp=cp)
    task = RankTask(
        layout=layout,
        source=source or SmallSource(),
        reuse=ReuseSettings(),
        kv=KVSettings(offload=True),  # which changes no bit of what `alone` makes
        timeouts=TIMEOUTS,
        threads=1,
    )
    room = GangSize(slots=concurrency * WINDOW, kv_bytes=2**30)
    return ClusterSettings(
        gangs=gangs, shape=GangShape(layout=layout, gpus=False, cpus=cpus), task=task, size=room, **changes
    )


def order(video, request, *, layout=None, folder=None, every=1, stored=0):
    plan = None if folder is None else CheckpointConfig(folder=folder / video, every=every)
    return VideoOrder(
        video=video,
        request=request,
        size=size(request, layout or Layout(pp=2)),
        checkpoint=plan,
        stored=stored,
    )


@dataclass
class Outcome:
    latents: dict = field(default_factory=dict)
    done: list = field(default_factory=list)
    failed: dict = field(default_factory=dict)
    events: list = field(default_factory=list)


def make(engine, orders, on_event=lambda event: None, limit=300.0):
    """Make videos; `on_event` sees everything as it happens. A failure leaves nothing of them to the next test."""
    outcome = Outcome(latents={one.video: [] for one in orders})
    for one in orders:
        engine.submit(one)
    try:
        _receive(engine, outcome, on_event, limit)
    except BaseException:
        for one in orders:
            engine.cancel(one.video)
        raise
    return outcome


def _receive(engine, outcome, on_event, limit):
    deadline = time.monotonic() + limit
    for event in engine.run():
        assert time.monotonic() < deadline, f"not through after {limit} s: {engine.gangs()} {engine.figures()}"
        if isinstance(event, ChunkMade):
            assert event.index == len(outcome.latents[event.video])
            outcome.latents[event.video].append(torch.from_numpy(event.latents.copy()))
        elif isinstance(event, VideoDone):
            outcome.done.append(event.video)
        elif isinstance(event, VideoFailed):
            outcome.failed[event.video] = event.message
        if not isinstance(event, ChunkMade):
            outcome.events.append(event)
        on_event(event)


def check_same(made, expected):
    assert len(made) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
