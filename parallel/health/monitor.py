"""Watches over the ranks of a gang: each tells what it is doing, and each looks at all others.

Every rank leaves a sign of life in the rendezvous store twice a second, and reads those of all. Whoever finds a rank
dead or hanging reports it there; the first report holds, and all ranks stop with its message. By default that takes

- a second, if a rank has failed by itself (bad input, an exception, flags that do not agree), or if its process has
  ended, on this machine or with a connection to here; otherwise as for a rank that is stopped,
- 20 s (`silent`), if a rank is stopped, its machine is lost, or the store does not answer any more,
- 180 s (`step`), if a rank is stuck in one item; 900 s (`first`), if in loading or one of its first items,
- 180 s (`step`), if the lead waits for results that nobody works on,
- a second, if the launcher has gone; a launcher's SIGTERM holds for `grace` if nothing else is found by then,

and up to 3 s more (`grace`; on the rank that serves the store, twice that) for ranks that cannot unwind: their process
is ended. Who cannot hear at all, because it is stopped, is ended by the ranks beside it, before they go themselves.
Only time in which this rank could look counts, so neither a machine that slept nor a starved one finds others dead.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch.distributed import Store

from parallel.health.errors import FAILED, STOPPED, Failure, GangError
from parallel.health.hang_detector import HangDetector, Timeouts
from parallel.health.heartbeats import Heartbeat, Heartbeats
from parallel.health.processes import LocalProcess, WakeupPipe, this_machine
from parallel.ranks.environment import RankEnv
from parallel.topology.mesh import Mesh

_INTERVAL = 0.5
_FIRST_ITEMS = 4
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exited",
)


class Monitor:
    """Watches in a thread of its own, which never waits for anybody.

    Args:
        store: a connection of its own to the rendezvous store.
        mesh: names of ranks.
        timeouts: how long to wait.
        env: of this rank.
    """

    def __init__(self, store: Store, mesh: Mesh, timeouts: Timeouts, env: RankEnv) -> None:
        self._mesh, self._timeouts, self._env = mesh, timeouts, env
        self._speaks = not env.launcher_speaks
        self._server = None if env.launcher_serves else 0
        self._parent = os.getppid() if env.launched else None
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._doing, self._last, self._items, self._heartbeats = "starting", "starting", 0, 0
        self._outstanding: Callable[[], int] = lambda: 0
        self._expects = False
        self._interval = min(_INTERVAL, timeouts.silent / 8)
        self._machine = this_machine()
        self._processes: dict[int, LocalProcess] = {}
        self._gone: dict[int, int] = {}
        self._rounds, self._since_round = 0, 0.0
        self._terminating: float | None = None
        self._known, self._over = threading.Event(), threading.Event()
        self._bell = WakeupPipe()
        self._judge = HangDetector(mesh, timeouts)
        self._notices = Heartbeats(
            store,
            mesh.rank,
            mesh.layout.world_size,
            heartbeat=self._heartbeat,
            interval=self._interval,
            on_news=self._bell.ring,
        )
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    @property
    def doing(self) -> str:
        """What this rank is doing, in words; empty while it waits."""
        return self._doing

    def start(self) -> None:
        """Start to watch."""
        self._notices.start()
        self._thread.start()

    def stop(self) -> None:
        """This rank is through; nobody will miss its signs of life."""
        self._over.set()
        self._bell.ring()
        self._part()
        self._close()

    def hand_over(self) -> None:
        """The failure is known where the gang was opened, and is to be shown there.

        A process that a launcher has started for its rank has `grace` from now to do so and to end. Any other one may
        go on.
        """
        self._failed_at = time.monotonic()
        self._part()
        self._failed_at, self._speaks = time.monotonic(), False
        if not self._env.launched:
            self._over.set()
            self._bell.ring()
            self._close()

    def watch(self, outstanding: Callable[[], int]) -> None:
        """Ask how many items are under way, to tell a gang that is stuck from one that has nothing to do."""
        self._outstanding = outstanding

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While this rank does nothing but wait for results."""
        self._expects = True
        try:
            yield
        finally:
            self._expects = False

    def working(self, what: str) -> None:
        """This rank begins with something."""
        self._items += 1
        self._doing = self._last = what

    def waiting(self) -> None:
        """This rank is through with what it did."""
        self._doing = ""

    def check(self) -> None:
        """Raise if somebody has failed.

        Raises:
            GangError: what has happened.
        """
        if self._failure is not None:
            raise GangError(self._failure)

    def fail(self, message: str, *, status: int = FAILED) -> Failure:
        """Report a failure; what was reported first is returned, and holds."""
        failure = Failure(message=message, status=status, reporter=self._mesh.rank)
        self._notices.report(failure)
        return self.await_failure() or failure

    def await_failure(self) -> Failure | None:
        """Wait until a failure is known, as long as a rank, or the store, may be silent."""
        self._known.wait(self._timeouts.silent + 2 * self._timeouts.grace)
        return self._failure

    def lost(self, rank: int, error: BaseException) -> None:
        """A connection to a rank has failed. If that rank has reported why, before it went, its report holds."""
        if self._over.is_set():
            return
        if is_connection_error(error):
            self.fail(self._has_gone(rank, "it has closed its connections"))
        else:
            text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.fail(f"{self._mesh.name(self._mesh.rank)}: messages from or to rank {rank}: {text}")

    def _heartbeat(self) -> Heartbeat:
        self._heartbeats += 1
        return Heartbeat(
            count=self._heartbeats,
            items=self._items,
            doing=self._doing,
            last=self._last,
            limit=self._timeouts.first if self._items <= _FIRST_ITEMS else self._timeouts.step,
            pid=os.getpid(),
            machine=self._machine,
        )

    def _has_gone(self, rank: int, how: str) -> str:
        heartbeat = self._notices.heartbeats.get(rank)
        return f"{self._mesh.name(rank)} has gone: {how}" + (f", last seen {heartbeat.at}" if heartbeat else "")

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.is_set():
            signals = self._bell.wait(self._interval)
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._interval), now
            if signal.SIGTERM in signals and self._terminating is None:
                self._terminating = 0.0
            if self._over.is_set():
                return
            if self._failure is None:
                self._look(passed)
            elif now - self._failed_at > self._timeouts.grace * (2 if self._server == self._mesh.rank else 1):
                self._end()

    def _look(self, passed: float) -> None:
        """Look at all others; `passed` seconds after the last look."""
        notices = self._notices
        self._since_round += passed
        self._meet_processes()
        if notices.failure is not None:
            self._set(notices.failure)
        elif notices.lost:
            self._lose_store("it has closed its connections")
        elif self._since_round > self._timeouts.silent:
            self._lose_store(f"it has given no sign of life for {self._since_round:.0f} s")
        elif notices.mine is None:
            self._look_at_processes(passed)
            if notices.rounds != self._rounds:
                verdict = self._judge.look(notices.heartbeats, self._since_round, self._expected)
                self._rounds, self._since_round = notices.rounds, 0.0
                if verdict is not None:
                    self._report(verdict.message, hung=verdict.hung)
        elif notices.rounds != self._rounds:
            self._rounds, self._since_round = notices.rounds, 0.0

    @property
    def _expected(self) -> int:
        return self._outstanding() if self._expects else 0

    def _meet_processes(self) -> None:
        for rank, heartbeat in self._notices.heartbeats.items():
            if heartbeat is not None and rank not in self._processes and heartbeat.machine == self._machine:
                if rank != self._mesh.rank:
                    self._processes[rank] = LocalProcess(heartbeat.pid)

    def _look_at_processes(self, passed: float) -> None:
        """Look at what this machine knows of its processes."""
        for rank, process in self._processes.items():
            if process.gone and self._notices.heartbeats[rank] is not None:
                self._look_at_gone(rank)
        if self._parent is not None and os.getppid() != self._parent:
            self._report(f"the launcher of {self._mesh.name(self._mesh.rank)} has gone")
        if self._terminating is not None:
            self._terminating += passed
            if self._terminating > self._timeouts.grace:
                self._report(f"{self._mesh.name(self._mesh.rank)} was told to stop", status=STOPPED)

    def _look_at_gone(self, rank: int) -> None:
        """A rank's process has ended: after all notices were read once more, there is no word from it to come."""
        since = self._gone.setdefault(rank, self._notices.rounds)
        self._notices.refresh()
        if self._notices.rounds >= since + 2:
            self._report(self._has_gone(rank, "its process has ended"))

    def _report(self, message: str, *, status: int = FAILED, hung: tuple[int, ...] = ()) -> None:
        self._notices.report(Failure(message=message, status=status, reporter=self._mesh.rank, hung=hung))

    def _lose_store(self, how: str) -> None:
        """Who serves the store is gone, or hangs: every rank finds that out alone."""
        self._notices.give_up()
        if self._server is None:
            message = f"the launcher, which holds the ranks together, has gone: {how}"
            self._set(Failure(message=message, status=FAILED, reporter=0))
        else:
            message = self._has_gone(self._server, how)
            self._set(Failure(message=message, status=FAILED, reporter=1, hung=(self._server,)))

    def _set(self, failure: Failure) -> None:
        # Nobody goes before who cannot hear is ended: there might be nobody left to do it.
        for rank, process in self._processes.items():
            if rank in failure.hung or process.stopped:
                process.end()
        self._failed_at = time.monotonic()
        self._failure = failure
        self._notices.take_leave()
        self._known.set()

    def _part(self) -> None:
        """Take leave of the others; who serves the store goes last."""
        self._notices.take_leave()
        self._notices.wait_told(self._timeouts.grace)
        if self._server != self._mesh.rank:
            return
        deadline = time.monotonic() + self._timeouts.grace
        while time.monotonic() < deadline and self._others_listen():
            self._notices.refresh()
            time.sleep(0.02)

    def _others_listen(self) -> bool:
        for rank, heartbeat in self._notices.heartbeats.items():
            if heartbeat is not None and rank != self._mesh.rank:
                process = self._processes.get(rank)
                if process is None or not process.gone:
                    return True
        return False

    def _close(self) -> None:
        self._notices.close(self._timeouts.grace)
        self._thread.join()
        self._bell.close()
        for process in self._processes.values():
            process.close()

    def _end(self) -> NoReturn:
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
    """Whether a transfer has failed because the other side is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _GONE)
