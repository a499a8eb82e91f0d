"""One gang as the controller sees it: placing and starting its ranks, polling them, ending and restarting them.

Nothing here waits, so that one controller keeps many gangs going. The ranks of one attempt meet at a store that the
controller serves, so the controller reads their heartbeats and reports there, and a report outlives the rank that wrote
it. After a failure all ranks are killed and new ones are started. Which videos the gang makes is the controller's
business.
"""

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from models.errors import InputError
from parallel.cluster.actor import RankActor
from parallel.cluster.config import ClusterSettings
from parallel.cluster.connection import Connection
from parallel.cluster.messages import Command, GangReady, RankStarted, SentByGang
from parallel.cluster.placement import Place, Placement, alive_nodes, kill_process, plan_strategies
from parallel.comm.sockets import Address, Stream, interface_address
from parallel.comm.store import StoreServer
from parallel.health import timeouts
from parallel.health.exit_codes import BAD_INPUT
from parallel.health.failure import Failure
from parallel.health.heartbeats import Heartbeats
from parallel.mesh import Mesh
from parallel.ranks.environment import RankEnv

_QUIET = 2  # attempts on a node that is gone before they count as losses


class GangBroken(Exception):  # noqa: N818 - reads as what it says
    """The gang has failed; its text is one line that says why. `unsure`: Ray has not decided whether a node is gone."""

    def __init__(self, message: str, *, unsure: bool = False) -> None:
        super().__init__(message)
        self.unsure = unsure


class GangState(StrEnum):
    """How far a gang is."""

    WAITING = "waiting for a node"
    PLACING = "waiting for room"
    STARTING = "starting"
    UP = "up"
    DOWN = "given up"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankView:
    """A rank at this moment."""

    rank: int
    pid: int | None  # its process; None while it is not known
    node: str  # id of its node
    doing: str  # in words; empty while it waits


@dataclass(frozen=True, kw_only=True, slots=True)
class GangView:
    """A gang at this moment."""

    gang: str
    state: GangState  # how far it is
    attempt: int  # how often it was started again
    ranks: tuple[RankView, ...]  # those that are running


class _Rank:
    """A rank of an attempt."""

    def __init__(self, place: Place, news: threading.Event) -> None:
        self.place, self._news = place, news
        self.connection = Connection(self._received, self.end)
        self.actor: Any = None
        self.run: Any = None  # Ray's reference to its one long call
        self.inbox: deque[Any] = deque()  # what it has sent
        self.pid: int | None = None
        self.gone_at: float | None = None  # when its connection has ended
        self.error: Exception | None = None  # why, if not because the rank has closed it or is gone

    def _received(self, message: Any) -> None:
        self.inbox.append(message)
        self._news.set()

    def end(self, error: Exception | None) -> None:
        """Its connection has ended."""
        self.error, self.gone_at = error, time.monotonic()
        self._news.set()


