"""The reuse flags of one request as one rank has seen them, with a running digest.

The leader decides and writes; every other rank reads the flags from headers, follows them along the schedule on its
own, and compares. Two ranks with the same digest have seen the same flags for the same chunks at the same ticks. The
digest is a chain, digest = H(digest before, tick, chunk, flag), so it can be saved and resumed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from engine.reuse.policy import Decision
from engine.schedule import Schedule
from engine.video import WorkItem

_ONE = struct.Struct("<iiB")
DIGEST_BYTES = 8


class FlagMismatch(Exception):
    """A rank's flags are not those of the head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagState:
    """How far a log is."""

    digest: bytes  # of all flags so far
    count: int  # how many there were
    reused: int  # how many of them said that a chunk is not computed


class FlagLog:
    """Flags in the order (tick, chunk)."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self._order = schedule, _order(schedule)
        self._digest = bytes(DIGEST_BYTES)
        self._last: tuple[int, int] | None = None
        self.count = 0
        """How many flags there were."""
        self.reused = 0
        """How many of them said that a chunk is not computed."""

    @property
    def digest(self) -> bytes:
        """Of all flags so far."""
        return self._digest

    def state(self) -> FlagState:
        """How far it is."""
        return FlagState(digest=self._digest, count=self.count, reused=self.reused)

    def restore(self, state: FlagState) -> None:
        """Go on from a saved state of a log of the same schedule.

        Raises:
            ValueError: the schedule does not have so many flags.
        """
        self._order = _order(self._schedule)
        self._last = next(islice(self._order, state.count - 1, None), None) if state.count else None
        if state.count and self._last is None:
            raise ValueError(f"{state.count} flags are more than the schedule has chunk-steps")
        self._digest, self.count, self.reused = state.digest, state.count, state.reused

    def add(self, flags: Iterable[int]) -> None:
        """Take the next flags.

        Raises:
            FlagMismatch: the schedule has no more chunk-steps.
        """
        for flag in flags:
            try:
                self._last = next(self._order)
            except StopIteration:
                raise FlagMismatch(f"there are more flags than the schedule has chunk-steps ({self.count})") from None
            linked = self._digest + _ONE.pack(*self._last, flag)
            self._digest = hashlib.blake2b(linked, digest_size=DIGEST_BYTES).digest()
            self.count += 1
            self.reused += flag != Decision.COMPUTE.value

    def check(self, item: WorkItem | None, digest: bytes) -> None:
        """Compare with the leader's digest when it sent an item, or with its final digest.

        Raises:
            FlagMismatch: the flags differ, or the item is not the chunk-step that was decided last.
        """
        where = "" if item is None else f" at tick {item.tick}, chunk {item.chunk}"
        if self.digest != digest:
            own, theirs = self.digest.hex(), digest.hex()
            raise FlagMismatch(f"the reuse flags differ from the leader's{where}: digest {own} is not {theirs}")
        if item is not None and item.step is not None and self._last != (item.tick, item.chunk):
            raise FlagMismatch(f"the work{where} is out of order: the last decision was for {self._last}")


def _order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    for tick in schedule:
        for chunk, _ in tick.active:
            yield tick.index, chunk
