"""The heartbeats of all ranks in the rendezvous store: a thread writes this rank's and reads everybody's.

Only this thread talks to the store, for a call may never return: a store whose process is stopped does not answer.
Other threads look at what this thread has read last, and at how many rounds it has done.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed import Store

from parallel.health.errors import FAILED, ErrorStore, Failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a rank says of itself."""

    count: int  # heartbeats so far
    items: int  # tasks begun so far
    doing: str  # the present task, in words; empty while the rank waits
    last: str  # the task begun last
    limit: float  # seconds that the present task may take
    pid: int  # of the rank's process
    machine: str  # of the rank's process, as `this_machine` names it

    @property
    def at(self) -> str:
        """What the rank does, or has done last."""
        return f"at {self.doing}" if self.doing else f"after {self.last}"


class Heartbeats:
    """The thread that exchanges heartbeats and failures with the store, round after round.

    Args:
        store: a connection of its own, under the attempt's prefix.
        world_size: number of ranks.
        interval: seconds between two rounds.
        on_round: called by the thread after each round, and once more when the thread ends.
        rank: this process's; None if it is not a rank and only reads.
        beat: makes this rank's heartbeat.
    """

    def __init__(
        self,
        store: Store,
        world_size: int,
        *,
        interval: float,
        on_round: Callable[[], None],
        rank: int | None = None,
        beat: Callable[[], Heartbeat] | None = None,
    ) -> None:
        self.latest: dict[int, Heartbeat | None] = {}  # of the ranks that have joined; None for one that has left
        self.rounds = 0  # how often all heartbeats were read
        self.failure: Failure | None = None  # the one that was reported first
        self.reported: Failure | None = None  # the one that this process reports
        self.lost = False  # the store has closed the connection
        self._store, self._errors = store, ErrorStore(store)
        self._rank, self._beat, self._interval, self._on_round = rank, beat, interval, on_round
        self._world_size, self._absent = world_size, set(range(world_size))
        self._wake, self._left = threading.Event(), threading.Event()
        self._leaves = self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def refresh(self) -> None:
        """Do the next round now."""
        self._wake.set()

    def report(self, failure: Failure) -> None:
        """Report a failure; the one that was reported first is `failure` after the next round."""
        with self._lock:
            self.reported = self.reported or failure
        self.refresh()

    def leave(self, wait: float = 0.0) -> None:
        """Announce that this rank sends no more heartbeats; waits for so many seconds until the others can know it."""
        self._leaves = True
        self.refresh()
        self._left.wait(wait)

    def close(self, seconds: float) -> None:
        """End the thread; it is abandoned if the store does not answer in time."""
        self._closed = True
        self.refresh()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._closed:
                self._round()
                self.rounds += 1
                self._on_round()
                self._wake.wait(self._interval)
                self._wake.clear()
        except RuntimeError:  # raised by a store whose connection is closed
            self.lost = True
        except Exception as error:  # noqa: BLE001 - without this thread the gang would run unwatched
            self._die(error)
        self._left.set()
        self._on_round()

    def _round(self) -> None:
        leaves = self._leaves
        if self.failure is None:
            self.failure = self._errors.read() if self.reported is None else self._errors.report(self.reported)
        if self._beat is not None:
            self._store.set(f"heartbeat/{self._rank}", "" if leaves else json.dumps(asdict(self._beat())))
        self._absent = {rank for rank in self._absent if not self._store.check([f"heartbeat/{rank}"])}
        joined = [rank for rank in range(self._world_size) if rank not in self._absent]
        texts = self._store.multi_get([f"heartbeat/{rank}" for rank in joined])
        self.latest = {
            rank: Heartbeat(**json.loads(text)) if text else None for rank, text in zip(joined, texts, strict=True)
        }
        if leaves:
            self._left.set()  # the store has answered, so it holds this rank's last heartbeat

    def _die(self, error: Exception) -> None:
        who = "the reader" if self._rank is None else f"rank {self._rank}"
        text = f"{who}: heartbeats: {type(error).__name__}: {error}".partition("\n")[0]
        failure = Failure(message=text, status=FAILED, reporter=self._rank or 0)
        try:
            self.failure = self._errors.report(failure)
        except RuntimeError:
            self.failure = failure
