"""Faults: which are caused when, by seed, the thread that causes them, and the nodes and processes that they hit.

A node is a raylet with its workers on this machine. Every process that is started from here has a mark in its
environment, which children inherit, so none can hide, whoever its parent is. Linux only: it reads /proc.

A fault waits until all gangs that were hit before work again, and then for a while; some do not wait. Loss of a node
goes on until it is replaced, which the main thread does.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from benchmarks.chaos.account import Account, Fault
from models.errors import InputError
from parallel.cluster.gang import GangState, GangView

_PROC = Path("/proc")
MARK = "FLOWCACHE_CHAOS"
"""The variable that marks processes; see `marked`."""
_STORE = 80 * 2**20  # bytes of a node's object store; about as small as Ray allows, and some hundreds of chunks
_NODE_SHARE, _STOP_SHARE, _HASTY_SHARE = 0.15, 0.25, 0.2
_WAIT, _HASTE = (0.3, 2.5), (0.1, 1.0)
_POLL, _PATIENCE = 0.05, 120.0


class Kind(StrEnum):
    """What fails."""

    RANK = "rank"
    GANG = "gang"
    NODE = "node"
    DRIVER = "driver"
    PART = "part"
    CHECKPOINT = "checkpoint"
    DISK = "disk"
    GCS = "gcs"
    GENERATE = "generate"
    SERVICE = "service"
    SERVICE_RANK = "service-rank"


GANG_KINDS = (Kind.RANK, Kind.GANG, Kind.NODE)
"""Those that a gang is hit by."""
KILL_KINDS = (Kind.GENERATE, Kind.SERVICE, Kind.SERVICE_RANK)
"""Those of `benchmarks.chaos.kills`; all others are of `benchmarks.chaos.batch`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFault:
    """A fault to come."""

    kind: Kind  # what fails
    how: signal.Signals  # SIGKILL or SIGSTOP; a node is cut off in any case
    wait: float  # seconds, once its turn has come
    hasty: bool  # its turn comes while others are not yet made good
    tie_break: float  # picks its target, 0 to 1


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Kinds by name, with commas between."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in list(Kind):
            raise InputError(f"--kinds {text}: {name!r} cannot fail here; choose from {', '.join(Kind)}")
    return tuple(kind for kind in Kind if kind in names)


def plan_faults(count: int, kinds: Sequence[Kind], seed: int) -> list[PlannedFault]:
    """Faults in order. The same for the same arguments.

    Few of them are losses of nodes, which Ray takes a quarter of a minute to believe; of the others a quarter stops
    processes in place of ending them. A fifth does not wait; never the first, nor two in a row.
    """
    draw = random.Random(seed)
    nodes = count if list(kinds) == [Kind.NODE] else 0
    if Kind.NODE in kinds and not nodes:
        nodes = min(count - 1, max(1, round(_NODE_SHARE * count)))
    others = [kind for kind in kinds if kind is not Kind.NODE]
    whats = [Kind.NODE] * nodes + [others[index % len(others)] for index in range(count - nodes)]
    stops = max(round(_STOP_SHARE * (count - nodes)), int(count - nodes > 1))
    hows = [signal.SIGKILL] * nodes + [signal.SIGSTOP] * stops + [signal.SIGKILL] * (count - nodes - stops)
    pairs = list(zip(whats, hows, strict=True))
    draw.shuffle(pairs)
    hasty = _apart(draw, count, round(_HASTY_SHARE * count))
    return [
        PlannedFault(
            kind=kind,
            how=how,
            wait=draw.uniform(*(_HASTE if index in hasty else _WAIT)),
            hasty=index in hasty,
            tie_break=draw.random(),
        )
        for index, (kind, how) in enumerate(pairs)
    ]


def _apart(draw: random.Random, count: int, wanted: int) -> set[int]:
    """Numbers from 1 below a count, no two in a row; as many as are wanted where there is room."""
    chosen: set[int] = set()
    for index in draw.sample(range(1, count), max(0, count - 1)):
        if len(chosen) < wanted and not {index - 1, index + 1} & chosen:
            chosen.add(index)
    return chosen


