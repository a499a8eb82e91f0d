"""The reuse flags of one request as they were decided, or as one rank has seen them, with a running digest.

The video's run decides and writes; every rank reads the flags that come with its work, follows them along the schedule
on its own, and compares. Two ranks with the same digest have seen the same flags for the same chunks at the same ticks.
The digest is a chain, digest = H(digest before, tick, chunk, flag), so it can be saved and resumed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from engine.schedule import Schedule

if TYPE_CHECKING:
    from engine.video import WorkItem

_ONE = struct.Struct("<iiB")


class FlagMismatch(Exception):
    """A rank's flags are not those that were decided."""


FlagState = tuple[str, int]
"""How far a log is: the digest of all flags so far, as hexadecimal, and how many there were."""


class FlagLog:
    """Flags in the order (tick, chunk)."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule, self._order = schedule, _order(schedule)
        self.digest = bytes(8)  # of all flags so far
        self._last: tuple[int, int] | None = None
        self.count = 0  # of flags so far

    def state(self) -> FlagState:
        """How far it is."""
        return self.digest.hex(), self.count

    def restore(self, state: FlagState) -> None:
        """Go on from a saved state; a ValueError if the schedule does not have so many flags."""
        digest, count = state
        self._order = _order(self._schedule)
        self._last = next(islice(self._order, count - 1, None), None) if count else None
        if count and self._last is None:
            raise ValueError(f"{count} flags are more than the schedule has chunk-steps")
        self.digest, self.count = bytes.fromhex(digest), count

    def add(self, flags: Iterable[int]) -> None:
        """Take the next flags; a FlagMismatch if the schedule has no more chunk-steps."""
        for flag in flags:
            try:
                self._last = next(self._order)
            except StopIteration:
                raise FlagMismatch(f"there are more flags than the schedule has chunk-steps ({self.count})") from None
            linked = self.digest + _ONE.pack(*self._last, flag)
            self.digest = hashlib.blake2b(linked, digest_size=len(self.digest)).digest()
            self.count += 1

    def check(self, item: WorkItem | None, digest: bytes) -> None:
        """Compare with the leader's digest of the flags up to an item, or of all that it has sent.

        A FlagMismatch if the flags differ, or the item is not the chunk-step that was decided last.
        """
        where = "" if item is None else f" at tick {item.tick}, chunk {item.chunk}"
        if self.digest != digest:
            both = f"digest {self.digest.hex()} is not {digest.hex()}"
            raise FlagMismatch(f"the reuse flags differ from the leader's{where}: {both}")
        if item is not None and item.step is not None and self._last != (item.tick, item.chunk):
            raise FlagMismatch(f"the work{where} is out of order: the last decision was for {self._last}")


def _order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    return ((tick.index, chunk) for tick in schedule for chunk, _ in tick.active)
