"""What a rank did when, as spans of a Chrome or Perfetto trace.

Times are those of the machine's clock, so that the ranks of one machine fit together. It is told what happened and does
not know why. Spans go to a temporary file as they come, and from there to the lead in blocks, so that a long video
needs no more memory than a short one.
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

from engine.video import WorkItem
from models.errors import InputError

Event = dict[str, Any]
_HELD = 512  # lines in memory before they go to the file
_BLOCK = 1 << 20  # bytes of lines that are shipped at once


class Tracer:
    """Spans of one rank, told by all of its threads; without `wanted` it remembers nothing.

    Args:
        rank: the trace's process.
        name: of the rank.
        wanted: remember.
        about: more that is known of the rank, for whoever reads the trace.
    """

    def __init__(self, rank: int, name: str, *, wanted: bool, about: Mapping[str, Any] | None = None) -> None:
        self._rank, self._wanted = rank, wanted
        self._offset = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._held: list[str] = []
        self._spool: IO[bytes] | None = None
        self._read = 0
        if wanted:
            self._put({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name, **(about or {})}})
            self._put({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
            self.name_track(0, "layers")
            if not rank:
                self.name_track(1, "decoding")

    @property
    def wanted(self) -> bool:
        """Whether it remembers anything."""
        return self._wanted

    def name_track(self, track: int, name: str) -> None:
        """Say what a track is for."""
        self._put({"ph": "M", "name": "thread_name", "pid": self._rank, "tid": track, "args": {"name": name}})

    def add(self, kind: str, began: float, item: WorkItem | None = None, *, track: int = 0) -> None:
        """A span that ends now.

        Args:
            kind: `compute`, `compress`, `wait`, `decode`, `send`.
            began: `time.perf_counter()` at its start.
            item: what it was done for.
            track: 0 for the main thread, 1 for decoding, 2 and on for what is sent.
        """
        if not self._wanted:
            return
        ended = time.perf_counter()
        event: Event = {
            "ph": "X",
            "name": kind if item is None or kind in ("send", "compress") else f"{item.what.name} {item.chunk}",
            "cat": kind,
            "pid": self._rank,
            "tid": track,
            "ts": round((began + self._offset) * 1e6, 1),
            "dur": round((ended - began) * 1e6, 1),
        }
        if item is not None:
            event["args"] = _about(item)
        self._put(event)

    def mark(self, kind: str, *, request: int, tick: int, chunk: int, step: int) -> None:
        """A moment, now: a decision about a chunk's step."""
        self._put(
            {
                "ph": "i",
                "s": "t",
                "name": f"{kind} {chunk}",
                "cat": kind,
                "pid": self._rank,
                "tid": 0,
                "ts": round((time.perf_counter() + self._offset) * 1e6, 1),
                "args": {"request": request, "tick": tick, "chunk": chunk, "step": step},
            }
        )

    def lines(self) -> Iterator[str]:
        """What was not read yet, one event in JSON each."""
        with self._lock:
            self._flush()
            spool, end = self._spool, 0 if self._spool is None else self._spool.tell()
        while spool is not None and self._read < end:
            with self._lock:
                spool.seek(self._read)
                block = spool.read(min(_BLOCK, end - self._read))
                spool.seek(0, os.SEEK_END)
            block = block[: block.rindex(b"\n") + 1]
            self._read += len(block)
            yield from block.decode().splitlines()

    def ship(self, store: Store, session: int) -> None:
        """Leave what was not read yet for the lead, in compressed blocks; `shipped_events` takes them."""
        if not self._wanted:
            return
        count, size, held = 0, 0, []
        for line in self.lines():
            held.append(line)
            size += len(line)
            if size > _BLOCK:
                store.set(_key(session, self._rank, count), _packed(held))
                count, size, held = count + 1, 0, []
        store.set(_key(session, self._rank, count), _packed(held))
        store.set(_key(session, self._rank), str(count + 1))

    def _put(self, event: Event) -> None:
        if not self._wanted:
            return
        line = json.dumps(event, separators=(",", ":"))
        with self._lock:
            self._held.append(line)
            if len(self._held) >= _HELD:
                self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        if self._spool is None:
            self._spool = tempfile.TemporaryFile(prefix="flowcache-trace-")
        self._spool.write(("\n".join(self._held) + "\n").encode())
        self._spool.flush()
        self._held.clear()


def shipped_events(store: Store, session: int, rank: int) -> Iterator[str]:
    """What a rank has shipped, one event in JSON each; the store lets go of it."""
    end = _key(session, rank)
    store.wait([end])
    for number in range(int(store.get(end))):
        key = _key(session, rank, number)
        block = zlib.decompress(b64decode(store.get(key))).decode()
        with suppress(RuntimeError):  # not every kind of store can forget
            store.delete_key(key)
        yield from block.splitlines()


def merge_traces(parts: Iterable[Iterable[str]], path: Path) -> None:
    """Write one trace file of all ranks, line by line; it appears when it is whole.

    Args:
        parts: events in JSON, of one rank after another.
        path: of the file.

    Raises:
        InputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            first = True
            for lines in parts:
                for line in lines:
                    file.write(("\n" if first else ",\n") + line)
                    first = False
            file.write("\n]}\n")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write the trace {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _packed(lines: list[str]) -> str:
    return b64encode(zlib.compress("\n".join(lines).encode())).decode()


def _about(item: WorkItem) -> Event:
    return {
        "request": item.request,
        "tick": item.tick,
        "chunk": item.chunk,
        "step": item.step,
        "what": item.what.name,
        "returns": bool(item.what.weight),
    }


def _key(session: int, rank: int, block: int | None = None) -> str:
    return f"trace/{session}/{rank}" + ("" if block is None else f"/{block}")
