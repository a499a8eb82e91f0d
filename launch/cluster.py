"""Videos on a Ray cluster: one gang for `generate --launcher ray`, several for `batch`.

The cluster is the one that this process belongs to, or one that is started on this machine and ends with it.
"""

import io
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import typer

from engine.files import part_of, remove_stale_parts
from launch.ending import CommandFailed, check_signals, deferred_signals, unwinding_signals
from launch.model.resolve import ModelPlan, layout_of
from launch.options import ray_address, threads_of_a_rank, together
from launch.plan import Plan
from models.errors import InputError
from parallel.cluster.config import ClusterSettings, RankTask
from parallel.cluster.controller import ClusterLost, Controller
from parallel.cluster.placement import GangShape, alive_nodes, cluster_has_gpus
from parallel.cluster.scheduler import GangSize
from parallel.health.exit_codes import FAILED
from parallel.health.processes import LocalProcess, descendants
from parallel.health.timeouts import (
    HEAD_SECONDS,
    JOIN_SECONDS,
    OWN_HEAD_SECONDS,
    POLL_SECONDS,
    RAY_ENDS_SECONDS,
    RAY_FILES_SECONDS,
    Timeouts,
)

_OBJECT_STORE = 512 * 2**20  # bytes for what Ray itself passes around; chunks do not go through it
_LONGEST_BASE = 16  # characters before a folder of Ray's: 107 are allowed for a socket's name
_ANSWER = 6.0  # seconds for a cluster to take a connection, and again to answer on it
# How a client begins to speak HTTP/2, as gRPC does: the preface, and empty settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
# By default Ray's workers give way to everything else, also to its own processes; here ranks come first. And it starts
# one for each CPU before anybody asks, of which ranks, with variables of their own, can use none.
_SYSTEM = {"worker_niceness": 0, "prestart_worker_first_driver": False}


@contextmanager
def on_ray(
    plans: Sequence[Plan],
    *,
    model: ModelPlan | None = None,  # that gangs are started with; None for that of the first plan
    gangs: int = 1,
    kv_bytes: int | None = None,
    max_restarts: int = 20,
    check: Callable[[], None] = check_signals,  # as of `Controller`
) -> Iterator[Controller]:
    """Join or start a cluster, and start gangs on it, no more than there are videos. All plans have one model.

    A rank has `kv_bytes` for keys and values; None is enough for as many of the largest video as are made at a time.
    What is printed to standard output within goes to a log, which is Ray's.

    Raises:
        InputError: there is no cluster, it is too small, or the memory is too small for a video.
        CommandFailed: the cluster is gone.
    """
    model, options, gangs = model or plans[0].model, plans[0].options, min(gangs, len(plans))
    layout, source = layout_of(options), replace(model.source, loader=model.source.loader.absolute())
    threads = threads_of_a_rank(options)
    task = RankTask(
        layout=layout,
        source=source,
        reuse=model.reuse,
        kv=model.kv,
        timeouts=Timeouts(),
        interface=options.interface,
        threads=threads,
    )
    with _ray_log(), ray_cluster(cpus=gangs * layout.world_size * threads) as head_wait:
        gpus = cluster_has_gpus()
        settings = ClusterSettings(
            gangs=gangs,
            shape=GangShape(layout=layout, gpus=gpus, cpus=threads),
            task=task,
            size=_gang_size(plans, kv_bytes, gpus=gpus),
            max_restarts=max_restarts,
            head_wait=head_wait,
        )
        try:
            with Controller(settings, check=check) as controller:
                yield controller
        except ClusterLost as error:
            raise CommandFailed(f"{error}: run the same command again", status=FAILED, shown_here=True) from None


def _gang_size(plans: Sequence[Plan], kv_bytes: int | None, *, gpus: bool) -> GangSize:
    """Slots and memory of a rank: without `kv_bytes` as much as is wanted, but not more than any machine has."""
    sizes = [plan.size for plan in plans]
    videos = together(plans[0].options, len(plans), ranks=True)
    largest = max(size.kv_bytes for size in sizes)
    if kv_bytes is not None and kv_bytes < largest:
        raise InputError(
            f"--kv-memory {kv_bytes} is too small: a video of this batch needs {largest} bytes on a rank; "
            "give more, or make it smaller with --kv-budget"
        )
    memory = videos * largest if kv_bytes is None else kv_bytes
    if ray_address() and not gpus:  # else the plans were checked against this machine, or nobody knows
        memory = min(memory, max(int(node.get("memory", memory)) for node in alive_nodes().values()))
    return GangSize(slots=videos * sizes[0].schedule.window, kv_bytes=memory)


