"""The notices that ranks leave for each other in the rendezvous store: signs of life, and the first failure.

Only the thread in here talks to the store, because whoever does may have to wait for ever: a store whose process is
stopped answers no more. Others look at what the thread has seen last, and at how long ago that was.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed import Store

from parallel.health.errors import ErrorStore, Failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """A sign of life."""

    count: int  # of heartbeats so far
    items: int  # of things that the rank has begun with
    doing: str  # the thing that it is at, in words; empty while it waits
    last: str  # what it began with last
    limit: float  # seconds that it may be at this thing
    pid: int
    machine: str  # where that is

    @property
    def at(self) -> str:
        """What the rank does, or has done last."""
        return f"at {self.doing}" if self.doing else f"after {self.last}"


class Heartbeats:
    """Writes this rank's notices and reads those of all.

    Args:
        store: a connection of its own to the store.
        rank: this one.
        world: number of ranks.
        heartbeat: makes this rank's sign of life.
        interval: seconds between two rounds.
        on_news: called when there is a failure, or no store any more.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        *,
        heartbeat: Callable[[], Heartbeat],
        interval: float,
        on_news: Callable[[], None],
    ) -> None:
        self.heartbeats: dict[int, Heartbeat | None] = {}
        """Last signs of life of the ranks that have come; None for those that have left."""
        self.rounds = 0
        """How often all notices were read."""
        self.failure: Failure | None = None
        """What was reported first."""
        self.mine: Failure | None = None
        """What this rank has to report."""
        self.lost = False
        """The store is gone."""
        self._store, self._board = store, ErrorStore(store)
        self._key, self._world, self._absent = self._name(rank), world, set(range(world))
        self._heartbeat, self._interval, self._on_news = heartbeat, interval, on_news
        self._wake, self._told = threading.Event(), threading.Event()
        self._leaves = self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def refresh(self) -> None:
        """Read all notices soon."""
        self._wake.set()

    def report(self, failure: Failure) -> None:
        """Report a failure; what was reported first comes as `failure`."""
        with self._lock:
            self.mine = self.mine or failure
        self._wake.set()

    def take_leave(self) -> None:
        """Tell the others not to wait for this rank's signs of life any more."""
        self._leaves = True
        self._wake.set()

    def wait_told(self, seconds: float) -> None:
        """Wait until the others can know that this rank has left."""
        self._told.wait(seconds)

    def give_up(self) -> None:
        """The store is of no use any more: nobody can be told anything."""
        self._told.set()

    def close(self, seconds: float) -> None:
        """End the thread; it is left behind if the store does not answer."""
        self._closed = True
        self._wake.set()
        self._thread.join(seconds)

    @staticmethod
    def _name(rank: int) -> str:
        return f"heartbeat/{rank}"

    def _run(self) -> None:
        try:
            while not self._closed:
                self._round()
                self.rounds += 1
                self._wake.wait(self._interval)
                self._wake.clear()
        except RuntimeError:  # what a store raises when its connection is gone
            self.lost = True
        self._told.set()
        self._on_news()

    def _round(self) -> None:
        leaves = self._leaves
        if self.failure is None:
            self.failure = self._board.read() if self.mine is None else self._board.report(self.mine)
            if self.failure is not None:
                self._on_news()
        self._store.set(self._key, "" if leaves else json.dumps(asdict(self._heartbeat())))
        self._absent = {rank for rank in self._absent if not self._store.check([self._name(rank)])}
        there = [rank for rank in range(self._world) if rank not in self._absent]
        texts = self._store.multi_get([self._name(rank) for rank in there])
        self.heartbeats = {
            rank: Heartbeat(**json.loads(text)) if text else None for rank, text in zip(there, texts, strict=True)
        }
        if leaves:
            self._told.set()  # the store has answered, so it has this rank's last notice
