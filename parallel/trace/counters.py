"""What a rank counts while it serves: items, bytes, seconds of the device, and digests of the reuse flags."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch.distributed import Store

OnMeasured = Callable[[float, float], None]


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
    digests: dict[str, str] = field(default_factory=dict)  # of the reuse flags of each finished request, as hexadecimal


def publish_counters(store: Store, session: int, counters: RankCounters) -> None:
    """Leave a rank's counters in the store for the leader."""
    store.set(f"counters/{session}/{counters.rank}", json.dumps(asdict(counters)))


def collect_counters(store: Store, session: int, ranks: int) -> list[RankCounters]:
    """The counters of all ranks, once each has published its own."""
    keys = [f"counters/{session}/{rank}" for rank in range(ranks)]
    store.wait(keys)
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
