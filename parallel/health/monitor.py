"""Each rank watches all others: it sends a heartbeat twice a second and reads those of all ranks.

A rank that finds another one dead or hanging reports it to the rendezvous store. The first report holds, and all ranks
stop with its message. With the default `Timeouts`, that takes

- a second, if a rank has failed by itself (bad input, an exception, reuse flags that differ), or if its process has
  ended and ran on this machine or was connected to this rank; otherwise as long as for a stopped rank,
- 20 s (`silent`), if a rank is stopped, its machine is lost, or the store does not answer,
- 180 s (`step`), if a rank is stuck in one item; 900 s (`first`), if in loading or in one of its first items,
- 180 s (`step`), if the leader waits for results on which no rank works,
- a second, if the launcher has gone; after a launcher's SIGTERM `grace`, unless something else is found by then,

and up to 3 s more (`grace`; twice that on the rank that serves the store) for ranks that cannot unwind: their process
is ended. A stopped rank cannot read the failure; the ranks on its machine end its process before they end themselves.
Only time in which this rank could look counts, so neither a suspended machine nor a starved rank blames others.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch.distributed import Store

from engine.machine import this_machine
from parallel.health.exit_codes import FAILED
from parallel.health.failure import Failure, GangError
from parallel.health.hang_detector import Heartbeat
from parallel.health.heartbeats import Heartbeats
from parallel.health.processes import LocalProcess, WakeupPipe
from parallel.health.timeouts import POLL_SECONDS, Timeouts
from parallel.mesh import Mesh
from parallel.ranks.environment import RankEnv

_FIRST_ITEMS = 4  # that may take `first`
_DISCONNECTED = (  # parts of the messages of gloo and NCCL
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exited",
)


class Monitor:
    """Watches in a thread of its own, which waits for no other rank. The connection to the store is its own."""

    def __init__(self, store: Store, mesh: Mesh, timeouts: Timeouts, env: RankEnv) -> None:
        self._mesh, self._timeouts, self._env = mesh, timeouts, env
        self._name = mesh.name(mesh.rank)
        self._speaks = not env.launcher_speaks
        self._server = None if env.launcher_serves else 0  # the rank that serves the store
        self._parent = os.getppid() if env.launched else None
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self.doing = self._last = "starting"  # this rank's present task, in words, or empty; and its last one
        self._items = self._beats = 0
        self._machine = this_machine()
        self._processes: dict[int, LocalProcess] = {}  # of the other ranks on this machine
        self._gone: dict[int, int] = {}  # ranks whose process has ended, and the round in which that was seen
        self._rounds, self._unread = 0, 0.0  # heartbeats read, and seconds since
        self._store_lost = False
        self._terminating: float | None = None  # seconds since SIGTERM
        self._failed, self._stopped = threading.Event(), threading.Event()
        self._pipe = WakeupPipe()
        self._heartbeats = Heartbeats(store, mesh, timeouts, beat=self._beat, on_round=self._pipe.notify)
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Start to watch."""
        self._heartbeats.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop to watch: this rank is done, and the others expect no more heartbeats of it."""
        self._stopped.set()
        self._pipe.notify()
        self._leave()
        self._close()

    def hand_over(self) -> None:
        """Stop to watch after a failure: the caller shows it.

        A process that a launcher has started for its rank has `grace` from now to end by itself. Any other process may
        go on.
        """
        self._failed_at = time.monotonic()
        self._leave()
        self._failed_at, self._speaks = time.monotonic(), False
        if not self._env.launched:
            self._stopped.set()
            self._pipe.notify()
            self._close()

    @contextmanager
    def expecting(self, results: int) -> Iterator[None]:
        """While this rank does nothing but wait for so many results: a gang that hangs is told from an idle one."""
        self._heartbeats.expected = results
        try:
            yield
        finally:
            self._heartbeats.expected = 0

    def working(self, what: str) -> None:
        """This rank begins a task."""
        self._items += 1
        self.doing = self._last = what

    def waiting(self) -> None:
        """This rank has finished its task."""
        self.doing = ""

    def check(self) -> None:
        """Raise a `GangError` if a rank has failed."""
        if self._failure is not None:
            raise GangError(self._failure)

    def fail(self, message: str, *, status: int = FAILED) -> Failure:
        """Report a failure of this rank, in one line; returns the one that was reported first."""
        failure = self._report(message, status)
        return self.await_failure() or failure

    def await_failure(self) -> Failure | None:
        """Wait for a failure for as long as it may take to find a silent rank or store."""
        self._failed.wait(self._timeouts.silent + 2 * self._timeouts.grace)
        return self._failure

    def lost(self, rank: int, error: BaseException) -> None:
        """Report that a connection to a rank has failed. A report of that rank itself is older and holds."""
        if self._stopped.is_set():
            return
        if is_connection_error(error):
            self.fail(self._describe_gone(rank, "it has closed its connections"))
        else:
            self.fail(f"{self._name}: messages from or to rank {rank}: {type(error).__name__}: {error}")

    def _beat(self) -> Heartbeat:
        self._beats += 1
        return Heartbeat(
            count=self._beats,
            items=self._items,
            doing=self.doing,
            last=self._last,
            limit=self._timeouts.first if self._items <= _FIRST_ITEMS else self._timeouts.step,
            pid=os.getpid(),
            machine=self._machine,
        )

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # noqa: BLE001 - without this thread the rank would run unwatched
            self._report(f"{self._name}: monitor: {type(error).__name__}: {error}")
            self._failed_at, self._failure = time.monotonic(), self._heartbeats.reported
            self._failed.set()
        grace = self._timeouts.grace * (2 if self._server == self._mesh.rank else 1)
        while not self._stopped.wait(self._timeouts.interval):
            if time.monotonic() - self._failed_at > grace:
                self._end_process()

    def _watch(self) -> None:
        """Look for failures until there is one."""
        interval, before = self._timeouts.interval, time.monotonic()
        while self._failure is None and not self._stopped.is_set():
            signals = self._pipe.wait(interval)
            now = time.monotonic()
            passed, before = min(now - before, 2 * interval), now
            if signal.SIGTERM in signals and self._terminating is None:
                self._terminating = 0.0
            if not self._stopped.is_set():
                self._look(passed)

    def _look(self, passed: float) -> None:
        """Look for a failure, `passed` seconds after the last look."""
        found = self._heartbeats
        self._unread = self._unread + passed if found.rounds == self._rounds else 0.0
        self._rounds = found.rounds
        self._open_processes()
        if found.failure is not None:
            self._set_failure(found.failure)
        elif found.lost:
            self._lose_store("it has closed its connections")
        elif self._unread > self._timeouts.silent:
            self._lose_store(f"it has given no sign of life for {self._unread:.0f} s")
        elif found.reported is None:
            self._check_processes(passed)
            if found.diagnosis is not None:
                found.report(found.diagnosis)

    def _open_processes(self) -> None:
        for rank, heartbeat in self._heartbeats.latest.items():
            if heartbeat is not None and heartbeat.machine == self._machine:
                if rank != self._mesh.rank and rank not in self._processes:
                    self._processes[rank] = LocalProcess(heartbeat.pid)

    def _check_processes(self, passed: float) -> None:
        """Check the processes of this machine: the other ranks, the launcher, and SIGTERM to this one."""
        for rank, process in self._processes.items():
            if process.gone and self._heartbeats.latest[rank] is not None:
                # Its own report, if there is one, has been read after one more round.
                since = self._gone.setdefault(rank, self._rounds)
                self._heartbeats.refresh()
                if self._rounds >= since + 2:
                    self._report(self._describe_gone(rank, "its process has ended"))
        if self._parent is not None and os.getppid() != self._parent:
            self._report(f"the launcher of {self._name} has gone")
        if self._terminating is not None:
            self._terminating += passed
            if self._terminating > self._timeouts.grace:
                self._report(f"{self._name} was told to stop")

    def _describe_gone(self, rank: int, how: str) -> str:
        heartbeat = self._heartbeats.latest.get(rank)
        return f"{self._mesh.name(rank)} has gone: {how}" + (f", last seen {heartbeat.at}" if heartbeat else "")

    def _report(self, message: str, status: int = FAILED) -> Failure:
        failure = Failure(message=message.partition("\n")[0], status=status, reporter=self._mesh.rank)
        self._heartbeats.report(failure)
        return failure

    def _lose_store(self, how: str) -> None:
        """The process that serves the store is gone, or hangs: each rank finds that out alone."""
        self._store_lost = True
        if self._server is None:
            text = f"the launcher, which holds the ranks together, has gone: {how}"
            self._set_failure(Failure(message=text, reporter=0))
        else:
            self._set_failure(Failure(message=self._describe_gone(0, how), reporter=1, hung=(0,)))

    def _set_failure(self, failure: Failure) -> None:
        # Ranks that cannot read the failure are ended first: later there might be nobody left to do it.
        for rank, process in self._processes.items():
            if rank in failure.hung or process.stopped:
                process.end()
        self._failed_at = time.monotonic()
        self._failure = failure
        self._heartbeats.leave()
        self._failed.set()

    def _leave(self) -> None:
        """Leave the gang; the rank that serves the store leaves last."""
        self._heartbeats.leave(0.0 if self._store_lost else self._timeouts.grace)
        deadline = time.monotonic() + self._timeouts.grace
        while self._server == self._mesh.rank and time.monotonic() < deadline and self._others_read():
            self._heartbeats.refresh()
            time.sleep(POLL_SECONDS)

    def _others_read(self) -> bool:
        """Whether another rank may still read the store."""
        there = {rank for rank, heartbeat in self._heartbeats.latest.items() if heartbeat is not None}
        gone = {rank for rank, process in self._processes.items() if process.gone}
        return bool(there - gone - {self._mesh.rank})

    def _close(self) -> None:
        self._heartbeats.close(self._timeouts.grace)
        self._thread.join()
        self._pipe.close()
        for process in self._processes.values():
            process.close()

    def _end_process(self) -> NoReturn:
        """End this process, whose main thread is stuck."""
        assert self._failure is not None
        if self._speaks and self._failure.reporter == self._mesh.rank:
            sys.stderr.write(f"flowcache: error: {self._failure.message}\n")
        leave(self._failure.status)


def leave(status: int) -> NoReturn:
    """End the process at once: threads that wait for a peer that is gone would keep it from ending in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_connection_error(error: BaseException) -> bool:
    """Whether a transfer has failed because the peer is gone."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _DISCONNECTED)
