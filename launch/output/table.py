"""Showing how far a batch is: a live table in a terminal, plain lines elsewhere, and a summary at the end.

It knows plain rows; who fills them is not its business. All of it goes to standard error.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.output.terminal import clock, one_line, say

_PLAIN_EVERY = 10.0  # seconds
_PROMPT = 60  # letters, in plain lines


class State(StrEnum):
    """Where a video is; the order is that of the table."""

    RUNNING = "running"
    RESTARTING = "restarting"
    FAILED = "failed"
    QUEUED = "queued"
    DONE = "done"
    KEPT = "there already"


_STYLES = {
    State.RUNNING: "cyan",
    State.RESTARTING: "yellow",
    State.FAILED: "red",
    State.QUEUED: "dim",
    State.DONE: "green",
    State.KEPT: "green dim",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A video of the batch at one moment; at its end also a line of the results."""

    line: int  # of the batch file
    title: str  # prompt or name
    state: State  # where it is
    chunks: int  # of the whole video
    chunks_done: int = 0  # finished and handed out
    gang: str | None = None  # that has it; None where none has
    computed: float | None = None  # computed chunk-steps as a share of all so far; None before the first
    seconds_left: float | None = None  # None where nobody can say
    restarts: int = 0  # so far
    error: str | None = None  # why it failed; None if it did not


class BatchDisplay:
    """Where a batch is shown, as a context.

    Args:
        console: a terminal gets a table that is redrawn in place and is gone at the end; anything else gets a line
            whenever a video begins, restarts or ends, and one for all of them now and then.
        now: a clock in seconds.
    """

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console or Console(stderr=True), now
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
        self._states: dict[int, State] = {}
        self._said = now()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, rows: Sequence[Row]) -> None:
        """Show all videos of the batch as they are now; to be called as often as one likes."""
        if self._live is not None:
            self._live.update(render(rows, height=self._console.size.height))
            return
        for row in rows:
            before = self._states.get(row.line, State.QUEUED)
            self._states[row.line] = row.state
            if row.state is not before:
                self._say(_news(row))
        if self._now() - self._said >= _PLAIN_EVERY:
            done, total = sum(row.chunks_done for row in rows), sum(row.chunks for row in rows)
            self._say(f"{_counts(rows)}; {done} of {total} chunks")

    def _say(self, text: str) -> None:
        self._said = self._now()
        say(self._console, text)


def render(rows: Sequence[Row], *, height: int) -> RenderableType:
    """The rows as a table of at most `height - 1` lines: those that run come first, the last line counts all."""
    order = list(State)
    room = max(0, height - 3)  # the head, the count, and the line that the cursor stands in
    shown = sorted(rows, key=lambda row: (order.index(row.state), row.line))[:room]
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("Line", justify="right", no_wrap=True)
    table.add_column("Video", no_wrap=True, overflow="ellipsis", ratio=3, min_width=8)
    table.add_column("State", no_wrap=True, overflow="ellipsis")
    table.add_column("", no_wrap=True, ratio=1)
    table.add_column("Chunks", justify="right", no_wrap=True)
    table.add_column("Gang", no_wrap=True, overflow="ellipsis", max_width=12)
    table.add_column("Computed", justify="right", no_wrap=True)
    table.add_column("Left", justify="right", no_wrap=True)
    for row in shown:
        table.add_row(*_cells(row))
    rest = len(rows) - len(shown)
    count = f"{_counts(rows)}; {rest} not shown" if rest else _counts(rows)
    return Group(table, Text(count, style="bold", no_wrap=True, overflow="ellipsis"))


def summary(rows: Sequence[Row], *, seconds: float) -> str:
    """What became of a batch in so many seconds, for people: a line for all, and one for each video that failed."""
    made = [row for row in rows if row.state is not State.KEPT]
    chunks, restarts = sum(row.chunks_done for row in made), sum(row.restarts for row in made)
    text = f"{_counts(rows)}; {chunks} chunks in {clock(seconds)}"
    if chunks:
        text += f", {seconds / chunks:.2f} s per chunk"
    shares = [(row.computed, row.chunks_done) for row in made if row.computed is not None and row.chunks_done]
    if shares:
        mean = sum(share * count for share, count in shares) / sum(count for _, count in shares)
        text += f", {mean:.0%} of the steps computed"
    if restarts:
        text += f", {restarts} restart{'s' if restarts > 1 else ''}"
    failed = [row for row in rows if row.state is State.FAILED]
    return "\n".join([text, *(_news(row) for row in sorted(failed, key=lambda row: row.line))])


def _cells(row: Row) -> list[RenderableType]:
    left = "" if row.seconds_left is None or row.state is not State.RUNNING else clock(row.seconds_left)
    note = row.state.value + (f" (restart {row.restarts})" if row.restarts and row.state is State.RUNNING else "")
    return [
        str(row.line),
        Text(one_line(row.title if row.error is None else f"{row.title}: {row.error}")),
        Text(note, style=_STYLES[row.state]),
        ProgressBar(total=row.chunks, completed=row.chunks_done),
        f"{row.chunks_done}/{row.chunks}",
        Text("" if row.gang is None else one_line(row.gang)),
        "" if row.computed is None else f"{row.computed:.0%}",
        left,
    ]


def _news(row: Row) -> str:
    title = one_line(row.title)
    title = title if len(title) <= _PROMPT else f"{title[: _PROMPT - 3]}..."
    text = f"line {row.line} ({title}): {row.state.value}"
    if row.state is State.RUNNING and row.gang is not None:
        text += f" on {one_line(row.gang)}"
    if row.state is State.RESTARTING:
        text += f" from chunk {row.chunks_done}"
    if row.state is State.DONE:
        text += f", {row.chunks} chunks" + ("" if row.computed is None else f", {row.computed:.0%} computed")
    return text if row.error is None else f"{text}: {one_line(row.error)}"


def _counts(rows: Sequence[Row]) -> str:
    found = Counter(row.state for row in rows)
    parts = [f"{found[state]} {state.value}" for state in State if found[state]]
    return f"{len(rows)} video{'' if len(rows) == 1 else 's'}" + (f": {', '.join(parts)}" if parts else "")
