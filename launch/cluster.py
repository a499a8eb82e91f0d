"""Videos on a Ray cluster: one gang for `generate --launcher ray`, several for `batch`.

The cluster is the one that this process belongs to, or one that is started on this machine and ends with it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import ray
import torch

from launch.options import together
from launch.plan import Plan, layout_of
from models.errors import InputError
from parallel.cluster.config import ClusterSettings, RankTask
from parallel.cluster.controller import Controller
from parallel.cluster.placement import GangShape, cluster_has_gpus
from parallel.cluster.scheduler import GangSize
from parallel.health.timeouts import Timeouts

_OBJECT_STORE = 512 * 2**20  # bytes for what Ray itself passes around; chunks do not go through it
_ANSWER = 6.0  # seconds for a cluster to take a connection, and again to answer on it
# How a client begins to speak HTTP/2, as gRPC does: the preface, and empty settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
# By default Ray's workers give way to everything else, also to its own processes; here ranks come first.
_SYSTEM = {"worker_niceness": 0}


@contextmanager
def on_ray(
    plans: Sequence[Plan], *, gangs: int = 1, kv_bytes: int | None = None, max_restarts: int = 20
) -> Iterator[Controller]:
    """Join or start a cluster, and start gangs on it, no more than there are videos. All plans have one model.

    A rank has `kv_bytes` for keys and values; None is enough for as many of the largest video as are made at a time.

    Raises:
        InputError: there is no cluster, it is too small, or the memory is too small for a video.
    """
    model, options, gangs = plans[0].model, plans[0].options, min(gangs, len(plans))
    layout, source, weights = layout_of(options), model.source, model.source.weights
    source = replace(source, weights=None if weights is None else weights.absolute())
    timeouts, threads = Timeouts(), options.threads
    cpus = threads or 1  # that a rank reserves; without --threads ranks share the cores of their node
    with ray_cluster(cpus=gangs * layout.world_size * cpus):
        settings = ClusterSettings(
            gangs=gangs,
            shape=GangShape(layout=layout, gpus=cluster_has_gpus(), cpus=cpus),
            task=RankTask(
                layout=layout,
                source=source,
                reuse=model.reuse,
                kv=model.kv,
                timeouts=timeouts,
                interface=options.interface,
                threads=threads,
            ),
            size=_gang_size(plans, kv_bytes),
            max_restarts=max_restarts,
        )
        with Controller(settings) as controller:
            yield controller


def _gang_size(plans: Sequence[Plan], kv_bytes: int | None) -> GangSize:
    sizes = [plan.size for plan in plans]
    videos = together(plans[0].options, len(plans), ranks=True)
    largest = max(size.kv_bytes for size in sizes)
    memory = videos * largest if kv_bytes is None else kv_bytes
    if memory < largest:
        raise InputError(
            f"--kv-memory {memory} is too small: a video of this batch needs {largest} bytes on a rank; "
            "give more, or make it smaller with --kv-budget"
        )
    return GangSize(slots=videos * sizes[0].schedule.window, kv_bytes=memory)


# ---- the cluster


@contextmanager
def ray_cluster(*, cpus: int, address: str | None = None) -> Iterator[None]:
    """Join the cluster at the address, or at `RAY_ADDRESS`, which is set within a Ray job; without either start one.

    A cluster that is started here ends with this process, and has `cpus` to give, whatever the machine has.

    Raises:
        InputError: there is no cluster at the address, which is known within 15 seconds.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with nullcontext() if address else _batch_policy():
        if address:
            _join(address)
        else:
            ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _system_config=_SYSTEM,
            )
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
    """Raise if nobody answers at a cluster's address, for which Ray would wait for minutes."""
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
