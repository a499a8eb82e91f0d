"""A Ray cluster of several nodes on this machine, whose nodes can be lost, and a list of all processes it has started.

A node is a raylet with its workers; all of them share the machine. Every process that comes from here has a mark in
its environment, which children inherit, so none can hide, whoever its parent is. Linux only: it reads /proc.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from models.errors import InputError

_PROC = Path("/proc")
_MARK = "FLOWCACHE_CHAOS"
_STORE = 80 * 2**20
"""Bytes of a node's object store; about as small as Ray allows, and some hundreds of chunks."""


@contextmanager
def marked() -> Iterator[str]:
    """Mark all processes that are started from here.

    Yields:
        The mark, as it stands in their environment.

    Raises:
        InputError: this is not Linux.
    """
    if not (_PROC / "self" / "environ").exists():
        raise InputError("this benchmark looks for processes in /proc: run it on Linux")
    token = secrets.token_hex(8)
    os.environ[_MARK] = token
    try:
        yield f"{_MARK}={token}"
    finally:
        del os.environ[_MARK]


def processes_of(mark: str) -> dict[int, str]:
    """Names of the processes with a mark, by number; those that have ended and are not collected do not count."""
    found = {}
    for place in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(place.name)] = words.strip()[:60]
    return found


class Ground:
    """The nodes. ChunkResult by `simulated_cluster`.

    Args:
        cluster: with a head that has no room for ranks.
        nodes: how many others there are.
        cpus: of each of those.
        mark: of all processes.
    """

    def __init__(self, cluster: Cluster, nodes: int, cpus: int, mark: str) -> None:
        self._cluster, self._nodes, self._cpus = cluster, nodes, cpus
        self.mark = mark

    @property
    def whole(self) -> bool:
        """No node is missing."""
        return len(self._cluster.worker_nodes) >= self._nodes

    def mend(self) -> None:
        """Add nodes in place of those that are lost. For the main thread alone: Ray ends a node with the thread that
        has started it."""
        while not self.whole:
            self._cluster.add_node(num_cpus=self._cpus, object_store_memory=_STORE)

    def hit(self, pids: Iterable[int], what: signal.Signals) -> int:
        """Send a signal to processes of this cluster, as far as they are there.

        Returns:
            How many have got it.
        """
        ours, count = processes_of(self.mark), 0
        for pid in pids:
            if pid in ours:
                with suppress(ProcessLookupError):
                    os.kill(pid, what)
                    count += 1
        return count

    def cut(self, node: str, pids: Iterable[int]) -> bool:
        """Lose a node at once with all that runs there, as when a machine loses power.

        Args:
            node: its id.
            pids: of the ranks there.

        Returns:
            Whether it was there.
        """
        sockets = {one["NodeID"]: one["RayletSocketName"] for one in ray.nodes() if one["Alive"]}
        for one in list(self._cluster.worker_nodes):
            if _socket(one) == sockets.get(node):
                self._cluster.remove_node(one, allow_graceful=False)
                self.hit(pids, signal.SIGKILL)
                return True
        return False

    def left(self, pids: Iterable[int], patience: float) -> dict[int, str]:
        """Processes of those numbers that do not go away in so many seconds."""
        return _wait(lambda: {pid: name for pid, name in processes_of(self.mark).items() if pid in set(pids)}, patience)


@contextmanager
def simulated_cluster(nodes: int, cpus: int, mark: str) -> Iterator[Ground]:
    """Start a cluster and join it; it ends with the context.

    Args:
        nodes: besides the head, where no ranks run.
        cpus: of each, as Ray counts them.
        mark: of all processes.
    """
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False},
    )
    try:
        ground = Ground(cluster, nodes, cpus, mark)
        ground.mend()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield ground
        finally:
            ray.shutdown()
    finally:
        cluster.shutdown()


def survivors(mark: str, patience: float) -> dict[int, str]:
    """Processes with a mark that do not go away in so many seconds."""
    return _wait(lambda: processes_of(mark), patience)


def _wait(look: Callable[[], dict[int, str]], patience: float) -> dict[int, str]:
    deadline = time.monotonic() + patience
    found = look()
    while found and time.monotonic() < deadline:
        time.sleep(0.2)
        found = look()
    return found


def _socket(node: Any) -> str:
    return str(node.raylet_socket_name)