# ---- the cluster


@contextmanager
def ray_cluster(*, cpus: int) -> Iterator[float]:
    """Join the cluster at `RAY_ADDRESS`, which is set within a Ray job; without that start one.

    A cluster that is started here ends with this process, leaves no files, and has `cpus` to give, whatever the machine
    has. Within, signals interrupt nothing, as Ray does not bear it: `check_signals` sees them.

    Yields:
        Seconds for which its head may not answer: another one's may be started again.

    Raises:
        InputError: there is no cluster at the address, which is known within 15 seconds.
    """
    address = ray_address()
    with unwinding_signals(), ExitStack() as stack:
        if address:
            _join(address, stack)
        else:
            stack.enter_context(_batch_policy())
            folder = stack.enter_context(_session_folder())
            stack.enter_context(deferred_signals())
            own: dict[str, Any] = {"include_dashboard": False, "_temp_dir": folder, "_system_config": _SYSTEM}
            own |= {"num_cpus": max(cpus, os.cpu_count() or 1), "object_store_memory": _OBJECT_STORE}
            _init(stack, address="local", **own)
            check_signals()
        yield HEAD_SECONDS if address else OWN_HEAD_SECONDS


def _join(address: str, stack: ExitStack) -> None:
    try:
        _knock(address)
        stack.enter_context(deferred_signals())
        _init(stack, address=address)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # a ConnectionError of Ray's is an OSError
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        raise InputError(f"cannot join the Ray cluster at {address}: {reason}") from None


def _init(stack: ExitStack, *, address: str, **own: Any) -> None:
    """Call Ray's `init`, and `shutdown` at the end, on a thread of its own: on the main thread it takes SIGTERM over.

    The thread lives on, as what Ray has started ends with it. A handler that Ray's core installs all the same, which
    ends the process with a dump of the stack, is undone.
    """
    begun, ends, others = Future[None](), threading.Event(), descendants(os.getpid())

    def work() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
            begun.set_result(None)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            begun.set_exception(error)
        ends.wait()

    stack.callback(ends.set)
    threading.Thread(target=work, name="ray", daemon=True).start()
    began = time.monotonic()
    main, handler = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGTERM)
    while True:
        running = wait([begun], timeout=0.05).not_done
        if main:
            signal.signal(signal.SIGTERM, handler)
        if not running:
            break
        if not own:  # nothing was started that would have to be ended
            check_signals()
            if time.monotonic() - began > JOIN_SECONDS:
                raise TimeoutError(f"it has not answered within {JOIN_SECONDS:.0f} s")
    stack.callback(partial(_end_own, others) if own else ray.shutdown)
    begun.result()


def _end_own(others: set[int]) -> None:
    """End a cluster and all processes that came with it; without its head some would look for that for a minute."""
    started = [LocalProcess(pid) for pid in descendants(os.getpid()) - others]
    ray.shutdown()
    deadline = time.monotonic() + RAY_ENDS_SECONDS
    while not all(process.gone for process in started) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for process in started:
        process.end()
        process.close()


@contextmanager
def _session_folder() -> Iterator[str]:
    """A folder for the files of a cluster that lives as long; those of killed processes are removed.

    Its sockets are in it, and the names of sockets must be short.
    """
    base = Path(tempfile.gettempdir())
    base = base if len(str(base)) <= _LONGEST_BASE else Path("/tmp")
    remove_stale_parts(base)
    folder = Path(tempfile.mkdtemp(prefix=".r", suffix=part_of(Path("r")).name.removeprefix(".r"), dir=base))
    try:
        yield str(folder)
    finally:
        deadline = time.monotonic() + RAY_FILES_SECONDS
        while folder.exists() and time.monotonic() < deadline:  # some of its processes are still ending
            shutil.rmtree(folder, ignore_errors=True)


class _RayLog(io.TextIOBase):
    """Takes what Ray prints, with colour codes and whenever it likes; the file is there once it has said something."""

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"flowcache-ray-{os.getpid()}.log"

    def write(self, text: str) -> int:
        """Add to the log."""
        with suppress(OSError), self.path.open("a") as file:
            file.write(text)
        return len(text)


@contextmanager
def _ray_log() -> Iterator[None]:
    """Standard output is for results; what Ray prints to it goes to a log, which is named if there is one."""
    log = _RayLog()
    try:
        with redirect_stdout(log):
            yield
    finally:
        if log.path.exists():
            typer.echo(f"what Ray said is in {log.path}", err=True)


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
