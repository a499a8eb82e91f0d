"""The reuse flags of one request as one rank has seen them, with a running digest.

The head decides and writes; every other rank reads the flags from headers, follows them along the schedule on its own,
and compares. Two ranks with the same digest have seen the same flags for the same chunks at the same ticks.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator

from engine.cache import Decision
from engine.schedule import Schedule
from engine.work import WorkItem

__all__ = ["FlagLog", "FlagMismatch"]

_ONE = struct.Struct("<iiB")
DIGEST_BYTES = 8


class FlagMismatch(Exception):
    """A rank's flags are not those of the head."""


class FlagLog:
    """Flags in the order (tick, chunk)."""

    def __init__(self, schedule: Schedule) -> None:
        self._order = _order(schedule)
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._last: tuple[int, int] | None = None
        self.count = 0
        """How many flags there were."""
        self.reused = 0
        """How many of them said that a chunk is not computed."""

    @property
    def digest(self) -> bytes:
        """Of all flags so far."""
        return self._hash.digest()

    def add(self, flags: Iterable[int]) -> None:
        """Take the next flags.

        Raises:
            FlagMismatch: the schedule is over.
        """
        for flag in flags:
            try:
                self._last = next(self._order)
            except StopIteration:
                raise FlagMismatch(f"there are more flags than the schedule has chunk-steps ({self.count})") from None
            self._hash.update(_ONE.pack(*self._last, flag))
            self.count += 1
            self.reused += flag != Decision.COMPUTE.value

    def check(self, item: WorkItem | None, digest: bytes) -> None:
        """Compare with what the head had when it sent an item, or with its final digest.

        Raises:
            FlagMismatch: the flags differ, or the item is not the chunk-step that was decided last.
        """
        where = "" if item is None else f" at tick {item.tick}, chunk {item.chunk}"
        if self.digest != digest:
            own, theirs = self.digest.hex(), digest.hex()
            raise FlagMismatch(f"the reuse flags differ from the head's{where}: digest {own} is not {theirs}")
        if item is not None and item.step is not None and self._last != (item.tick, item.chunk):
            raise FlagMismatch(f"the work{where} is out of order: the last decision was for {self._last}")


def _order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    for tick in schedule:
        for chunk, _ in tick.active:
            yield tick.index, chunk
