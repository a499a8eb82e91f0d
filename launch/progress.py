"""Showing how far a video is: a live bar in a terminal, a plain line now and then elsewhere.

It knows the engine's progress events and nothing of models or files. All of it goes to standard error.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from engine.engine import Progress

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "clock", "open_display", "steps_done"]

_PLAIN_EVERY = 5.0  # seconds


class Display(Protocol):
    """Where progress is shown, as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def phase(self, text: str) -> None:
        """Say what is done now."""

    def update(self, progress: Progress) -> None:
        """Take an event of the engine."""


def open_display() -> Display:
    """The display that fits where standard error goes."""
    console = Console(stderr=True)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def clock(seconds: float) -> str:
    """Seconds as 0:00 or 0:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def steps_done(progress: Progress) -> int:
    """Steps that all chunks together have done; of `chunks * num_steps` in all.

    Ticks are no measure of time, since the window is not full at the start and at the end. A chunk enters every
    `num_steps / window` ticks and takes a step with every tick (specification 7.3).
    """
    stage = (progress.ticks - progress.num_steps) // max(1, progress.chunks - 1)
    waited = (progress.tick - chunk * stage for chunk in range(progress.chunks))
    return sum(min(progress.num_steps, max(0, ticks)) for ticks in waited)


def _costs(progress: Progress) -> str:
    """What reuse has left to compute so far, and how full the KV buffer is."""
    return f"{progress.computed_fraction:.0%} computed, KV {progress.kv_fill:.0%} full"


class _Pace:
    """Time left, from the pace so far."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def left(self, share: float) -> str:
        return clock((time.monotonic() - self._began) * (1 - share) / share)


class LiveDisplay:
    """A bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._pace = _Pace()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, text: str) -> None:
        """Say what is done now; the bar only pulses."""
        self._bar.update(self._task, description=text, note="")
        self._pace = _Pace()

    def update(self, progress: Progress) -> None:
        """Move the bar."""
        done, total = steps_done(progress), progress.chunks * progress.num_steps
        self._bar.update(
            self._task,
            total=total,
            completed=done,
            description=f"chunks {progress.chunks_done}/{progress.chunks}  step {progress.step}/{progress.num_steps}",
            note=f"{_costs(progress)}  {self._pace.left(done / total)} left",
        )


class PlainDisplay:
    """One line at the start of each phase, and then one every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = _Pace()
        self._shown = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, text: str) -> None:
        """Say what is done now."""
        self._say(text)
        self._pace = _Pace()

    def update(self, progress: Progress) -> None:
        """Say how far it is, if it was not said just now."""
        now, last = time.monotonic(), progress.tick == progress.ticks
        if now - self._shown < _PLAIN_EVERY and not last:
            return
        self._shown = now
        share = steps_done(progress) / (progress.chunks * progress.num_steps)
        self._say(
            f"chunks {progress.chunks_done}/{progress.chunks}, step {progress.step}/{progress.num_steps}, "
            f"{share:.0%}, {_costs(progress)}, {self._pace.left(share)} left"
        )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
