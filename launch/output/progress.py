"""Showing how far videos are: live bars in a terminal, a plain line now and then elsewhere.

It knows the engine's progress events and nothing of models or files. All of it goes to standard error.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from engine.progress import Progress
from launch.output.terminal import clock, say

_PLAIN_EVERY = 5.0  # seconds


def steps_done(progress: Progress) -> int:
    """Steps that all chunks together have done; of `chunks * num_steps` in all.

    Ticks are no measure of time, since the window is not full at the start and at the end. A chunk enters every
    `num_steps / window` ticks and takes a step with every tick (specification 7.3).
    """
    tick, steps, chunks = progress.tick, progress.num_steps, progress.chunks
    if chunks == 1:
        return min(steps, tick)
    between = (progress.ticks - steps) // (chunks - 1)  # ticks from one chunk's entry to the next's
    whole = max(0, min(chunks, (tick - steps) // between + 1))
    entered = min(chunks, (tick - 1) // between + 1)
    return whole * steps + sum(tick - chunk * between for chunk in range(whole, entered))


class Display:
    """Where progress is shown, as a context.

    Args:
        console: a terminal gets bars that are redrawn in place, one for each video in flight; anything else gets lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._phase: TaskID | None = None
        self._tasks: dict[int, TaskID] = {}
        self._names: dict[int, str] = {}
        self._began: dict[int, float] = {}
        self._shown: dict[int, float] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def phase(self, text: str) -> None:
        """Say what is done now, before the first video begins; later it is a line among the bars."""
        if self._bars is None or self._tasks:
            say(self._console, text)
        elif self._phase is None:
            self._phase = self._bars.add_task(text, total=None, note="")
        else:
            self._bars.update(self._phase, description=text)

    def begin(self, video: int, name: str = "") -> None:
        """A video begins; of several, each has a name."""
        self._names[video], self._began[video] = name, time.monotonic()
        if self._bars is not None:
            if self._phase is not None:
                self._bars.remove_task(self._phase)
                self._phase = None
            self._tasks[video] = self._bars.add_task(name, total=None, note="")

    def update(self, progress: Progress, video: int = 0) -> None:
        """Show how far a video is; plain lines come some seconds apart."""
        done, total = steps_done(progress), progress.chunks * progress.num_steps
        if video not in self._names:
            self.begin(video)
        now, name = time.monotonic(), self._names[video]
        left = clock((now - self._began[video]) * (total - done) / done)
        chunks, step = f"chunks {progress.chunks_done}/{progress.chunks}", f"step {progress.step}/{progress.num_steps}"
        costs = f"{progress.computed_fraction:.0%} computed, KV {progress.kv_fill:.0%} full"
        if self._bars is not None:
            text = f"{name}  {chunks}  {step}" if name else f"{chunks}  {step}"
            note = f"{costs}  {left} left"
            self._bars.update(self._tasks[video], total=total, completed=done, description=text, note=note)
        elif now - self._shown.get(video, float("-inf")) >= _PLAIN_EVERY or progress.tick == progress.ticks:
            self._shown[video] = now
            start = f"{name}: " if name else ""
            say(self._console, f"{start}{chunks}, {step}, {done / total:.0%}, {costs}, {left} left")

    def end(self, video: int, text: str = "") -> None:
        """A video is complete: its bar goes, and a line stays."""
        self._names.pop(video, None)
        if self._bars is not None and (task := self._tasks.pop(video, None)) is not None:
            self._bars.remove_task(task)
        if text:
            say(self._console, text)


def _bars(console: Console) -> Bars:
    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
        console=console,
        transient=True,
    )
