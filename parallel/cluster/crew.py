"""The started ranks of one gang: what they tell, whether they live and come on, and ending them for certain.

Nothing here waits. A crew is started once; after a failure it is ended as a whole and another one is started.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.heap import heap_variables
from models.errors import InputError
from parallel.cluster.events import GangReady, LeadEvent
from parallel.cluster.placement import GangShape, Place, Placement
from parallel.cluster.rank_actor import Health, RankEnd, RankTask, actor_class
from parallel.failure import BAD_INPUT, FailureBoard
from parallel.mesh import Mesh
from parallel.seat import Seat

__all__ = ["Crew", "GangBroken", "RankView"]

_HEALTH_EVERY, _LONG_POLL = 2.0, 2.0
_GET = 30.0
_LOST = (RayActorError, RayTaskError, GetTimeoutError)
"""What Ray raises for a rank that is gone. The first is the parent of several, and the others do not belong to it."""


class GangBroken(Exception):  # noqa: N818 - reads as what it says
    """The gang has failed; its text is one line that says why.

    Attributes:
        unsure: a node may be gone, about which Ray has not made up its mind.
    """

    def __init__(self, message: str, *, unsure: bool = False) -> None:
        super().__init__(message)
        self.unsure = unsure


@dataclass(frozen=True, kw_only=True, slots=True)
class RankView:
    """A rank as the driver sees it.

    Attributes:
        rank: which.
        pid: its process; None while it is not known.
        node: id of its node.
        doing: in words.
        age: seconds for which it has been at it.
    """

    rank: int
    pid: int | None
    node: str
    doing: str
    age: float


@dataclass(slots=True)
class _Rank:
    actor: Any
    run: Any
    place: Place
    asked: Any
    asked_at: float
    health: Health | None = None


class Crew:
    """The ranks of one attempt. The driver serves the store where they meet, so what they report outlives them.

    Args:
        shape: what each needs.
        task: what each is told.
        placement: where there is room.
        places: of the ranks, in order.
        attempt: how often the gang was started before.
    """

    def __init__(
        self, shape: GangShape, task: RankTask, placement: Placement, places: Sequence[Place], attempt: int
    ) -> None:
        self._task, self._attempt = task, attempt
        self._mesh = Mesh(layout=shape.layout, rank=0)
        self._host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._began = time.monotonic()
        self._up = False
        self._ranks = [self._start(shape, placement, places, rank) for rank in range(len(places))]
        self._events = self.lead.events.remote(_LONG_POLL)

    @property
    def lead(self) -> Any:
        """The actor of rank 0."""
        return self._ranks[0].actor

    @property
    def refs(self) -> list[Any]:
        """What to wait for: one of these is ready when `poll` has something."""
        return [*(rank.run for rank in self._ranks), self._events]

    @property
    def ended(self) -> bool:
        """All ranks have ended, well or not."""
        runs = [rank.run for rank in self._ranks]
        return len(ray.wait(runs, num_returns=len(runs), timeout=0)[0]) == len(runs)

    def views(self) -> list[RankView]:
        """The ranks."""
        return [
            RankView(
                rank=number,
                pid=None if rank.health is None else rank.health.pid,
                node=rank.place.node,
                doing="starting" if rank.health is None else rank.health.doing,
                age=0.0 if rank.health is None else rank.health.age,
            )
            for number, rank in enumerate(self._ranks)
        ]

    def poll(self) -> list[LeadEvent]:
        """Take in what has come.

        Returns:
            What the lead has told.

        Raises:
            GangBroken: a rank is gone, or does not come on.
            InputError: the ranks cannot start with what they were given.
        """
        events = self._listen()
        self._up = self._up or any(isinstance(event, GangReady) for event in events)
        self._check_ends()
        self._check_health()
        return events

    def kill(self) -> None:
        """End all ranks at once, also those that hang."""
        here = ray.get_runtime_context().get_node_id()
        for rank in self._ranks:
            if rank.health is not None:
                _kill(rank.health, here)
            ray.kill(rank.actor, no_restart=True)

    def _start(self, shape: GangShape, placement: Placement, places: Sequence[Place], rank: int) -> _Rank:
        place, threads = places[rank], str(self._task.threads)
        seat = Seat(
            rank=rank,
            world_size=len(places),
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            host=self._host,
            port=self._store.port,
            launcher_serves=True,
            launcher_speaks=True,
            attempt=self._attempt,
        )
        # Ray sets one thread for ranks that reserve one CPU, and hides the other GPUs; torchrun does neither.
        variables = {"OMP_NUM_THREADS": threads, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        variables |= heap_variables()
        actor = (
            actor_class()
            .options(
                num_cpus=shape.cpus,
                num_gpus=1 if shape.gpus else 0,
                scheduling_strategy=placement.at(place),
                runtime_env={"env_vars": variables},
            )
            .remote()
        )
        return _Rank(
            actor=actor,
            run=actor.run.remote(seat, self._task),
            place=place,
            asked=actor.health.remote(),
            asked_at=self._began,
        )

    def _listen(self) -> list[LeadEvent]:
        if not ray.wait([self._events], timeout=0)[0]:
            return []
        try:
            events: list[LeadEvent] = ray.get(self._events, timeout=_GET)
        except _LOST as error:
            raise self._broken(0, error) from None
        self._events = self.lead.events.remote(_LONG_POLL)
        return events

    def _check_ends(self) -> None:
        """No rank ends before it is told to."""
        runs = {rank.run: number for number, rank in enumerate(self._ranks)}
        ready, _ = ray.wait(list(runs), num_returns=len(runs), timeout=0)
        ends: list[tuple[int, RankEnd]] = []
        dead: list[GangBroken] = []
        for run in ready:
            try:
                ends.append((runs[run], ray.get(run, timeout=_GET)))
            except _LOST as error:
                dead.append(self._broken(runs[run], error))
        for _, end in ends:
            if end.status == BAD_INPUT and not self._up:
                raise InputError(end.message)
            if end.status:
                raise GangBroken(end.message)
        if dead:
            raise dead[0]

    def _check_health(self) -> None:
        """Every rank answers, and comes on. The ranks watch each other too, and know more; they go first."""
        now, limits = time.monotonic(), self._task.timeouts
        starting = not self._up
        if starting and now - self._began > limits.first:
            raise GangBroken(f"its ranks have not met within {limits.first:.0f} s")
        for number, rank in enumerate(self._ranks):
            name = self._mesh.name(number)
            if rank.asked is None:
                if now - rank.asked_at >= _HEALTH_EVERY:
                    rank.asked, rank.asked_at = rank.actor.health.remote(), now
                continue
            if ray.wait([rank.asked], timeout=0)[0]:
                try:
                    rank.health = ray.get(rank.asked, timeout=_GET)
                except _LOST as error:
                    raise self._broken(number, error) from None
                rank.asked = None
            elif rank.health is not None and now - rank.asked_at > limits.silent + 2 * limits.grace:
                raise GangBroken(f"{name} has not answered for {now - rank.asked_at:.0f} s")
            if (health := rank.health) is not None:
                limit = (limits.first if starting or health.first else limits.step) + 2 * limits.grace
                if health.age > limit:
                    raise GangBroken(f"{name} has not come on for {health.age:.0f} s at {health.doing}")

    def _broken(self, rank: int, error: Exception) -> GangBroken:
        """What to say of a rank that does not answer any more: what the ranks have reported, if they have."""
        if isinstance(error, RayTaskError):
            return GangBroken(f"{self._mesh.name(rank)}: {error.cause}")
        with suppress(RuntimeError):
            board = FailureBoard(dist.PrefixStore(f"flowcache/{self._attempt}", self._store))
            if (failure := board.read()) is not None:
                return GangBroken(failure.message)
        never_seen = isinstance(error, RayActorError) and self._ranks[rank].health is None
        unsure = isinstance(error, ActorUnavailableError) or never_seen
        return GangBroken(f"{self._mesh.name(rank)} has died", unsure=unsure)


def _kill(health: Health, here: str) -> None:
    """End a process for certain; one that is stopped does not hear Ray."""
    if health.node == here:
        _kill_pid(health.pid)
        return
    where = NodeAffinitySchedulingStrategy(node_id=health.node, soft=False)
    ray.remote(_kill_pid).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(health.pid)


def _kill_pid(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
