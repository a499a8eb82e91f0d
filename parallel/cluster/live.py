"""What happens in a video from tick to tick, for somebody who watches it being made: sent by the leader, not kept."""

import time
from collections.abc import Callable

import numpy as np

from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from engine.schedule import Timetable
from parallel.cluster.messages import Ticked
from parallel.health.timeouts import WATCHED_SECONDS


class LiveRecorder(Recorder):
    """Sends a message for each tick instead of a record; nothing is computed for it.

    Args:
        video: its name.
        post: takes a message, and whether it is to be sent at once or with the next ones.
    """

    observes = False

    def __init__(self, video: str, post: Callable[[Ticked, bool], None]) -> None:
        super().__init__()
        self._video, self._post = video, post
        self._decisions: list[tuple[int, int, int]] = []
        self._kept: tuple[float, ...] | None = None
        self._sent = 0.0

    def begin(self, table: Timetable) -> None:
        """Nothing is kept."""

    def decided(self, seen: Observation, decision: Decision) -> None:
        """Note the decision about a chunk's step."""
        self._decisions.append((seen.chunk, seen.step, decision.value))

    def retired(self, chunk: int, shares: np.ndarray) -> None:
        """Note what is held of the chunks so far."""
        self._kept = tuple(round(float(share), 3) for share in shares)

    def ticked(self, tick: int, *, seconds: float, items: int, fill: float) -> None:
        """Send all since the last tick."""
        now = time.monotonic()
        due = now - self._sent >= WATCHED_SECONDS
        self._sent = now if due else self._sent
        decisions, self._decisions = tuple(self._decisions), []
        kept, self._kept = self._kept, None
        self._post(Ticked(video=self._video, tick=tick, decisions=decisions, kv_fill=fill, kept=kept), due)
