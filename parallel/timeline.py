"""What a rank did when, as spans of a Chrome or Perfetto trace.

Times are those of the machine's clock, so that the ranks of one machine fit together. It is told what happened and does
not know why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.work import WorkItem
from models.errors import InputError

__all__ = ["Event", "Timeline", "merge_traces"]

Event = dict[str, Any]


class Timeline:
    """Spans of one rank; without `wanted` it remembers nothing.

    Args:
        rank: the trace's process.
        name: of the rank.
        wanted: remember.
    """

    def __init__(self, rank: int, name: str, *, wanted: bool) -> None:
        self._rank, self._wanted = rank, wanted
        self._offset = time.time() - time.perf_counter()
        self._events: list[Event] = []
        if wanted:
            self._events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})

    def add(self, kind: str, began: float, item: WorkItem | None = None, *, lane: int = 0) -> None:
        """A span that ends now.

        Args:
            kind: `compute`, `wait`, `decode`, ...
            began: `time.perf_counter()` at its start.
            item: what it was done for.
            lane: 0 for the main thread, another for what runs beside it.
        """
        if not self._wanted:
            return
        ended = time.perf_counter()
        event: Event = {
            "ph": "X",
            "name": kind if item is None else f"{item.what.name} {item.chunk}",
            "cat": kind,
            "pid": self._rank,
            "tid": lane,
            "ts": round((began + self._offset) * 1e6, 1),
            "dur": round((ended - began) * 1e6, 1),
        }
        if item is not None:
            event["args"] = {"request": item.request, "tick": item.tick, "chunk": item.chunk, "step": item.step}
        self._events.append(event)

    @property
    def wanted(self) -> bool:
        """Whether it remembers anything."""
        return self._wanted

    @property
    def events(self) -> Sequence[Event]:
        """All so far."""
        return tuple(self._events)


def merge_traces(events: Iterable[Sequence[Event]], path: Path) -> None:
    """Write one trace file of all ranks.

    Raises:
        InputError: it cannot be written.
    """
    merged = [event for part in events for event in part]
    try:
        path.write_text(json.dumps({"traceEvents": merged, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise InputError(f"cannot write the trace {path}: {error.strerror}") from None