class Injector:
    """Causes failures in a thread of its own, which ends with this context. `clock` is that of the account."""

    def __init__(
        self, plan: Sequence[PlannedFault], nodes: Nodes, account: Account, clock: Callable[[], float]
    ) -> None:
        self._plan, self._nodes, self._account, self._clock = plan, nodes, account, clock
        self.faults: list[Fault] = []
        """Those so far."""
        self.pids: set[int] = set()
        """Of all ranks that were ever seen."""
        self._views: tuple[GangView, ...] = ()
        self._stop, self._finished = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="injector", daemon=True)

    def __enter__(self) -> Injector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def finished(self) -> bool:
        """No more will be caused, and what was hit is made good or will not be."""
        return self._finished.is_set()

    def update(self, views: Sequence[GangView]) -> None:
        """The gangs at this moment; called often, since the controller's own thread alone may ask for them."""
        self._views = tuple(views)
        self.pids |= {rank.pid for view in views for rank in view.ranks if rank.pid is not None}

    def _run(self) -> None:
        try:
            for planned in self._plan:
                if not planned.hasty and not self._until(self._all_good):
                    return
                if self._stop.wait(planned.wait):
                    return
                self._until(partial(self._cause, planned))
            self._until(self._all_good)
        finally:
            self._finished.set()

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Wait for something, with patience; False when there is no point in going on."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if self._stop.wait(_POLL):
                return False
            if time.monotonic() > deadline:
                return True
        return True

    def _all_good(self) -> bool:
        """Every gang that was ever hit was lost and works again, and all nodes are there."""
        last = {gang: fault.seconds for fault in self.faults for gang in fault.gangs}
        return self._nodes.whole and all(self._account.good_again(gang, since) for gang, since in last.items())

    def _cause(self, planned: PlannedFault) -> bool:
        """Hit a gang; False if none can be hit now."""
        views = [view for view in self._views if view.ranks and all(rank.pid for rank in view.ranks)]
        if not planned.hasty:
            views = [view for view in views if view.state is GangState.UP and view.gang in self._account.working]
        if not views or (planned.kind is Kind.NODE and not self._nodes.whole):
            return False
        place = planned.tie_break * len(views)
        view, tie_break, seconds = views[int(place)], place % 1, self._clock()
        gangs: tuple[str, ...] = (view.gang,)
        if planned.kind is Kind.NODE:
            gangs = self._cut(view, tie_break)
            how, target = "cut off", f"the node of {', '.join(gangs)}"
        else:
            ranks, how, target = list(view.ranks), planned.how.name, view.gang
            if planned.kind is Kind.RANK:
                ranks = [ranks[int(tie_break * len(ranks))]]
                target = f"{view.gang} rank {ranks[0].rank}"
            if not self._nodes.hit([rank.pid for rank in ranks if rank.pid is not None], planned.how):
                return False
        if not gangs:
            return False
        number, kind = len(self.faults) + 1, planned.kind
        fault = Fault(
            number=number, seconds=seconds, kind=kind, how=how, target=target, gangs=gangs, hasty=planned.hasty
        )
        self.faults.append(fault)
        return True

    def _cut(self, view: GangView, tie_break: float) -> tuple[str, ...]:
        """Cut off the node of one of a gang's ranks; the gangs that had ranks there, none if it was gone."""
        node = view.ranks[int(tie_break * len(view.ranks))].node
        there = [(one.gang, rank.pid) for one in self._views for rank in one.ranks if rank.node == node]
        if not self._nodes.cut(node, [pid for _, pid in there if pid is not None]):
            return ()
        return tuple(sorted({gang for gang, _ in there}))


@contextmanager
def marked() -> Iterator[str]:
    """Mark all processes that are started from here; hands out the mark as it stands in their environment."""
    if not (_PROC / "self" / "environ").exists():
        raise InputError("this benchmark looks for processes in /proc: run it on Linux")
    token = secrets.token_hex(8)
    os.environ[MARK] = token
    try:
        yield f"{MARK}={token}"
    finally:
        del os.environ[MARK]


def processes_of(mark: str) -> dict[int, str]:
    """Names of the processes with a mark, by number; those that have ended and are not collected do not count."""
    found = {}
    for place in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(place.name)] = words.strip()[:60]
    return found


def survivors(mark: str, patience: float, pids: Iterable[int] | None = None) -> dict[int, str]:
    """Processes with a mark that do not go away in so many seconds; of some numbers alone, if they are given."""
    deadline, wanted = time.monotonic() + patience, None if pids is None else set(pids)
    while True:
        found = {pid: name for pid, name in processes_of(mark).items() if wanted is None or pid in wanted}
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.2)


class Nodes:
    """Nodes of a Ray cluster that can be lost, beside a head that has no room for ranks; see `simulated_cluster`."""

    def __init__(self, cluster: Cluster, count: int, cpus: int, mark: str) -> None:
        self._cluster, self._count, self._cpus, self._mark = cluster, count, cpus, mark

    @property
    def whole(self) -> bool:
        """No node is missing."""
        return len(self._cluster.worker_nodes) >= self._count

    def mend(self) -> None:
        """Add nodes in place of those that are lost.

        For the main thread alone: Ray ends a node with the thread that has started it.
        """
        while not self.whole:
            self._cluster.add_node(num_cpus=self._cpus, object_store_memory=_STORE)

    def hit(self, pids: Iterable[int], what: signal.Signals) -> int:
        """Send a signal to processes of this cluster, as far as they are there; how many have got it."""
        ours, count = processes_of(self._mark), 0
        for pid in pids:
            if pid in ours:
                with suppress(ProcessLookupError):
                    os.kill(pid, what)
                    count += 1
        return count

    def cut(self, node: str, pids: Iterable[int]) -> bool:
        """Lose a node at once with the ranks that run there, as when a machine loses power; whether it was there."""
        sockets = {one["NodeID"]: one["RayletSocketName"] for one in ray.nodes() if one["Alive"]}
        for one in list(self._cluster.worker_nodes):
            if str(one.raylet_socket_name) == sockets.get(node):
                self._cluster.remove_node(one, allow_graceful=False)
                self.hit(pids, signal.SIGKILL)
                return True
        return False


@contextmanager
def simulated_cluster(count: int, cpus: int, mark: str) -> Iterator[Nodes]:
    """Start a cluster and join it; it ends with the context. Nodes and their cpus do not count the head."""
    head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = Nodes(cluster, count, cpus, mark)
        nodes.mend()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield nodes
        finally:
            ray.shutdown()
    finally:
        cluster.shutdown()
