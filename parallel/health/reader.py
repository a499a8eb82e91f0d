"""The health of a gang, for a process that is not one of its ranks, such as a controller that serves their store."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch.distributed import Store

from parallel.health.errors import Failure
from parallel.health.hang_detector import Diagnosis, HangDetector
from parallel.health.heartbeats import Heartbeat, Heartbeats
from parallel.health.timeouts import Timeouts
from parallel.topology.mesh import Mesh


class HeartbeatReader:
    """Reads the heartbeats of all ranks in a thread of its own; no method waits for the store.

    Each limit is longer by twice `grace` than among the ranks, which find a fault first and name it better.

    Args:
        store: a connection of its own to the ranks' store, under the attempt's prefix.
        mesh: for the names of ranks.
        timeouts: of the ranks.
    """

    def __init__(self, store: Store, mesh: Mesh, timeouts: Timeouts) -> None:
        self._interval = timeouts.interval
        self._detector = HangDetector(mesh, timeouts, slack=2 * timeouts.grace)
        self._diagnosis: Diagnosis | None = None
        self._looked = time.monotonic()
        self._thread = Heartbeats(store, mesh.layout.world_size, interval=self._interval, on_round=self._look)
        self._thread.start()

    @property
    def heartbeats(self) -> Mapping[int, Heartbeat | None]:
        """The latest heartbeats of the ranks that have joined; None for a rank that has left."""
        return self._thread.latest

    def busy(self, rank: int) -> float:
        """Seconds for which a rank has been at its present task."""
        return self._detector.busy(rank)

    def poll(self) -> Diagnosis | Failure | None:
        """The failure that a rank has reported, or else what is wrong with the heartbeats; None if all is well.

        What was found once is returned at every later call.
        """
        return self._thread.failure or self._diagnosis

    def close(self) -> None:
        """End the thread."""
        self._thread.close(2 * self._interval)

    def _look(self) -> None:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._interval), now  # time in which nobody looked is lost
        if self._thread.lost:
            self._diagnosis = self._diagnosis or Diagnosis(message="the ranks' store has closed its connections")
        elif self._diagnosis is None:
            self._diagnosis = self._detector.look(self._thread.latest, passed)
