"""Showing how far a video is: a live bar in a terminal, a plain line now and then elsewhere.

It knows the engine's progress events and nothing of models or files. All of it goes to standard error.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from engine.progress import Progress

_PLAIN_EVERY = 5.0  # seconds


class Display(Protocol):
    """Where progress is shown, as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def phase(self, text: str) -> None:
        """Say what is done now."""

    def begin(self, video: int, name: str) -> None:
        """One of several videos begins; without this there is one video, which needs no name."""

    def update(self, progress: Progress, video: int = 0) -> None:
        """Take an event of the engine."""

    def end(self, video: int, text: str) -> None:
        """One of several videos is complete."""


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
    """Bars that are redrawn in place: one for each video in flight."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._phase: TaskID | None = self._bar.add_task("starting", total=None, note="")
        self._videos: dict[int, TaskID] = {}
        self._names: dict[int, str] = {}
        self._paces: dict[int, _Pace] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, text: str) -> None:
        """Say what is done now; the bar only pulses."""
        assert self._phase is not None
        self._bar.update(self._phase, description=text, note="")
        self._paces.clear()

    def begin(self, video: int, name: str) -> None:
        """Another bar."""
        self._names[video] = name
        self._task(video)

    def update(self, progress: Progress, video: int = 0) -> None:
        """Move a bar."""
        done, total = steps_done(progress), progress.chunks * progress.num_steps
        name = f"{self._names[video]}  " if video in self._names else ""
        pace = self._paces.setdefault(video, _Pace())
        self._bar.update(
            self._task(video),
            total=total,
            completed=done,
            description=f"{name}chunks {progress.chunks_done}/{progress.chunks}"
            f"  step {progress.step}/{progress.num_steps}",
            note=f"{_costs(progress)}  {pace.left(done / total)} left",
        )

    def end(self, video: int, text: str) -> None:
        """Take a bar away, and leave a line."""
        self._names.pop(video, None)
        if (task := self._videos.pop(video, None)) is not None:
            self._bar.remove_task(task)
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _task(self, video: int) -> TaskID:
        """A video's bar; the first takes the place of the one that pulses."""
        if video not in self._videos:
            if self._phase is not None:
                self._bar.remove_task(self._phase)
                self._phase = None
            self._videos[video] = self._bar.add_task(self._names.get(video, ""), total=None, note="")
            self._paces[video] = _Pace()
        return self._videos[video]


class PlainDisplay:
    """One line at the start of each phase, and then one for each video every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._names: dict[int, str] = {}
        self._paces: dict[int, _Pace] = {}
        self._shown: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, text: str) -> None:
        """Say what is done now."""
        self._say(text)
        self._paces[0] = _Pace()

    def begin(self, video: int, name: str) -> None:
        """Lines of this video begin with its name."""
        self._names[video], self._paces[video] = name, _Pace()

    def update(self, progress: Progress, video: int = 0) -> None:
        """Say how far it is, if it was not said just now."""
        now, last = time.monotonic(), progress.tick == progress.ticks
        if now - self._shown.get(video, float("-inf")) < _PLAIN_EVERY and not last:
            return
        self._shown[video] = now
        share = steps_done(progress) / (progress.chunks * progress.num_steps)
        name = f"{self._names[video]}: " if video in self._names else ""
        left = self._paces.setdefault(video, _Pace()).left(share)
        self._say(
            f"{name}chunks {progress.chunks_done}/{progress.chunks}, step {progress.step}/{progress.num_steps}, "
            f"{share:.0%}, {_costs(progress)}, {left} left"
        )

    def end(self, video: int, text: str) -> None:
        """Say that a video is complete."""
        self._names.pop(video, None)
        self._say(text)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
