"""What each rank did when, drawn from the trace of a run on ranks; and a table of where the time went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from engine.record import RunRecord
from launch.options import TRACE_FILE
from launch.plots.idle_time import Cause, RankUse, Run, Utilisation, analyse
from launch.plots.record import REUSED, settings_line
from models.errors import InputError

_IDLE = {Cause.DEPENDENCY: "#e6e6e6", Cause.TRANSPORT: "#c2c2c2", Cause.IMBALANCE: "#8f8f8f"}
_DECODING = "#7f6a93"
_COLOURS = [to_hex(colormaps["tab20"](place)) for place in (0, 4, 8, 18, 12, 10, 16, 2, 5, 9)]
_MANY = 3000  # items of a rank beyond which they are too thin to draw
_BINS = 800  # stretches whose busy share is drawn in their place
_ZOOM_TICKS = 3
_ROW = 0.8  # of a row's height that a rank's bar takes


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineTrace:
    """A trace as it is drawn."""

    use: Utilisation  # what each rank did; times in seconds on the trace's clock
    reused: np.ndarray  # moments at which the leader reused a step
    decoding: list[tuple[float, float]]  # start and length of each chunk's decoding on the leader
    settings: Mapping[str, Any]  # of the record in the same folder; empty without one

    @classmethod
    def load(cls, folder: Path) -> PipelineTrace:
        """Read the trace in a record's folder. An `InputError` says that there is none, or that it is damaged."""
        path = folder / TRACE_FILE
        try:
            events = json.loads(path.read_text())["traceEvents"]
            use = analyse(events)
            reused = np.array([event["ts"] / 1e6 for event in events if event.get("cat") == "reuse"])
            decoding = [(event["ts"] / 1e6, event["dur"] / 1e6) for event in events if event.get("cat") == "decode"]
        except (FileNotFoundError, NotADirectoryError):
            text = f"{folder} holds no trace: record a run on ranks, as in generate --pp 2 --record {folder}"
            raise InputError(text) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"the trace {path} is damaged: {type(error).__name__} {error}") from None
        if use is None:
            raise InputError(f"the trace {path} has no computation in it")
        try:
            settings = RunRecord.load(folder).settings
        except InputError:  # several videos have one trace, and records in sub-folders
            settings = {}
        return cls(use=use, reused=reused, decoding=decoding, settings=settings)


def pipeline_figure(trace: PipelineTrace) -> Figure:
    """The whole run above, a few ticks of its middle below; a row for each rank."""
    use, ranks = trace.use, trace.use.ranks
    rows = 0.45 * (len(ranks) + bool(trace.decoding) + 0.3)
    figure, (whole, near) = _two_panels(rows, 1.5 * rows)
    length = use.ended - use.began
    colours = _Colours(ranks)
    _rows(whole, trace, colours, (use.began, use.ended))
    began, ended, ticks = _middle(use)
    _rows(near, trace, colours, (began, ended))
    _name_items(near, use, (began, ended))
    whole.set_xlim(-0.005 * length, 1.005 * length)
    near.set_xlim(began - use.began, ended - use.began)
    whole.axvspan(began - use.began, ended - use.began, facecolor="none", edgecolor="black", linewidth=1.2)
    whole.set_title("the whole run", loc="left", fontsize=10)
    near.set_title(
        f"ticks {ticks.start} to {ticks.stop - 1} (the box above); numbers are chunks", loc="left", fontsize=10
    )
    near.set_xlabel("seconds")
    handles: list[Any] = colours.patches()
    if trace.decoding:
        handles.append(Patch(facecolor=_DECODING, label="decoding"))
    handles += [Patch(facecolor=colour, edgecolor="#999999", label=f"idle: {cause}") for cause, colour in _IDLE.items()]
    handles.append(Patch(facecolor="white", edgecolor="#999999", label="other work"))
    if len(trace.reused):
        handles.append(whole.plot([], [], "v", color=REUSED, markersize=6, label="step reused: no work")[0])
    figure.legend(handles=handles, loc="lower left", ncols=min(8, len(handles)), frameon=False, fontsize=9)
    title = f"What each rank did when\n{settings_line(trace.settings)}".rstrip()
    figure.suptitle(title, x=0.01, y=0.99, ha="left", va="top", fontsize=12)
    return figure


