"""Showing how far a video is: a live bar in a terminal, a plain line now and then elsewhere.

It knows the engine's progress events and nothing of models or files. All of it goes to standard error.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, SpinnerColumn, TextColumn

from engine.engine import Progress

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "clock", "open_display"]

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


class _Pace:
    """Time left, from the pace so far."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def left(self, progress: Progress) -> str:
        if not progress.items_done:
            return "-:--"
        elapsed = time.monotonic() - self._began
        return clock(elapsed * (progress.items - progress.items_done) / progress.items_done)


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
        self._task = self._bar.add_task("", total=None, note="")
        self._pace: _Pace | None = None

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

    def update(self, progress: Progress) -> None:
        """Move the bar."""
        self._pace = self._pace or _Pace()
        self._bar.update(
            self._task,
            total=progress.items,
            completed=progress.items_done,
            description=f"chunks {progress.chunks_done}/{progress.chunks}  step {progress.step}/{progress.num_steps}",
            note=f"{self._pace.left(progress)} left",
        )


class PlainDisplay:
    """One line at the start of each phase, and then one every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace: _Pace | None = None
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

    def update(self, progress: Progress) -> None:
        """Say how far it is, if it was not said just now."""
        self._pace = self._pace or _Pace()
        now = time.monotonic()
        if now - self._shown < _PLAIN_EVERY and progress.items_done < progress.items:
            return
        self._shown = now
        share = progress.items_done / progress.items
        self._say(
            f"chunks {progress.chunks_done}/{progress.chunks}, step {progress.step}/{progress.num_steps}, "
            f"{share:.0%}, {self._pace.left(progress)} left"
        )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
