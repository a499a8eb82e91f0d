"""Where the time of one process goes: an executor that takes times for every stage that the layers will be cut into.

The clock is read where a stage would begin. What every stage does for itself before its first layer (embedding the
condition and the text, changing its KV) counts for each of them, as each will do it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from benchmarks.pipeline_job import TimedCall, Timing
from engine.executor import Stage
from engine.video import Work, WorkItem
from models.magi.model import MagiModel


class TimedExecutor(Stage):
    """A whole model that runs here, with times.

    Args:
        model: all layers.
        split: how many of them each stage will have.
    """

    def __init__(self, model: MagiModel, split: Sequence[int]) -> None:
        super().__init__(model)
        self._marks: list[float] = []
        self._sums: dict[tuple[str, int | None], list[float]] = {}
        self._counts: dict[tuple[str, int | None], int] = {}
        self._embed = self._total = 0.0
        self._hooks = [
            model.dit.videodit_blocks.layers[str(start)].register_forward_pre_hook(self._mark)
            for start in (0, *accumulate(split[:-1]))
        ]

    @torch.no_grad()
    def run(self, work: Work) -> Tensor:
        """Run one item; the velocity [1, C, T, h, w] fp32."""
        self._marks.clear()
        began = time.perf_counter()
        patches = self.model.patches(work.x)
        embedded = time.perf_counter()
        self.change(work.item)
        hidden = self.forward(work.item, patches)
        through = time.perf_counter()
        velocity = self.model.velocity(hidden, self.admitted(work.item.request).grid)
        ended = time.perf_counter()
        self._note(work.item, embedded - began, embedded, through, ended - through if work.item.what.weight else 0.0)
        self._total += ended - began
        return velocity

    def timing(self, seconds: float) -> Timing:
        """What was measured.

        Args:
            seconds: that making the videos took in all.
        """
        for hook in self._hooks:
            hook.remove()
        calls = [
            TimedCall(name=name, step=step, count=count, seconds=tuple(one / count for one in self._sums[name, step]))
            for (name, step), count in self._counts.items()
        ]
        passes = sum(self._counts.values())
        return Timing(calls=tuple(calls), embed=self._embed / passes, rest=(seconds - self._total) / passes)

    def _mark(self, module: nn.Module, arguments: tuple[object, ...]) -> None:
        self._marks.append(time.perf_counter())

    def _note(self, item: WorkItem, embed: float, began: float, through: float, read_out: float) -> None:
        shared = self._marks[0] - began
        ends = [*self._marks[1:], through]
        spent = [shared + end - start for start, end in zip(self._marks, ends, strict=True)]
        spent[0] += embed
        spent[-1] += read_out
        key = item.what.name, item.step
        sums = self._sums.setdefault(key, [0.0] * len(spent))
        self._sums[key] = [a + b for a, b in zip(sums, spent, strict=True)]
        self._counts[key] = self._counts.get(key, 0) + 1
        self._embed += embed
