"""The Ray actor of one rank. It takes its seat as a process of torchrun does, and runs the same loop.

The work is one long call; what the driver says meanwhile arrives on threads of its own (Ray's concurrency groups), so
that a rank that computes still answers.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch

from engine.cache import CacheSettings
from engine.kv import KVSettings
from engine.request import Request
from models.errors import InputError
from parallel.cluster.events import LeadEvent
from parallel.cluster.lead import Lead, VideoJob
from parallel.cluster.source import ModelSource
from parallel.failure import BAD_INPUT, FAILED, GangError
from parallel.gang import Gang, open_gang
from parallel.mesh import Layout
from parallel.monitor import Timeouts
from parallel.seat import Seat

__all__ = ["Health", "RankActor", "RankEnd", "RankTask", "actor_class", "device_index"]

_GROUPS = {"control": 1, "events": 1, "health": 1}
_FIRST_ITEMS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTask:
    """What every rank of a gang is told.

    Attributes:
        layout: of the ranks.
        source: of the weights.
        cache: which steps are reused.
        kv: how much of the past is held.
        timeouts: how long to wait for others.
        threads: CPU threads.
    """

    layout: Layout
    source: ModelSource
    cache: CacheSettings
    kv: KVSettings
    timeouts: Timeouts
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnd:
    """How a rank has ended: its exit status, and why if it was not well."""

    status: int
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What a rank is at.

    Attributes:
        pid: its process.
        node: its node.
        doing: in words; empty while it waits.
        age: seconds for which it has been seen at it.
        first: it has run few items yet, and may be compiling.
    """

    pid: int
    node: str
    doing: str
    age: float
    first: bool


class RankActor:
    """One rank of a gang."""

    def __init__(self) -> None:
        self._lead = Lead()
        self._gang: Gang | None = None
        self._seen, self._since, self._items = "starting", time.monotonic(), 0

    def run(self, seat: Seat, task: RankTask) -> RankEnd:
        """Take a seat and work until the lead lets go.

        Args:
            seat: of this rank.
            task: of its gang.

        Returns:
            How it has ended; a failure is told, not raised.
        """
        os.environ.update(seat.variables())
        torch.set_num_threads(task.threads)
        try:
            with open_gang(seat, task.layout, timeouts=task.timeouts, device=_own_device()) as gang:
                self._gang = gang
                self._work(gang, task)
        except GangError as error:
            return RankEnd(status=error.failure.status, message=str(error))
        except InputError as error:
            return RankEnd(status=BAD_INPUT, message=str(error))
        except Exception as error:  # noqa: BLE001 - the driver shows it
            return RankEnd(status=FAILED, message=f"rank {seat.rank}: {type(error).__name__}: {error}")
        return RankEnd(status=0, message="")

    def _work(self, gang: Gang, task: RankTask) -> None:
        # What is there when the work begins, and that is much with Ray, stays: the garbage collector, which would go
        # through it over and over, takes 1% of a rank's time.
        device = str(gang.device)
        if not gang.mesh.leads:
            with gang.loading():
                stage = task.source.stage(gang.mesh, device)
            gc.freeze()
            gang.serve(stage)
            return
        with gang.loading():
            pipeline = task.source.lead(gang.mesh, device)
        gc.freeze()

        def turn_ticks(request: Request) -> int:
            sampling = pipeline.sampling(request.num_steps, clean_forward=False, nearly_clean_mix=False)
            return request.num_steps // sampling.window

        with gang.lead(pipeline, task.cache, task.kv, identity=task.source.identity) as (engine, _):
            self._lead.run(engine, turn_ticks)

    @ray.method(concurrency_group="control")
    def admit(self, job: VideoJob) -> None:
        """Begin a video."""
        self._lead.admit(job)

    @ray.method(concurrency_group="control")
    def grant(self, video: str, turn: int) -> None:
        """Let a turn of a video begin."""
        self._lead.grant(video, turn)

    @ray.method(concurrency_group="control")
    def cancel(self, video: str) -> None:
        """Make no more of a video."""
        self._lead.cancel(video)

    @ray.method(concurrency_group="control")
    def taken(self, video: str, index: int) -> None:
        """A chunk is in safe hands."""
        self._lead.taken(video, index)

    @ray.method(concurrency_group="control")
    def finish(self) -> None:
        """Nothing more will come."""
        self._lead.finish()

    @ray.method(concurrency_group="events")
    def events(self, wait: float) -> list[LeadEvent]:
        """What has happened since the last call; waits up to so many seconds for something."""
        return self._lead.events(wait)

    @ray.method(concurrency_group="health")
    def health(self) -> Health:
        """What this rank is at. Calls see for how long: an item that does not change is one that is stuck."""
        doing = "starting" if self._gang is None else self._gang.monitor.doing
        now = time.monotonic()
        if doing != self._seen:
            self._seen, self._since = doing, now
            self._items += bool(doing)
        return Health(
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            doing=doing,
            age=now - self._since if doing else 0.0,
            first=self._items <= _FIRST_ITEMS,
        )


def actor_class() -> Any:
    """The actor as Ray starts it. It is never restarted alone: a lone rank cannot join the others again."""
    remote: Any = ray.remote  # its types do not know concurrency groups
    return remote(concurrency_groups=_GROUPS, max_restarts=0, max_task_retries=0)(RankActor)


def device_index(ids: list[str], visible: str | None) -> int | None:
    """The device that Ray has given, as torch counts them.

    Args:
        ids: of the actor's accelerators.
        visible: CUDA_VISIBLE_DEVICES of the node, which is what torch counts within.
    """
    if not ids:
        return None
    shown = visible.split(",") if visible else []
    return shown.index(ids[0]) if ids[0] in shown else int(ids[0])


def _own_device() -> torch.device:
    ids = [str(one) for one in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
    index = device_index(ids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if index is None or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", index)
