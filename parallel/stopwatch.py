"""Seconds that a device has computed: by the clock on a CPU, by events of its stream on a GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
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
