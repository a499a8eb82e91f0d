"""What a rank counts while it serves: calls, bytes, seconds, and the digests of the reuse flags it has seen."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch.distributed import Store


@dataclass(slots=True)
class RankCounters:
    """Counts of one rank, from the start of serving on."""

    rank: int
    stage: int
    cp_rank: int  # its place in the stage
    layers: tuple[int, int]  # first layer and one past the last
    weight_bytes: int = 0  # bytes of the parameters that it holds
    load_seconds: float = 0.0  # what loading them took, if it was measured
    items: int = 0  # stage calls: passes of chunks through its layers
    item_bytes: int = 0  # bytes received with work items, headers counted
    velocity_bytes: int = 0  # bytes received with velocities, headers counted; on the lead only
    checkpoints: int = 0  # snapshots taken
    checkpoint_bytes: int = 0  # bytes received with messages about checkpoints, headers counted
    sent_bytes: int = 0  # bytes sent, whatever for
    busy: float = 0.0  # seconds in its layers
    waiting: float = 0.0  # seconds without work
    digests: dict[str, str] = field(default_factory=dict)  # of the flags of every request that is over, as hexadecimal


def publish_counters(store: Store, session: int, report: RankCounters) -> None:
    """Leave a rank's report for the lead."""
    store.set(f"report/{session}/{report.rank}", json.dumps(asdict(report)))


def collect_counters(store: Store, session: int, ranks: int) -> list[RankCounters]:
    """The reports of all ranks, once they have left them."""
    keys = [f"report/{session}/{rank}" for rank in range(ranks)]
    store.wait(keys)
    loaded = [json.loads(raw) for raw in store.multi_get(keys)]
    return [RankCounters(**{**values, "layers": tuple(values["layers"])}) for values in loaded]


class DeviceTimer:
    """Adds up what is measured.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Around what is launched."""
        if not self._gpu:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._open.append((start, end))
        self._add(wait=False)

    def seconds(self) -> float:
        """The sum so far; waits for what is under way."""
        self._add(wait=True)
        return self._seconds

    def _add(self, *, wait: bool) -> None:
        while self._open and (wait or self._open[0][1].query()):
            start, end = self._open.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
