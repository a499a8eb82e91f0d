"""What a rank writes down of itself while it serves: when it did what, as spans of a trace, and counters.

Spans are of Chrome's and Perfetto's format. Times are on the machine's clock, so that the ranks of one machine fit
together. They go to a temporary file, and from there to the leader in blocks, so that a long video needs no more memory
than a short one.
"""

import json
import os
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from engine.files import atomic_write, write_errors
from engine.video import WorkItem
from models.errors import InputError
from parallel.comm.store import RunStore
from parallel.mesh import Mesh

_BLOCK = 1 << 20  # bytes of lines that are shipped at once
KEPT_DIGESTS = 64
OnMeasured = Callable[[float, float], None]


class Tracer:
    """The spans of the rank of a mesh, from any of its threads. Nothing is recorded that is not wanted."""

    def __init__(self, mesh: Mesh, *, wanted: bool) -> None:
        self.wanted = wanted
        self._rank = mesh.rank
        self._offset = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._spool: IO[bytes] | None = None
        try:
            self._spool = tempfile.TemporaryFile(prefix="flowcache-trace-") if wanted else None
        except OSError as error:
            raise InputError(f"cannot write the trace: {error.strerror}") from None
        self._read = 0  # bytes
        place = {"stage": mesh.stage, "cp_rank": mesh.cp_rank}
        self._put("process_name", "M", args={"name": mesh.name(mesh.rank), **place})
        self._put("process_sort_index", "M", args={"sort_index": mesh.rank})
        self.name_track(0, "layers")
        if mesh.leads:
            self.name_track(1, "decoding")

    def name_track(self, track: int, name: str) -> None:
        """Name a track."""
        self._put("thread_name", "M", tid=track, args={"name": name})

    def add(
        self, kind: str, began: float, item: WorkItem | None = None, *, ended: float | None = None, track: int = 0
    ) -> None:
        """Record a span of a kind: `compute`, `compress`, `wait`, `decode`, `send` or `snapshot`.

        It `began` and `ended`, or ends now, on the clock of `time.perf_counter()`. Track 0 is of the layers and 1 of
        decoding; 2 and on are of what is sent.
        """
        if not self.wanted:
            return
        took = (time.perf_counter() if ended is None else ended) - began
        name, about = kind, {}
        if item is not None:
            tick, chunk = item.place
            name = kind if kind in ("send", "compress") else f"{item.what.name} {chunk}"
            args = {"request": item.request, "tick": tick, "chunk": chunk, "step": item.step}
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

    def ship(self, store: RunStore, session: int) -> None:
        """Leave the events that were not read yet in the store, in compressed blocks, for `shipped_events`."""
        if not self.wanted:
            return
        count = 0
        for block in self._blocks():
            store.set(_trace_key(session, self._rank, count), zlib.compress(block))
            count += 1
        store.set(_trace_key(session, self._rank), str(count))

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
        with (
            self._lock,
            write_errors(Path(tempfile.gettempdir()), "the trace to", advice="; name another folder by TMPDIR"),
        ):
            self._spool.write(line.encode() + b"\n")


def shipped_events(store: RunStore, session: int, rank: int) -> Iterator[str]:
    """The events that a rank has shipped, each as JSON; they are deleted from the store."""
    end = _trace_key(session, rank)
    for number in range(int(store.get(end))):
        key = _trace_key(session, rank, number)
        block = zlib.decompress(store.get(key)).decode()
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


def _trace_key(session: int, rank: int, block: int | None = None) -> str:
    return f"trace/{session}/{rank}" + ("" if block is None else f"/{block}")


# ---- counters


@dataclass(slots=True)
class RankCounters:
    """Counts of one rank, from the start of serving on."""

    rank: int
    stage: int
    cp_rank: int  # among the ranks of its stage
    layers: tuple[int, int]  # first layer and one past the last
    transfer: str = "gloo"  # how tensors move between ranks: `nccl`, `host` (GPUs through host memory) or `gloo`
    weight_bytes: int = 0  # bytes of the parameters that it holds
    load_seconds: float = 0.0  # for loading them; 0 if that was not measured
    items: int = 0  # passes of chunks through its layers
    item_bytes: int = 0  # bytes received with work items, headers counted
    velocity_bytes: int = 0  # bytes received with velocities, headers counted; on the leader only
    checkpoints: int = 0  # snapshots taken
    checkpoint_bytes: int = 0  # bytes received with messages about checkpoints, headers counted
    sent_bytes: int = 0  # bytes sent in all
    busy: float = 0.0  # seconds in its layers, on the device
    waiting: float = 0.0  # seconds without work
    digests: dict[str, str] = field(default_factory=dict)  # of the reuse flags of the last requests, as hexadecimal

    def finished(self, request: int, digest: bytes) -> None:
        """Note the digest of a finished request's flags; of many requests the last `KEPT_DIGESTS` stay."""
        self.digests[str(request)] = digest.hex()
        if len(self.digests) > KEPT_DIGESTS:
            del self.digests[next(iter(self.digests))]


def publish_counters(store: RunStore, session: int, counters: RankCounters) -> None:
    """Leave a rank's counters in the store for the leader."""
    store.set(f"counters/{session}/{counters.rank}", json.dumps(asdict(counters)))


def collect_counters(store: RunStore, session: int, ranks: int) -> list[RankCounters]:
    """The counters of all ranks, once each has published its own."""
    keys = [f"counters/{session}/{rank}" for rank in range(ranks)]
    loaded = [json.loads(raw) for raw in store.multi_get(keys)]
    return [RankCounters(**{**values, "layers": tuple(values["layers"])}) for values in loaded]


class DeviceTimer:
    """Measures when the device computes, without waiting for it. `new_event` makes an event of the device.

    On a GPU each measurement is a pair of events on the compute stream. It is resolved later, in order, once the device
    has passed its end. Durations are chained from an event whose moment on the host's clock is known, so that spans of
    the device and of the host fit together.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], torch.cuda.Event] | None = None) -> None:
        self._new_event = new_event or partial(torch.cuda.Event, enable_timing=True)
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event, OnMeasured | None]] = deque()
        self._reference: tuple[torch.cuda.Event, float] | None = None  # an event and its moment

    @contextmanager
    def measure(self, on_measured: OnMeasured | None = None) -> Iterator[None]:
        """Around work that is launched on the current stream.

        `on_measured` is given start and end on the clock of `time.perf_counter()`, once they are known.
        """
        if not self._gpu:
            began = time.perf_counter()
            yield
            self._add(began, time.perf_counter(), on_measured)
            return
        if self._reference is None:
            event = self._new_event()
            event.record()
            event.synchronize()  # waits for what this stream did before the first measurement, once
            self._reference = event, time.perf_counter()
        start, end = self._new_event(), self._new_event()
        start.record()
        yield
        end.record()
        self._open.append((start, end, on_measured))
        self._resolve(wait=False)

    def seconds(self) -> float:
        """The sum of all measurements; waits for those that the device has not passed yet."""
        self._resolve(wait=True)
        return self._seconds

    def _resolve(self, *, wait: bool) -> None:
        while self._open and (wait or self._open[0][1].query()):
            start, end, on_measured = self._open.popleft()
            end.synchronize()
            assert self._reference is not None
            before, moment = self._reference
            began = moment + before.elapsed_time(start) / 1e3
            ended = began + start.elapsed_time(end) / 1e3
            self._reference = end, ended
            self._add(began, ended, on_measured)

    def _add(self, began: float, ended: float, on_measured: OnMeasured | None) -> None:
        self._seconds += ended - began
        if on_measured is not None:
            on_measured(began, ended)
