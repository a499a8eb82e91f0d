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

from models.errors import InputError
from parallel.cluster.actor import Health, RankEnd, RankTask, actor_class
from parallel.cluster.connection import Exchange, Peer
from parallel.cluster.messages import AskHealth, ChunkMade, ChunksHeard, Command, GangEvent, GangReady
from parallel.cluster.placement import GangShape, Place, Placement
from parallel.health.errors import BAD_INPUT, ErrorStore
from parallel.ranks.environment import RankEnv
from parallel.topology.mesh import Mesh

_HEALTH_EVERY, _ENDS_EVERY = 2.0, 0.5
_GET = 30.0
_UNEXPLAINED = 10.0
"""Seconds until Ray says why a rank that has hung up is gone."""
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
    """A rank as the driver sees it."""

    rank: int
    pid: int | None  # its process; None while it is not known
    node: str  # id of its node
    doing: str  # in words
    age: float  # seconds for which it has been at it


@dataclass(slots=True)
class _Rank:
    actor: Any
    run: Any
    place: Place
    peer: Peer
    asked: bool = False
    asked_at: float = 0.0
    gone_at: float | None = None
    health: Health | None = None


class RankActors:
    """The ranks of one attempt. The driver serves the store where they meet, so what they report outlives them.

    Args:
        shape: what each needs.
        task: what each is told.
        placement: where there is room.
        places: of the ranks, in order.
        attempt: how often the gang was started before.
        exchange: where ranks call.
    """

    def __init__(
        self,
        shape: GangShape,
        task: RankTask,
        placement: Placement,
        places: Sequence[Place],
        attempt: int,
        exchange: Exchange,
    ) -> None:
        self._task, self._attempt, self._exchange = task, attempt, exchange
        self._mesh = Mesh(layout=shape.layout, rank=0)
        self._host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        self._began = time.monotonic()
        self._ends_at = 0.0
        self._up = False
        self._ranks = [self._start(shape, placement, places, rank) for rank in range(len(places))]

    def tell(self, command: Command) -> None:
        """Tell the lead something; it is lost if the lead is."""
        self._ranks[0].peer.send(command)

    @property
    def calm(self) -> bool:
        """Nothing is to be looked at but what comes."""
        return self._up and not any(rank.peer.gone for rank in self._ranks)

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

    def poll(self) -> list[GangEvent]:
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
            rank.peer.close()
            if rank.health is not None:
                _kill(rank.health, here)
            ray.kill(rank.actor, no_restart=True)

    def _start(self, shape: GangShape, placement: Placement, places: Sequence[Place], rank: int) -> _Rank:
        place, threads = places[rank], str(self._task.threads)
        env = RankEnv(
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
        peer, call = self._exchange.expect()
        return _Rank(actor=actor, run=actor.run.remote(env, self._task, call), place=place, peer=peer)

    def _listen(self) -> list[GangEvent]:
        events: list[GangEvent] = []
        now = time.monotonic()
        for rank in self._ranks:
            if rank.peer.gone and rank.gone_at is None:
                rank.gone_at = now
            for message in rank.peer.take():
                if isinstance(message, Health):
                    rank.health, rank.asked, rank.asked_at = message, False, now
                else:
                    events += message
        if chunks := sum(isinstance(event, ChunkMade) for event in events):
            self.tell(ChunksHeard(count=chunks))
        return events

    def _check_ends(self) -> None:
        """No rank ends before it is told to."""
        now = time.monotonic()
        if self.calm and now - self._ends_at < _ENDS_EVERY:
            return
        self._ends_at = now
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
        for number, rank in enumerate(self._ranks):
            if rank.gone_at is not None and rank.run not in ready and now - rank.gone_at > _UNEXPLAINED:
                raise GangBroken(f"{self._mesh.name(number)} has hung up")

    def _check_health(self) -> None:
        """Every rank answers, and comes on. The ranks watch each other too, and know more; they go first."""
        now, limits = time.monotonic(), self._task.timeouts
        starting = not self._up
        if starting and now - self._began > limits.first:
            raise GangBroken(f"its ranks have not met within {limits.first:.0f} s")
        for number, rank in enumerate(self._ranks):
            name = self._mesh.name(number)
            if rank.asked:
                if now - rank.asked_at > limits.silent + 2 * limits.grace:
                    raise GangBroken(f"{name} has not answered for {now - rank.asked_at:.0f} s")
            elif rank.peer.here and now - rank.asked_at >= _HEALTH_EVERY:
                rank.peer.send(AskHealth())
                rank.asked, rank.asked_at = True, now
            if (health := rank.health) is not None:
                limit = (limits.first if starting or health.first else limits.step) + 2 * limits.grace
                if health.age > limit:
                    raise GangBroken(f"{name} has not come on for {health.age:.0f} s at {health.doing}")

    def _broken(self, rank: int, error: Exception) -> GangBroken:
        """What to say of a rank that does not answer any more: what the ranks have reported, if they have."""
        if isinstance(error, RayTaskError):
            return GangBroken(f"{self._mesh.name(rank)}: {error.cause}")
        with suppress(RuntimeError):
            board = ErrorStore(dist.PrefixStore(f"flowcache/{self._attempt}", self._store))
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
