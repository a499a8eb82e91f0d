"""What is shown: how far videos are, in a terminal live bars or a table and elsewhere plain lines; and summaries.

It writes to standard error alone, and makes no files.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from engine.progress import Progress
from launch.options import Options, size_text
from launch.output.names import STREAM
from launch.plan import Plan
from parallel.trace import RankCounters

_TRANSFERS = {
    "nccl": "over NCCL",
    "host": "through host memory, as not every rank has a GPU of its own",
    "gloo": "over gloo",
}
_PLAIN_EVERY, _BATCH_EVERY = 5.0, 10.0  # seconds between plain lines: of a video, of a batch
_PROMPT = 60  # letters, in plain lines


def clock(seconds: float) -> str:
    """Seconds as 0:00 or 0:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """A text on one line, and without what would move the cursor."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _say(console: Console, text: str) -> None:
    """Print a line as it is: neither wrapped nor read as markup."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


# ---- the videos of one command


@dataclass(slots=True)
class _Bar:
    """What is shown of one video."""

    task: TaskID
    name: str  # empty if it is the only one
    began: float
    said: float = -math.inf  # when its last plain line came


class Display:
    """Where progress is shown, as a context: a bar for each video in flight in a terminal, else lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_interactive  # a terminal, and not a dumb one
        note = TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}")
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), note)
        self._bars = Bars(*columns, console=self._console, transient=True, disable=not self._live)
        self._phase = self._bars.add_task("", total=None, note="", visible=False)
        self._videos: dict[int, _Bar] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def phase(self, text: str) -> None:
        """Say what is done now, before the first video begins; later it is a line among the bars."""
        if self._live and not self._videos:
            self._bars.update(self._phase, description=text, visible=True)
        else:
            _say(self._console, text)

    def begin(self, video: int, name: str = "") -> None:
        """A video begins; of several, each has a name."""
        self._bars.update(self._phase, visible=False)
        self._videos[video] = _Bar(self._bars.add_task(name, total=None, note=""), name, time.monotonic())

    def update(self, progress: Progress, video: int = 0) -> None:
        """Show how far a video is; plain lines come some seconds apart."""
        done, total = progress.steps_done, progress.chunks * progress.num_steps
        if video not in self._videos:
            self.begin(video)
        bar, now = self._videos[video], time.monotonic()
        left = clock((now - bar.began) * (total - done) / done)
        chunks, step = f"chunks {progress.chunks_done}/{progress.chunks}", f"step {progress.step}/{progress.num_steps}"
        costs = f"{progress.computed_fraction:.0%} computed, KV {progress.kv_fill:.0%} full"
        if self._live:
            text, note = "  ".join([bar.name, chunks, step]).strip(), f"{costs}  {left} left"
            self._bars.update(bar.task, total=total, completed=done, description=text, note=note)
        elif now - bar.said >= _PLAIN_EVERY or progress.tick == progress.ticks:
            bar.said = now
            start = f"{bar.name}: " if bar.name else ""
            _say(self._console, f"{start}{chunks}, {step}, {done / total:.0%}, {costs}, {left} left")

    def end(self, video: int, text: str = "") -> None:
        """A video is complete: its bar goes, and a line stays."""
        if (bar := self._videos.pop(video, None)) is not None:
            self._bars.remove_task(bar.task)
        if text:
            _say(self._console, text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What was made and what it cost."""

    plan: Plan  # that it was made of; its `out` is the file
    frames: int  # frames in it
    chunks: int  # chunks made
    loading: float  # seconds to load the model
    making: float  # seconds from the loaded model, or from the video's own start, to the finished file
    computed: float  # computed chunk-steps as a share of all
    kv_bytes: int  # size of the KV buffers; on ranks, of the leader's part
    kv_host_bytes: int  # what they had in host memory beside it
    memory: int  # peak of the process, bytes; on ranks, of the leader
    gpu_memory: int | None  # peak of tensors on the GPU, bytes; None without one


def summary_text(summaries: Sequence[Summary], *, making: float, ranks: str | None = None) -> str:
    """A line for each video, and what they cost together, in `making` seconds; `ranks` is a line on those, if any."""
    last, chunks = summaries[-1], sum(one.chunks for one in summaries)
    lines = []
    for one in summaries:
        request, fps = one.plan.request, one.plan.model.config.figures.fps
        size = f"{one.frames} frames of {request.width}x{request.height}, {one.frames / fps:.1f} s of video"
        lines.append(f"{'standard output' if one.plan.out == STREAM else one.plan.out}: {size}")
    made, making = ("made", last.making) if len(summaries) == 1 else (f"{len(summaries)} videos made", making)
    lines.append(f"{made} in {making:.1f} s, {making / chunks:.2f} s per chunk, after {last.loading:.1f} s of loading")
    computed = sum(one.computed * one.chunks for one in summaries) / chunks
    on = "" if ranks is None else "on the leader "
    gpu = "" if last.gpu_memory is None else f", on the GPU {size_text(last.gpu_memory)}"
    on_host = f" and {size_text(last.kv_host_bytes)} on the host" if last.kv_host_bytes else ""
    memory = f"{on}keys and values {size_text(last.kv_bytes)}{on_host}, peak memory {size_text(last.memory)}{gpu}"
    lines.append(f"{computed:.0%} of the steps computed ({last.plan.model.cache}); {memory}")
    return "\n".join([*lines, *([] if ranks is None else [ranks])])


