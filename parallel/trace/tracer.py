"""When a rank did what, as spans of a Chrome or Perfetto trace.

Times are on the machine's clock, so that the ranks of one machine fit together. The tracer records what it is given, in
any order, and does not know devices. Spans go to a temporary file, and from there to the leader in blocks, so that a
long video needs no more memory than a short one.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from torch.distributed import Store

from engine.files import atomic_write
from engine.video import WorkItem

_BLOCK = 1 << 20  # bytes of lines that are shipped at once


class Tracer:
    """The spans of one rank, from any of its threads. Nothing is recorded that is not wanted.

    `about` says more about the rank, for readers of the trace.
    """

    def __init__(self, rank: int, name: str, *, wanted: bool, about: Mapping[str, Any] | None = None) -> None:
        self.wanted = wanted
        self._rank = rank
        self._offset = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._spool: IO[bytes] | None = tempfile.TemporaryFile(prefix="flowcache-trace-") if wanted else None
        self._read = 0  # bytes
        self._put("process_name", "M", args={"name": name, **(about or {})})
        self._put("process_sort_index", "M", args={"sort_index": rank})
        self.name_track(0, "layers")
        if not rank:
            self.name_track(1, "decoding")

    def name_track(self, track: int, name: str) -> None:
        """Name a track."""
        self._put("thread_name", "M", tid=track, args={"name": name})

    def add(
        self, kind: str, began: float, item: WorkItem | None = None, *, ended: float | None = None, track: int = 0
    ) -> None:
        """Record a span.

        Args:
            kind: `compute`, `compress`, `wait`, `decode`, `send`, `snapshot`.
            began: its start, on the clock of `time.perf_counter()`.
            item: that it worked on.
            ended: its end on that clock; None for now.
            track: 0 for the layers, 1 for decoding, 2 and on for what is sent.
        """
        if not self.wanted:
            return
        took = (time.perf_counter() if ended is None else ended) - began
        name, about = kind, {}
        if item is not None:
            name = kind if kind in ("send", "compress") else f"{item.what.name} {item.chunk}"
            args = {"request": item.request, "tick": item.tick, "chunk": item.chunk, "step": item.step}
            about = {"args": {**args, "what": item.what.name, "returns": bool(item.what.weight)}}
        self._put(name, "X", cat=kind, tid=track, ts=self._microseconds(began), dur=round(took * 1e6, 1), **about)

    def mark(self, kind: str, *, request: int, tick: int, chunk: int, step: int) -> None:
        """Record a moment, now: a decision about a chunk's step."""
        about = {"request": request, "tick": tick, "chunk": chunk, "step": step}
        now = self._microseconds(time.perf_counter())
        self._put(f"{kind} {chunk}", "i", s="t", cat=kind, tid=0, ts=now, args=about)

    def lines(self) -> Iterator[str]:
        """The events that were not read yet, each as JSON."""
        for block in self._blocks():
            yield from block.decode().splitlines()

    def ship(self, store: Store, session: int) -> None:
        """Leave the events that were not read yet in the store, in compressed blocks, for `shipped_events`."""
        if not self.wanted:
            return
        count = 0
        for block in self._blocks():
            store.set(_key(session, self._rank, count), b64encode(zlib.compress(block)).decode())
            count += 1
        store.set(_key(session, self._rank), str(count))

    def _blocks(self) -> Iterator[bytes]:
        """Whole lines that were not read yet; other threads may go on to write."""
        if self._spool is None:
            return
        with self._lock:
            end = self._spool.tell()
        while self._read < end:
            with self._lock:
                self._spool.seek(self._read)
                block = self._spool.read(min(_BLOCK, end - self._read))
                self._spool.seek(0, os.SEEK_END)
            block = block[: block.rindex(b"\n") + 1]
            self._read += len(block)
            yield block

    def _microseconds(self, moment: float) -> float:
        return round((moment + self._offset) * 1e6, 1)

    def _put(self, name: str, phase: str, **values: Any) -> None:
        if self._spool is None:
            return
        line = json.dumps({"name": name, "ph": phase, "pid": self._rank, **values}, separators=(",", ":"))
        with self._lock:
            self._spool.write(line.encode() + b"\n")


def shipped_events(store: Store, session: int, rank: int) -> Iterator[str]:
    """The events that a rank has shipped, each as JSON; they are deleted from the store."""
    end = _key(session, rank)
    store.wait([end])
    for number in range(int(store.get(end))):
        key = _key(session, rank, number)
        block = zlib.decompress(b64decode(store.get(key))).decode()
        with suppress(RuntimeError):  # not every kind of store can delete
            store.delete_key(key)
        yield from block.splitlines()


def merge_traces(parts: Iterable[Iterable[str]], path: Path) -> None:
    """Write the events of one rank after another to a file, which appears when whole; an InputError if it cannot."""
    with atomic_write(path, "the trace") as file:
        file.write(b'{"displayTimeUnit": "ms", "traceEvents": [')
        separator = b"\n"
        for lines in parts:
            for line in lines:
                file.write(separator + line.encode())
                separator = b",\n"
        file.write(b"\n]}\n")


def _key(session: int, rank: int, block: int | None = None) -> str:
    return f"trace/{session}/{rank}" + ("" if block is None else f"/{block}")
