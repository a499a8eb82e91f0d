"""The Ray actor of one rank. It takes its env as a process of torchrun does, and runs the same loop.

The work is one long call, on the actor's main thread; what the driver says meanwhile arrives on a line of its own, so
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

from engine.heap import settle_heap
from engine.kv.size import KVSettings
from engine.request import Request
from engine.reuse.settings import ReuseSettings
from models.errors import InputError
from parallel.cluster.command_loop import CommandLoop
from parallel.cluster.config import ModelSource
from parallel.cluster.connection import Call, Line, dial
from parallel.cluster.messages import AskHealth, Command
from parallel.health.errors import BAD_INPUT, FAILED, GangError
from parallel.health.timeouts import Timeouts
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.topology.mesh import Layout

_FIRST_ITEMS = 4
_FLUSH = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTask:
    """What every rank of a gang is told."""

    layout: Layout  # of the ranks
    source: ModelSource  # of the weights
    cache: ReuseSettings  # which steps are reused
    kv: KVSettings  # how much of the past is held
    timeouts: Timeouts  # how long to wait for others
    threads: int  # CPU threads


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnd:
    """How a rank has ended: its exit status, and why if it was not well."""

    status: int
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What a rank is at."""

    pid: int
    node: str
    doing: str  # in words; empty while it waits
    age: float  # seconds for which it has been seen at it
    first: bool  # it has run few items yet, and may be compiling


class RankActor:
    """One rank of a gang."""

    def __init__(self) -> None:
        self._gang: Gang | None = None
        self._node = ray.get_runtime_context().get_node_id()
        self._seen, self._since, self._items = "starting", time.monotonic(), 0

    def run(self, env: RankEnv, task: RankTask, call: Call) -> RankEnd:
        """Take an env and work until the lead lets go.

        Args:
            env: of this rank.
            task: of its gang.
            call: how the driver is reached.

        Returns:
            How it has ended; a failure is told, not raised.
        """
        os.environ.update(env.variables())
        settle_heap()
        torch.set_num_threads(task.threads)
        try:
            connection = dial(call)
        except OSError as error:
            message = f"rank {env.rank} cannot reach the driver at {call.host}:{call.port}: {error.strerror or error}"
            return RankEnd(status=FAILED, message=message)
        line = Line(connection)
        lead = CommandLoop(line.send)
        line.send(self._health())
        line.listen(lambda message: self._hear(message, lead, line), lambda: None)
        try:
            with open_gang(env, task.layout, timeouts=task.timeouts, device=_own_device()) as gang:
                self._gang = gang
                self._work(gang, task, lead)
        except GangError as error:
            return RankEnd(status=error.failure.status, message=str(error))
        except InputError as error:
            return RankEnd(status=BAD_INPUT, message=str(error))
        except Exception as error:  # noqa: BLE001 - the driver shows it
            return RankEnd(status=FAILED, message=f"rank {env.rank}: {type(error).__name__}: {error}")
        finally:
            line.close(flush=_FLUSH)
        return RankEnd(status=0, message="")

    def _hear(self, message: Command | AskHealth, lead: CommandLoop, line: Line) -> None:
        if isinstance(message, AskHealth):
            line.send(self._health())
        else:
            lead.obey(message)

    def _work(self, gang: Gang, task: RankTask, lead: CommandLoop) -> None:
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

        def quantum_ticks(request: Request) -> int:
            sampling = pipeline.sampling(request.num_steps, clean_pass=False, copy_pass=False)
            return request.num_steps // sampling.window

        with gang.lead(pipeline, task.cache, task.kv, identity=task.source.identity) as (engine, _):
            lead.run(engine, quantum_ticks)

    def _health(self) -> Health:
        """What this rank is at. Looks see for how long: an item that does not change is one that is stuck."""
        doing = "starting" if self._gang is None else self._gang.monitor.doing
        now = time.monotonic()
        if doing != self._seen:
            self._seen, self._since = doing, now
            self._items += bool(doing)
        return Health(
            pid=os.getpid(),
            node=self._node,
            doing=doing,
            age=now - self._since if doing else 0.0,
            first=self._items <= _FIRST_ITEMS,
        )


def actor_class() -> Any:
    """The actor as Ray starts it. It is never restarted alone: a lone rank cannot join the others again."""
    return ray.remote(max_restarts=0, max_task_retries=0)(RankActor)


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