def rank_line(options: Options, counters: Sequence[RankCounters]) -> str:
    """A line on the ranks that made videos."""
    first = sorted((one for one in counters if one.cp_rank == 0), key=lambda one: one.stage)
    layers = ",".join(str(one.layers[1] - one.layers[0]) for one in first)
    loading = [one.load_seconds for one in counters]
    return (
        f"{len(counters)} rank{'s' if len(counters) > 1 else ''}, pp {options.pp} x cp {options.cp}, layers {layers}; "
        f"weights {', '.join(size_text(one.weight_bytes) for one in counters)}, "
        f"loaded in {min(loading):.1f} to {max(loading):.1f} s; tensors moved {_TRANSFERS[counters[0].transfer]}"
    )


# ---- the videos of a batch


class State(StrEnum):
    """Where a video is; the order is that of the table."""

    RUNNING = "running"
    RESTARTING = "restarting"
    FAILED = "failed"
    QUEUED = "queued"
    DONE = "done"
    KEPT = "there already"


_STYLES = dict(zip(State, ("cyan", "yellow", "red", "dim", "green", "green dim"), strict=True))


@dataclass(kw_only=True, slots=True)
class Row:
    """A video of the batch as it stands; at its end also a line of the results."""

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
    """Where a batch is shown, as a context; `now` is a clock in seconds.

    A terminal gets a table that is redrawn in place and is gone at the end; anything else gets a line whenever a video
    begins, restarts or ends, and one for all of them now and then.
    """

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._table = Live(console=self._console, transient=True, refresh_per_second=4)
        self._states: dict[int, State] = {}
        self._now, self._said = now, now()

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._table.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._table.stop()

    def update(self, rows: Sequence[Row]) -> None:
        """Show all videos of the batch as they are now; to be called as often as one likes."""
        if self._console.is_interactive:
            self._table.update(render(rows, height=self._console.size.height))
            return
        news = [_news(row) for row in rows if row.state is not self._states.get(row.line, State.QUEUED)]
        self._states = {row.line: row.state for row in rows}
        if not news and self._now() - self._said >= _BATCH_EVERY:
            done, total = sum(row.chunks_done for row in rows), sum(row.chunks for row in rows)
            news = [f"{_counts(rows)}; {done} of {total} chunks"]
        for text in news:
            self._said = self._now()
            _say(self._console, text)


def render(rows: Sequence[Row], *, height: int) -> RenderableType:
    """The rows as a table of at most `height - 1` lines: those that run come first, the last line counts all."""
    order = list(State)
    room = max(0, height - 3)  # the head, the count, and the line that the cursor stands in
    shown = sorted(rows, key=lambda row: (order.index(row.state), row.line))[:room]
    columns = [
        Column("Line", justify="right", no_wrap=True),
        Column("Video", no_wrap=True, overflow="ellipsis", ratio=3, min_width=8),
        Column("State", no_wrap=True, overflow="ellipsis"),
        Column("", no_wrap=True, ratio=1),
        Column("Chunks", justify="right", no_wrap=True),
        Column("Gang", no_wrap=True, overflow="ellipsis", max_width=12),
        *(Column(name, justify="right", no_wrap=True) for name in ("Computed", "Left")),
    ]
    table = Table(*columns, box=None, pad_edge=False, expand=True)
    for row in shown:
        table.add_row(*_cells(row))
    rest = len(rows) - len(shown)
    count = f"{_counts(rows)}; {rest} not shown" if rest else _counts(rows)
    return Group(table, Text(count, style="bold", no_wrap=True, overflow="ellipsis"))


def summary(rows: Sequence[Row], *, seconds: float, restarts: int) -> str:
    """What became of a batch in so many seconds, for people: a line for all, and one for each video that failed.

    Gangs were started again `restarts` times; each may have had several of the videos.
    """
    made = [row for row in rows if row.state is not State.KEPT]
    chunks = sum(row.chunks_done for row in made)
    text = f"{_counts(rows)}; {chunks} chunks in {clock(seconds)}"
    if chunks:
        text += f", {seconds / chunks:.2f} s per chunk"
    shares = [(row.computed, row.chunks_done) for row in made if row.computed is not None and row.chunks_done]
    if shares:
        mean = sum(share * count for share, count in shares) / sum(count for _, count in shares)
        text += f", {mean:.0%} of the steps computed"
    if restarts:
        text += ", a gang started again" if restarts == 1 else f", gangs started again {restarts} times"
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
