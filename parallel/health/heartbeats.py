"""The heartbeats of all ranks in the rendezvous store: a thread writes this rank's, reads everybody's and judges them.

Only this thread talks to the store, for a call may never return: a store whose process is stopped does not answer.
Other threads look at what this thread has read last, and at how many rounds it has done.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

from torch.distributed import Store

from parallel.health.failure import Failure, read_failure, report_failure
from parallel.health.hang_detector import HangDetector, Heartbeat
from parallel.health.timeouts import Timeouts
from parallel.mesh import Mesh


class Heartbeats:
    """The thread that exchanges heartbeats and failures with the store, round after round.

    For a process that only reads, such as the controller, limits are longer by twice `grace`: the ranks find a fault
    first and name it better.
    """

    def __init__(
        self,
        store: Store,  # a connection of its own
        mesh: Mesh,  # for the names of ranks; its rank is this process's if there is `beat`
        timeouts: Timeouts,  # of the ranks
        *,
        beat: Callable[[], Heartbeat] | None = None,  # makes this rank's heartbeat; None only reads
        on_round: Callable[[], None] = lambda: None,  # in the thread, after each round and at its end
    ) -> None:
        self.latest: dict[int, Heartbeat | None] = {}  # of the ranks that have joined; None for one that has left
        self.rounds = 0  # how often all heartbeats were read
        self.failure: Failure | None = None  # the one that was reported first
        self.reported: Failure | None = None  # the one that this process reports
        self.diagnosis: Failure | None = None  # what this process has found wrong with the heartbeats
        self.lost = False  # the store has closed the connection
        self.expected = 0  # results for which this process does nothing but wait
        self._store, self._mesh, self._beat, self._on_round = store, mesh, beat, on_round
        self._interval = timeouts.interval
        self._detector = HangDetector(mesh, timeouts, slack=0.0 if beat is not None else 2 * timeouts.grace)
        self._looked = time.monotonic()
        self._absent = set(range(mesh.layout.world_size))
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
                self._look()
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
            reported = self.reported
            self.failure = read_failure(self._store) if reported is None else report_failure(self._store, reported)
        if self._beat is not None:
            self._store.set(f"heartbeat/{self._mesh.rank}", "" if leaves else json.dumps(asdict(self._beat())))
        self._absent = {rank for rank in self._absent if not self._store.check([f"heartbeat/{rank}"])}
        joined = [rank for rank in range(self._mesh.layout.world_size) if rank not in self._absent]
        texts = self._store.multi_get([f"heartbeat/{rank}" for rank in joined])
        self.latest = {
            rank: Heartbeat(**json.loads(text)) if text else None for rank, text in zip(joined, texts, strict=True)
        }
        if leaves:
            self._left.set()  # the store has answered, so it holds this rank's last heartbeat

    def _look(self) -> None:
        """Look for a rank that hangs. Time in which nobody looked is lost."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._interval), now
        if self.diagnosis is None and not self._leaves:
            self.diagnosis = self._detector.look(self.latest, passed, self.expected)

    def _die(self, error: Exception) -> None:
        who = "the reader" if self._beat is None else f"rank {self._mesh.rank}"
        text = f"{who}: heartbeats: {type(error).__name__}: {error}".partition("\n")[0]
        failure = Failure(message=text, reporter=self._mesh.rank)
        try:
            self.failure = report_failure(self._store, failure)
        except RuntimeError:
            self.failure = failure