def _two_panels(upper: float, lower: float) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two axes of given heights in inches, with room for what stands around them; no layout engine can squeeze them."""
    wide, left, right, top, between, bottom = 13.0, 1.5, 0.2, 1.0, 0.75, 1.15
    high = top + upper + between + lower + bottom
    figure, width = Figure(figsize=(wide, high)), (wide - left - right) / wide
    above = figure.add_axes((left / wide, (bottom + lower + between) / high, width, upper / high))
    below = figure.add_axes((left / wide, bottom / high, width, lower / high))
    return figure, (above, below)


def pipeline_table(use: Utilisation) -> str:
    """The share of the time that each rank was busy, and where the rest went, as text."""
    length = use.ended - use.began
    causes = " ".join(f"{cause.value:>10}" for cause in Cause)
    lines = [f"{'rank':>4} {'stage':>5} {'busy':>7} {'other':>7}   idle: {causes}"]
    for rank in use.ranks:
        idle = " ".join(f"{rank.idle_seconds(cause) / length:>10.1%}" for cause in Cause)
        shares = f"{rank.busy / length:>7.1%} {rank.other / length:>7.1%}"
        lines.append(f"{rank.rank:>4} {rank.stage:>5} {shares}         {idle}")
    lines.append(f"{len(use.ranks[0].runs)} items in {length:.2f} s")
    return "\n".join(lines)


class _Colours:
    """Colours of items: by chunk where there is one video, by video where there are several."""

    def __init__(self, ranks: Sequence[RankUse]) -> None:
        found = {(run.request, run.chunk) for rank in ranks for run in rank.runs}
        self._by_video = len({video for video, _ in found}) > 1
        self._numbers = sorted({video if self._by_video else chunk for video, chunk in found})

    def of(self, run: Run) -> str:
        """The colour of an item."""
        return _COLOURS[(run.request if self._by_video else run.chunk) % len(_COLOURS)]

    def patches(self) -> list[Patch]:
        """The legend; a colour that several videos or chunks share is named once."""
        word, count = "video" if self._by_video else "chunk", len(_COLOURS)
        shared = ", {}, ..." if len(self._numbers) > count else ""
        names = {number: f"{word} {number}" + shared.format(number + count) for number in self._numbers[:count]}
        return [Patch(facecolor=_COLOURS[number % count], label=name) for number, name in names.items()]


def _rows(axes: Axes, trace: PipelineTrace, colours: _Colours, span: tuple[float, float]) -> None:
    """One row for each rank within a span of time, the first on top; below them decoding."""
    use, zero, length = trace.use, trace.use.began, trace.use.ended - trace.use.began
    labels = []
    for row, rank in enumerate(use.ranks):
        box = (row - _ROW / 2, _ROW)
        for cause, colour in _IDLE.items():
            idle = [one for one in rank.idle if one.cause is cause and one.ended > span[0] and one.began < span[1]]
            if len(idle) <= _MANY:
                axes.broken_barh([(one.began - zero, one.ended - one.began) for one in idle], box, facecolor=colour)
        runs = [run for run in rank.runs if run.ended > span[0] and run.began < span[1]]
        if len(runs) <= _MANY:
            spans = [(run.began - zero, run.ended - run.began) for run in runs]
            faces = [colours.of(run) for run in runs]
            axes.broken_barh(spans, box, facecolors=faces, edgecolor="white", linewidth=0.2)
        else:
            _draw_shares(axes, runs, box, span, zero)
        cp_rank = f".{rank.cp_rank}" if any(other.cp_rank for other in use.ranks) else ""
        labels.append(f"rank {rank.rank}, stage {rank.stage}{cp_rank}\n{rank.busy / length:.0%} busy")
    if trace.decoding:
        box = (len(use.ranks) - _ROW / 2, _ROW / 2)
        axes.broken_barh([(began - zero, took) for began, took in trace.decoding], box, facecolor=_DECODING)
        labels.append("decoding")
    marks = trace.reused[(trace.reused >= span[0]) & (trace.reused <= span[1])] - zero
    axes.plot(marks, np.full(len(marks), -_ROW / 2 - 0.13), "v", color=REUSED, markersize=4, clip_on=False)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.5, -0.75)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_shares(
    axes: Axes, runs: Sequence[Run], box: tuple[float, float], span: tuple[float, float], zero: float
) -> None:
    """The busy share of each short stretch of a long run; dark where it is high."""
    edges = np.linspace(span[0], span[1], _BINS + 1)
    times = np.array([(run.began, run.ended) for run in runs])
    done = np.concatenate([[0.0], np.cumsum(times[:, 1] - times[:, 0])])  # busy seconds before each run, and in all
    shares = np.diff(np.interp(edges, times.ravel(), done.repeat(2)[1:-1])) / np.diff(edges)
    extent = (span[0] - zero, span[1] - zero, box[0] + box[1], box[0])
    axes.imshow(shares[None, :], cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")


def _middle(use: Utilisation) -> tuple[float, float, range]:
    """A few ticks in the middle of the run: start, end, and their numbers."""
    runs = [run for run in use.ranks[0].runs if run.key[1] >= 0] or use.ranks[0].runs
    middle = runs[len(runs) // 2]
    first = middle.key[1]
    ticks = range(first, first + _ZOOM_TICKS)
    shown = [run for rank in use.ranks for run in rank.runs if run.request == middle.request and run.key[1] in ticks]
    return min(run.began for run in shown), max(run.ended for run in shown), ticks


def _name_items(axes: Axes, use: Utilisation, span: tuple[float, float]) -> None:
    """Numbers of chunks, where there is room for them."""
    for row, rank in enumerate(use.ranks):
        for run in rank.runs:
            began, ended = max(run.began, span[0]), min(run.ended, span[1])
            if ended - began > 0.012 * (span[1] - span[0]):
                at = (began + ended) / 2 - use.began
                axes.text(at, row, str(run.chunk), ha="center", va="center", fontsize=8, color="white", clip_on=True)
