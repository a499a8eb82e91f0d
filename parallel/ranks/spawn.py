"""Starts all ranks on this machine, as torchrun does for one node, and says in one line what went wrong.

The launcher serves the rendezvous store: ranks whose launcher is gone notice that and end, and a failure can be read
from it after they have ended. Ranks are process groups of their own, so that Ctrl-C reaches the launcher alone, which
then lets them end in order.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from parallel.comm.store import StoreServer
from parallel.health.exit_codes import FAILED, INTERRUPTED
from parallel.health.failure import Failure, GangError, report_failure
from parallel.health.timeouts import POLL_SECONDS, RANKS_END_SECONDS
from parallel.mesh import Layout, Mesh
from parallel.ranks.environment import RankEnv, child_environment

_HOST = "127.0.0.1"


def run_ranks(command: Sequence[str], layout: Layout, *, threads: int | None = None) -> None:
    """Run a command once for each rank, and wait for all of them.

    Each process finds its env in its environment. `threads` are the CPU threads of each; None shares the cores evenly.

    Raises:
        GangError: a rank has failed; the text names it.
        KeyboardInterrupt: Ctrl-C; all ranks have ended.
    """
    with _started(command, layout, threads, first=0) as (server, ranks):
        try:
            _wait(ranks, server, layout)
        except (KeyboardInterrupt, SystemExit):
            report_failure(server.store, Failure(message="stopped", status=INTERRUPTED, reporter=-1))
            _wait_for_all(ranks)
            raise


@contextmanager
def worker_ranks(command: Sequence[str], layout: Layout, *, threads: int | None = None) -> Iterator[RankEnv]:
    """As `run_ranks`, but for rank 0, which this process is: yields its env. The other ranks end with the context."""
    with _started(command, layout, threads, first=1) as (server, ranks):
        yield replace(_env(0, layout, server), launcher_speaks=False, launched=False)
        _wait_for_all(ranks)


@contextmanager
def _started(
    command: Sequence[str], layout: Layout, threads: int | None, *, first: int
) -> Iterator[tuple[StoreServer, list[subprocess.Popen[bytes]]]]:
    """The ranks from `first` on and the server of their store, as long as the context."""
    server, ranks = StoreServer(_HOST), list[subprocess.Popen[bytes]]()
    try:
        for rank in range(first, layout.world_size):
            ranks.append(_start(command, _env(rank, layout, server), threads))
        yield server, ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        server.close()


def _env(rank: int, layout: Layout, server: StoreServer) -> RankEnv:
    at = server.address
    env = RankEnv(rank=rank, world_size=layout.world_size, local_rank=rank, host=at.host, port=at.port)
    env = replace(env, secret=at.secret, one_machine=True)
    return replace(env, launcher_serves=True, launcher_speaks=True, launched=True)


def _start(command: Sequence[str], env: RankEnv, threads: int | None) -> subprocess.Popen[bytes]:
    share = max(1, (os.cpu_count() or 1) // env.world_size) if threads is None else threads
    return subprocess.Popen(
        command,
        env=child_environment(env, threads=share),
        stdin=subprocess.DEVNULL,
        stdout=None if env.rank == 0 else subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait(ranks: list[subprocess.Popen[bytes]], server: StoreServer, layout: Layout) -> None:
    """Wait until all have ended well; a GangError if one has not."""
    while True:
        statuses = [process.poll() for process in ranks]
        bad = [(rank, status) for rank, status in enumerate(statuses) if status]
        if bad:
            break
        if None not in statuses:
            return
        time.sleep(POLL_SECONDS)
    # A rank that fails in order reports it before it ends. If this one has not, it could not, or was not there yet.
    rank, status = bad[0]
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    text = f"{Mesh(layout=layout, rank=rank).name(rank)} {how}"
    failure = report_failure(server.store, Failure(message=text, status=max(status, FAILED), reporter=rank))
    _wait_for_all(ranks)
    raise GangError(failure)


def _wait_for_all(ranks: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + RANKS_END_SECONDS
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
