"""Watches over the ranks of a gang: each tells what it is doing, and each looks at all others.

A rank that has died closes its connections; one that hangs (stopped, or stuck in a kernel) does not, so every rank
writes a beat into the rendezvous store twice a second. Who sees that a beat has stopped, or that one item takes
too long, reports it by name. A rank that cannot unwind after a failure is ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from torch.distributed import Store

from parallel.failure import FAILED, Failure, FailureBoard, GangError
from parallel.mesh import Mesh

__all__ = ["Monitor", "Timeouts", "is_connection_error", "leave"]

_INTERVAL = 0.5
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process has exited")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """How long to wait, in seconds.

    Attributes:
        silent: without a sign of life from a rank.
        first: for loading, and for a rank's first items, which may compile.
        step: for one item after that.
        grace: for a rank to unwind after a failure; also for a dying rank's own report to come before that of its
            peers.
    """

    silent: float = 20.0
    first: float = 900.0
    step: float = 180.0
    grace: float = 3.0


@dataclass(slots=True)
class _Seen:
    """What is known of a peer: its last beat, and for how long it has not changed."""

    beat: str = ""
    doing: str = ""
    silent: float = 0.0
    busy: float = 0.0


class Monitor:
    """Beats and watches in a thread of its own.

    Args:
        store: a connection of its own to the rendezvous store.
        mesh: names of ranks.
        timeouts: how long to wait.
        speaks: this process shows a failure itself if it must be ended.
    """

    def __init__(self, store: Store, mesh: Mesh, timeouts: Timeouts, *, speaks: bool) -> None:
        self._store, self._mesh, self._timeouts, self._speaks = store, mesh, timeouts, speaks
        self._board = FailureBoard(store)
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._doing, self._last, self._items, self._beats = "starting", "starting", 0, 0
        self._outstanding: Callable[[], int] = lambda: 0
        self._seen = {rank: _Seen() for rank in range(mesh.layout.world_size) if rank != mesh.rank}
        self._idle = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    @property
    def doing(self) -> str:
        """What this rank is doing, in words; empty while it waits."""
        return self._doing

    def start(self) -> None:
        """Start to beat."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """This rank is through; nobody will miss its beats."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._failure is None:
            with suppress(RuntimeError):  # who serves the store may have left first
                self._store.set(self._key(self._mesh.rank), "")

    def watch(self, outstanding: Callable[[], int]) -> None:
        """Ask how many items are under way, to tell a gang that is stuck from one that has nothing to do."""
        self._outstanding = outstanding

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
        if self._failure is None:
            try:
                self._set(self._board.report(failure))
            except RuntimeError:
                self._set(failure)
        assert self._failure is not None
        return self._failure

    def await_failure(self) -> Failure | None:
        """Wait until somebody has reported a failure, as long as a peer may be silent."""
        deadline = time.monotonic() + self._timeouts.silent + 2 * self._timeouts.grace
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._failure

    def lost(self, rank: int, error: Exception) -> None:
        """A connection to a rank has failed. If that rank reports why, its report is taken."""
        if self._ended.is_set():
            return
        deadline = time.monotonic() + self._timeouts.grace
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._failure is None and not self._ended.is_set():
            self.fail(f"{self._mesh.name(rank)} has gone: {_first_line(error)}")

    def _set(self, failure: Failure) -> None:
        if self._failure is None:
            self._failed_at = time.monotonic()
            self._failure = failure

    def _run(self) -> None:
        before = time.monotonic()
        interval = min(_INTERVAL, self._timeouts.silent / 8)
        while not self._ended.wait(interval):
            now = time.monotonic()
            # A machine that slept must not take the others for dead: no step counts more than two intervals.
            passed, before = min(now - before, 2 * interval), now
            try:
                self._beat()
                if self._failure is None and (failure := self._board.read()) is not None:
                    self._set(failure)
                self._look(passed)
            except RuntimeError:
                if not self._ended.is_set():
                    self._store_lost()
            if self._failure is not None and now - self._failed_at > self._timeouts.grace:
                self._end()

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _beat(self) -> None:
        self._beats += 1
        beat = {
            "beats": self._beats,
            "items": self._items,
            "doing": self._doing,
            "last": self._last,
            "first": self._items <= 4,
            "outstanding": self._outstanding(),
            "pid": os.getpid(),
            "machine": socket.gethostname(),
        }
        self._store.set(self._key(self._mesh.rank), json.dumps(beat))

    def _look(self, passed: float) -> None:
        """Look at all others; `passed` seconds after the last look."""
        ranks = [rank for rank in self._seen if self._store.check([self._key(rank)])]
        beats = self._store.multi_get([self._key(rank) for rank in ranks]) if ranks else []
        anybody = bool(self._doing)
        for rank, raw in zip(ranks, beats, strict=True):
            text = raw.decode()
            if not text:  # through
                continue
            anybody |= self._look_at(rank, text, passed)
        self._idle = 0.0 if anybody or not self._outstanding() else self._idle + passed
        if self._failure is None and self._idle > self._timeouts.step:
            self.fail(f"no rank works, though {self._outstanding()} items are under way")

    def _look_at(self, rank: int, text: str, passed: float) -> bool:
        """Look at one beat; whether that rank works."""
        seen, beat = self._seen[rank], json.loads(text)
        seen.silent = 0.0 if text != seen.beat else seen.silent + passed
        doing = f"{beat['items']} {beat['doing']}" if beat["doing"] else ""
        seen.busy = seen.busy + passed if doing and doing == seen.doing else 0.0
        seen.beat, seen.doing = text, doing
        if self._failure is not None:
            return bool(doing)
        at = f" at {beat['doing']}" if beat["doing"] else f" after {beat['last']}"
        limit = self._timeouts.first if beat["first"] else self._timeouts.step
        if seen.silent > self._timeouts.silent:
            failure = self.fail(f"{self._mesh.name(rank)} has given no sign of life for {seen.silent:.0f} s{at}")
            if failure.reporter == self._mesh.rank and beat["machine"] == socket.gethostname():
                _kill(beat["pid"])  # a stopped process would not hear its launcher
        elif seen.busy > limit:
            self.fail(f"{self._mesh.name(rank)} has not come on for {seen.busy:.0f} s{at}")
        return bool(doing)

    def _store_lost(self) -> None:
        text = "the launcher, which holds the ranks together, has gone"
        self._set(Failure(message=text, status=FAILED, reporter=self._mesh.rank))

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


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def is_connection_error(error: BaseException) -> bool:
    """Whether a transfer has failed because the other side is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _GONE)


def _first_line(error: Exception) -> str:
    if is_connection_error(error):
        return "it has closed its connections"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
