"""Joining the Ray cluster that this process belongs to, or starting one on this machine for the time being."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray
import torch

from models.errors import InputError

_OBJECT_STORE = 512 * 2**20
"""Bytes for chunks on their way from the ranks to here; nothing else goes through it."""
_SYSTEM = {"worker_niceness": 0}
"""Ray makes its workers give way to everything else, also to its own upkeep; ranks are what the machine is for."""


@contextmanager
def ray_cluster(*, cpus: int, address: str | None = None) -> Iterator[None]:
    """Be part of a cluster.

    Args:
        cpus: that the ranks ask for; a cluster that is started here has so many to give, whatever the machine has.
        address: of a cluster; by default what `RAY_ADDRESS` says, which is set within a Ray job. Without either one
            is started here, and it ends with this process.

    Raises:
        InputError: there is no cluster at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with nullcontext() if address else _calmly():
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
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot join the Ray cluster at {address}: {reason}") from None


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
def _calmly() -> Iterator[None]:
    """Threads and processes that are started within do not break in on one that computes.

    Ray's processes wake hundreds of times a second for next to nothing, and a rank that is interrupted on a CPU finds
    the caches emptied. Linux' policy for batch work makes whoever wakes wait for some milliseconds; it is inherited.
    Ranks on GPUs use little of the CPU, but have to answer at once.
    """
    if sys.platform != "linux" or torch.cuda.is_available() or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
