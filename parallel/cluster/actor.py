"""The Ray actor of one rank. It gets its environment as a process of torchrun does, and runs the same loop.

The work is one long call on the actor's main thread. Commands of the controller arrive meanwhile on a connection of its
own, and on another thread.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch

from engine.heap import settle_heap
from models.errors import InputError
from parallel.cluster.command_loop import CommandLoop
from parallel.cluster.config import RankTask
from parallel.cluster.connection import Address, connect
from parallel.cluster.messages import GangEvent, RankStarted
from parallel.health.errors import BAD_INPUT, FAILED, OK, GangError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.worker import StageModel

_FLUSH = 5.0


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank has ended."""

    status: int  # exit code
    message: str = ""  # why, if it was not well


class RankActor:
    """One rank of a gang."""

    def __init__(self) -> None:
        self._gang: Gang | None = None

    def run(self, env: RankEnv, task: RankTask, address: Address) -> RankEnd:
        """Work as one rank until the leader ends the session; a failure is returned, not raised."""
        os.environ.update(env.variables())
        settle_heap()
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        loop = CommandLoop()
        try:
            connection = connect(address, loop.handle, self._on_end)
        except OSError as error:
            where = f"the controller at {address.host}:{address.port}"
            return RankEnd(FAILED, f"rank {env.rank} cannot reach {where}: {error.strerror or error}")
        connection.send(RankStarted(pid=os.getpid()))
        try:
            with open_gang(env, task.layout, timeouts=task.timeouts, device=_own_device()) as gang:
                self._gang = gang
                _work(gang, task, loop, connection.send)
        except GangError as error:
            return RankEnd(error.failure.status, str(error))
        except InputError as error:
            return RankEnd(BAD_INPUT, str(error))
        except Exception as error:  # noqa: BLE001 - the controller shows it
            return RankEnd(FAILED, f"rank {env.rank}: {type(error).__name__}: {error}")
        finally:
            connection.close(flush=_FLUSH)
        return RankEnd(OK)

    def _on_end(self, error: Exception | None) -> None:
        """The connection has ended. Without a controller Ray ends this process; any other reason fails the gang."""
        if error is not None and self._gang is not None:
            self._gang.monitor.fail(f"messages of the controller: {type(error).__name__}: {error}")


def _work(gang: Gang, task: RankTask, loop: CommandLoop, send: Callable[[list[GangEvent]], None]) -> None:
    # Objects that exist when the work begins, and they are many with Ray, stay: the garbage collector, which would go
    # through them over and over, takes 1% of a rank's time.
    load = task.source.lead if gang.mesh.leads else task.source.stage
    with gang.loading():
        loaded = load(gang.mesh, str(gang.device))
    gc.freeze()
    if isinstance(loaded, StageModel):
        gang.serve(loaded)
        return
    with gang.lead(loaded, task.reuse, task.kv, identity=task.source.identity) as (engine, _):
        loop.run(engine, gang.device, send)


def actor_class() -> Any:
    """The actor as Ray starts it. Ray never restarts it alone: a lone rank cannot join the others again."""
    return ray.remote(max_restarts=0, max_task_retries=0)(RankActor)


def device_index(ids: list[str], visible: str | None) -> int | None:
    """The first of an actor's accelerators as torch counts them, within CUDA_VISIBLE_DEVICES of the node."""
    if not ids:
        return None
    shown = visible.split(",") if visible else []
    return shown.index(ids[0]) if ids[0] in shown else int(ids[0])


def _own_device() -> torch.device:
    ids = [str(one) for one in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
    index = device_index(ids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return torch.device("cuda", index) if index is not None and torch.cuda.is_available() else torch.device("cpu")
