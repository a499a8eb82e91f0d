"""Joining the Ray cluster that this process belongs to, or starting one on this machine that ends with it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray
import torch

from models.errors import InputError

_OBJECT_STORE = 512 * 2**20
"""Bytes for what Ray itself passes around; chunks do not go through it."""
_ANSWER = 6.0
"""Seconds for a cluster to take a connection, and again to answer on it."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client begins to speak HTTP/2, as gRPC does: the preface, and empty settings."""
_SYSTEM = {"worker_niceness": 0}
"""By default Ray's workers give way to everything else, also to its own processes; here ranks come first."""


@contextmanager
def ray_cluster(*, cpus: int, address: str | None = None) -> Iterator[None]:
    """Join or start a cluster.

    Args:
        cpus: that the ranks ask for; a cluster that is started here has so many to give, whatever the machine has.
        address: of a cluster; by default what `RAY_ADDRESS` says, which is set within a Ray job. Without either one
            is started here, and it ends with this process.

    Raises:
        InputError: there is no cluster at the address, which is known within 15 seconds.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with nullcontext() if address else _batch_policy():
        if address:
            _join(address)
        else:
            _start(cpus)
        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:  # a ConnectionError of Ray's is an OSError
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        raise InputError(f"cannot join the Ray cluster at {address}: {reason}") from None


def _knock(address: str) -> None:
    """Find out whether anybody answers at a cluster's address: Ray would wait for minutes.

    Raises:
        OSError: nobody does.
        ValueError: the port is no number.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return  # a name that Ray resolves, such as `auto`; or an encrypted connection
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as probe:
        probe.settimeout(_ANSWER)
        try:
            probe.sendall(_PREFACE)
            answer = probe.recv(9)
        except TimeoutError:
            raise TimeoutError(f"it takes connections, but has not answered within {_ANSWER:.0f} s") from None
        if answer[3:4] != b"\x04":  # every HTTP/2 server begins with its settings
            raise ConnectionError("what answers there is no Ray cluster")


def _start(cpus: int) -> None:
    ray.init(
        address="local",
        num_cpus=max(cpus, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config=_SYSTEM,
    )


@contextmanager
def _batch_policy() -> Iterator[None]:
    """Threads and processes that are started within do not interrupt one that computes.

    Ray's processes wake hundreds of times a second for next to nothing, and a rank that is interrupted on a CPU finds
    its caches emptied. Linux' policy for batch work makes a process that wakes wait for some milliseconds; children
    inherit it. Ranks on GPUs use little of the CPU, but have to answer at once.
    """
    if sys.platform != "linux" or torch.cuda.is_available() or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