class Gang:
    """A gang. `strategy` is Ray's name for how to place it; `news` is set when a rank sends something or is gone."""

    def __init__(self, name: str, settings: ClusterSettings, strategy: str, news: threading.Event) -> None:
        self.name, self.attempt, self.state = name, 0, GangState.PLACING
        self.failed_starts = 0  # attempts in a row that ended before the gang was ready for work
        self._settings, self._news = settings, news
        self._mesh = Mesh(layout=settings.shape.layout, rank=0)
        self._placement: Placement | None = Placement(settings.shape, strategy)
        self._ranks: list[_Rank] = []
        self._server: StoreServer | None = None  # of this attempt
        self._heartbeats: Heartbeats | None = None
        self._wait_until = self._looked = self._began = self._ends_at = 0.0
        self._failed_at: float | None = None

    @property
    def ended(self) -> bool:
        """All ranks have ended, well or not."""
        runs = [rank.run for rank in self._ranks]
        return len(ray.wait(runs, num_returns=len(runs), timeout=0)[0]) == len(runs) if runs else True

    def view(self) -> GangView:
        """The gang at this moment. May be asked by any thread."""
        reader, ranks = self._heartbeats, tuple(self._ranks)
        heartbeats = {} if reader is None else reader.latest
        views = []
        for number, rank in enumerate(ranks):
            heartbeat = heartbeats.get(number)
            doing = heartbeat.doing if heartbeat is not None else "" if number in heartbeats else "starting"
            views.append(RankView(rank=number, pid=rank.pid, node=rank.place.node, doing=doing))
        return GangView(gang=self.name, state=self.state, attempt=self.attempt, ranks=tuple(views))

    def send(self, command: Command) -> None:
        """Send the leader a command; it is lost if there is no leader."""
        if self._ranks:
            self._ranks[0].connection.send(command)

    def poll(self) -> list[SentByGang]:
        """Go on with starting; returns what the leader has sent."""
        if self.state is GangState.WAITING:
            self._look_for_nodes()
        if self.state is GangState.PLACING:
            self._place()
        events = self._receive()
        if any(isinstance(event, GangReady) for event in events):
            self.state, self.failed_starts = GangState.UP, 0
        return events

    def check(self) -> None:
        """Find out whether the gang has failed; to be asked when all that was received is handled.

        Raises:
            GangBroken: a rank is gone, hangs, or has reported a failure; call `stop`.
            InputError: with what they were given the ranks cannot start, or not go on: there is no room on a disk.
        """
        try:
            if self._ranks:
                self._check()
        except GangBroken as error:
            if not self._retries_quietly(error):
                raise

    def stop(self, *, head: bool = True) -> None:
        """Kill all ranks at once, also those that hang or are stopped; without Ray's `head` those of this machine."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.connection.close()
            if rank.pid is not None:
                kill_process(rank.pid, rank.place.node, here=not head)
            if rank.actor is not None:
                ray.kill(rank.actor, no_restart=True)
        if self._heartbeats is not None:
            self._heartbeats.close(timeouts.READER_ENDS_SECONDS)
        if self._server is not None:
            self._server.close()
        self._heartbeats = self._server = self._failed_at = None

    def restart(self) -> None:
        """Start again after `stop`: in the same place, or elsewhere if a node is gone."""
        self.attempt += 1
        self.state, self._looked = GangState.WAITING, 0.0

    def give_up(self, *, head: bool = True) -> None:
        """Do not start again; what it has reserved is free, if there is Ray's `head` to know of it."""
        self.stop(head=head)
        self.state = GangState.DOWN
        if head:
            self._release()

    # ---- placing and starting

    def _look_for_nodes(self) -> None:
        """Go on in the old place if its nodes are up, else look for a new one."""
        now = time.monotonic()
        if now - self._looked < timeouts.NODES_SECONDS:
            return
        self._looked = now
        nodes = alive_nodes()
        if self._placement is not None and self._placement.intact(list(nodes)):
            if now >= self._wait_until:
                self.state = GangState.PLACING
            return
        self._release()
        with suppress(InputError):  # the nodes that are left do not suffice: others may come
            [strategy] = plan_strategies(nodes, self._settings.shape, 1)
            self._placement = Placement(self._settings.shape, strategy)
            self.state = GangState.PLACING

    def _place(self) -> None:
        """Start the ranks as soon as their places are reserved."""
        now = time.monotonic()
        if self._placement is None or now - self._looked < timeouts.PLACES_SECONDS:
            return
        self._looked = now
        places = self._placement.places()
        if places is None:
            return
        interface = self._settings.task.interface
        host = ray.util.get_node_ip_address() if interface is None else interface_address(interface)
        self._server = StoreServer(host, opened=self._opened)
        self._began, self.state = now, GangState.STARTING
        self._heartbeats = Heartbeats(self._server.store, self._mesh, self._settings.task.timeouts)
        self._heartbeats.start()
        self._ranks = [_Rank(place, self._news) for place in places]
        for number, rank in enumerate(self._ranks):
            self._start(self._env(number, rank.place, self._server.address), rank)

    def _env(self, rank: int, place: Place, at: Address) -> RankEnv:
        world, nodes = self._mesh.layout.world_size, {rank.place.node for rank in self._ranks}
        env = RankEnv(rank=rank, world_size=world, local_rank=place.local_rank, host=at.host, port=at.port)
        env = replace(env, secret=at.secret, one_machine=len(nodes) == 1, attempt=self.attempt)
        return replace(env, launcher_serves=True, launcher_speaks=True)

    def _opened(self, rank: int, stream: Stream) -> None:
        """A rank has connected, in a thread of its own."""
        ranks = self._ranks
        if 0 <= rank < len(ranks):
            ranks[rank].connection.open(stream)
        else:
            stream.end()

    def _start(self, env: RankEnv, rank: _Rank) -> None:
        assert self._placement is not None
        shape, task = self._settings.shape, self._settings.task
        # Ray sets as many threads as a rank reserves CPUs, and hides the other GPUs; torchrun does neither.
        variables = {"OMP_NUM_THREADS": str(task.threads), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        remote: Any = ray.remote(max_restarts=0, max_task_retries=0)(RankActor)
        rank.actor = remote.options(
            num_cpus=shape.cpus,
            num_gpus=1 if shape.gpus else 0,
            scheduling_strategy=self._placement.at(rank.place),
            runtime_env={"env_vars": variables},
        ).remote()
        rank.run = rank.actor.run.remote(env, task)

    def _release(self) -> None:
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    # ---- polling

    def _receive(self) -> list[SentByGang]:
        events: list[SentByGang] = []
        for rank in self._ranks:
            for message in [rank.inbox.popleft() for _ in range(len(rank.inbox))]:
                if isinstance(message, RankStarted):
                    rank.pid = message.pid
                else:
                    events += message
        return events

    def _retries_quietly(self, error: GangBroken) -> bool:
        """Whether an attempt to start has failed on a node that is gone already, so that nothing is lost but it."""
        self._wait_until = time.monotonic() + timeouts.RAY_DECIDES_SECONDS if error.unsure else 0.0
        starting = self.state is GangState.STARTING
        self.failed_starts += starting
        quietly = starting and error.unsure and self.failed_starts <= _QUIET
        if quietly:
            self.stop()
            self.state = GangState.WAITING
        return quietly

    def _check(self) -> None:
        now, limits = time.monotonic(), self._settings.task.timeouts
        if self.state is GangState.STARTING and now - self._began > limits.first:
            raise GangBroken(f"its ranks have not met within {limits.first:.0f} s")
        if now - self._ends_at >= timeouts.ENDS_SECONDS:
            self._ends_at = now
            self._check_ends()
        for number, rank in enumerate(self._ranks):
            if rank.error is not None:
                raise GangBroken(f"{self._mesh.name(number)}: its connection: {rank.error}")
        assert self._heartbeats is not None
        if (failure := self._heartbeats.failure) is not None:
            # The ranks end by themselves and say so: messages that they sent before are received first.
            self._failed_at = self._failed_at or now
            if now - self._failed_at > 2 * limits.grace:
                raise _error(failure)
        elif (found := self._heartbeats.diagnosis) is not None:
            raise GangBroken(found.message)

    def _check_ends(self) -> None:
        """No rank ends before the leader ends the session."""
        now = time.monotonic()
        runs = {rank.run: number for number, rank in enumerate(self._ranks)}
        ready, _ = ray.wait(list(runs), num_returns=len(runs), timeout=0)
        dead: list[GangBroken | InputError] = []
        for run in ready:
            try:
                failure: Failure | None = ray.get(run, timeout=timeouts.RAY_ANSWER_SECONDS)
            except RayError as error:
                dead.append(self._died(runs[run], error))
                continue
            if failure is not None:
                raise _error(failure)
        if dead:
            raise dead[0]
        for number, rank in enumerate(self._ranks):
            if (
                rank.gone_at is not None
                and rank.run not in ready
                and now - rank.gone_at > timeouts.RAY_EXPLAINS_SECONDS
            ):
                raise GangBroken(f"{self._mesh.name(number)} has closed its connection")

    def _died(self, number: int, error: Exception) -> GangBroken | InputError:
        """Why a rank has died: what the ranks have reported, if anything."""
        name, rank = self._mesh.name(number), self._ranks[number]
        if isinstance(error, OutOfMemoryError):
            return GangBroken(f"{name} was ended by Ray, as its node has run out of memory")
        if isinstance(error, RayTaskError):
            return GangBroken(f"{name}: {error.cause}")
        assert self._heartbeats is not None
        if self._heartbeats.failure is not None:
            return _error(self._heartbeats.failure)
        never_seen = isinstance(error, RayActorError) and rank.pid is None
        return GangBroken(f"{name} has died", unsure=isinstance(error, ActorUnavailableError) or never_seen)


def _error(failure: Failure) -> GangBroken | InputError:
    """Bad input, a full disk among it, would end new ranks in the same way."""
    return InputError(failure.message) if failure.status == BAD_INPUT else GangBroken(failure.message)
