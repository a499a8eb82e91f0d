"""Pictures of a video's record: computed and reused steps, distances between steps, and the KV that is kept.

Figures are drawn without a display and without matplotlib's global state.
"""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
)

from engine.record import NOT_ACTIVE, RunRecord
from engine.reuse.policy import Decision
from engine.schedule import Timetable

COMPUTED, REUSED, EXTRAPOLATED = "#27548a", "#f3b23f", "#6fae8f"
GREY, GRID = "#666666", "#e4e4e4"
FEW = 12  # chunks that can be told apart by colour, and whose cells have room for a number

_SHOWN = {"model": "", "cache_preset": "cache "}  # settings in titles, and the word before each
_STATES = {"computed": COMPUTED, "reused": REUSED, "extrapolated": EXTRAPOLATED, "not in the window": "#f1f1f1"}
_OUTSIDE = 3  # state of a cell outside the window; smaller ones are the record's flags
_MANY = 100  # chunks whose window is too thin a line to be read
_GONE = "#dcdcdc"
_CELLS: Any = {"aspect": "auto", "interpolation": "nearest"}  # of a map


# ---- computed and reused steps


def reuse_table(record: RunRecord) -> list[str]:
    """Lines of a table by step, of a record in which all chunks take the same decisions at the same distances.

    It is that of a distance which looks at no latents; of other records, and of one chunk, there is none.
    """
    rows, changes = record.decisions, record.changes
    if (
        len(rows) < 2
        or (rows != rows[0]).any()
        or not np.array_equal(changes, np.tile(changes[0], (len(rows), 1)), True)
    ):
        return []
    names = list(_STATES)
    lines = [f"all chunks take the same steps: {record.computed_fraction:.0%} computed", f"{'step':>4} {'change':>8}"]
    for step, (state, change) in enumerate(zip(_states(rows[0]).tolist(), changes[0].tolist(), strict=True)):
        shown = f"{change:.6f}" if np.isfinite(change) else "-"
        lines.append(f"{step:>4} {shown:>8}  {names[state] if state < _OUTSIDE else '-'}")
    return lines


def _states(flags: np.ndarray) -> np.ndarray:
    """Places in `_STATES`; a step that is reused in part counts as reused."""
    shown = np.where(flags > Decision.EXTRAPOLATE.value, Decision.REUSE.value, flags)
    return np.where(flags == NOT_ACTIVE, _OUTSIDE, shown)


def reuse_figure(record: RunRecord) -> Figure:
    """A map of chunks and ticks: computed, reused, not in the window; at its side each chunk's computed share.

    In a long video the window is a thin line across that map; then a chunk's row begins when the chunk enters.
    """
    schedule = record.schedule
    figure = Figure(figsize=(11, _map_height(schedule.chunks)), layout="constrained")
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    if schedule.chunks > _MANY:
        given = np.full((schedule.first, schedule.num_steps), NOT_ACTIVE, dtype=np.uint8)
        states = np.concatenate([given, record.decisions])
    else:
        states = record.flags.T
    states = _states(states)
    norm = BoundaryNorm(np.arange(len(_STATES) + 1) - 0.5, len(_STATES))
    extent = (0, states.shape[1], schedule.chunks - 0.5, -0.5)
    axes.imshow(states, cmap=ListedColormap(list(_STATES.values())), norm=norm, extent=extent, **_CELLS)
    if states.shape[1] <= 100 and schedule.chunks <= _MANY:
        _cell_lines(axes, np.arange(schedule.ticks + 1), np.arange(schedule.chunks + 1) - 0.5)
    if schedule.first:
        middle = (states.shape[1] / 2, (schedule.first - 1) / 2)
        axes.text(*middle, "given", ha="center", va="center", color=GREY)
    axes.set(xlabel=_tick_label(schedule), ylabel="chunk")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=1))
    labelled = schedule.quantum_ticks * math.ceil(states.shape[1] / schedule.quantum_ticks / 12)
    axes.xaxis.set_major_locator(MultipleLocator(labelled))
    _computed_bars(side, record)
    shown = [item for state, item in enumerate(_STATES.items()) if (states == state).any()]
    patches = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in shown]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False)
    _add_title(figure, f"Steps computed and reused: {record.computed_fraction:.0%} computed", record)
    return figure


def _tick_label(schedule: Timetable) -> str:
    if schedule.chunks > _MANY:
        return f"step of the chunk (each row begins {schedule.quantum_ticks} ticks after the one above)"
    return f"tick (a chunk enters every {schedule.quantum_ticks} ticks)" if schedule.quanta > 1 else "tick"


def _computed_bars(axes: Axes, record: RunRecord) -> None:
    """Computed share of each chunk, as bars at the side of the map."""
    schedule = record.schedule
    made = np.arange(schedule.first, schedule.chunks)
    shares, extrapolated = ((record.decisions == state).sum(axis=1) / schedule.num_steps for state in (0, 2))
    thick, smooth = (0.8, True) if len(made) <= 60 else (1.0, False)
    axes.barh(made, np.ones(len(made)), height=thick, color=REUSED, antialiased=smooth)
    axes.barh(made, extrapolated, height=thick, left=shares, color=EXTRAPOLATED, antialiased=smooth)
    axes.barh(made, shares, height=thick, color=COMPUTED, antialiased=smooth)
    if schedule.chunks <= FEW:
        for chunk, share in zip(made, shares, strict=True):
            at, ha, colour = (0.04, "left", "white") if share > 0.5 else (0.96, "right", "black")
            axes.text(at, float(chunk), f"{share:.0%}", ha=ha, va="center", color=colour, fontsize=9)
    axes.set(xlim=(0, 1), xlabel="computed share")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(which="both", labelleft=False, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


# ---- distances


def distance_figure(record: RunRecord) -> Figure:
    """Relative L1 distance between a chunk's steps over its denoising, one line per chunk (FlowCache, Figure 2)."""
    schedule = record.schedule
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    progress = 100 * np.arange(schedule.num_steps) / schedule.num_steps
    made = range(schedule.first, schedule.chunks)
    shades, few = colormaps["viridis"], len(made) <= FEW
    lines = []
    for chunk, changes, flags in zip(made, record.changes, record.decisions, strict=True):
        values = changes.astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        lines.append(values)
        colour = shades(0.95 * (chunk - schedule.first) / max(1, len(made) - 1))
        axes.plot(progress, values, color=colour, linewidth=1.6 if few else 0.8, label=f"chunk {chunk}")
        if few:
            _mark_decisions(axes, progress, values, flags, colour)
    known = np.array(lines)
    positive = known[known > 0]
    if positive.size and positive.max() > 5 * positive.min():
        axes.set_yscale("log", nonpositive="mask")  # zeros are left out
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
    if not np.isfinite(known).any():
        axes.text(0.5, 0.5, "no distance was taken", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xlim=(0, 100), xlabel="denoising progress (%)", ylabel="relative L1 distance to the step before")
    axes.grid(which="both", color=GRID, linewidth=0.6)
    if not few:
        columns = (column[np.isfinite(column)] for column in known.T)
        medians = [np.median(column) if len(column) else np.nan for column in columns]
        axes.plot(progress, medians, color="black", linewidth=2.2, label="median of the chunks")
    _name_lines(figure, axes, made, reused=bool(np.isin(record.decisions, (0, NOT_ACTIVE), invert=True).any()))
    _add_title(figure, "How far each chunk changes from step to step", record)
    return figure


def _mark_decisions(axes: Axes, at: np.ndarray, values: np.ndarray, flags: np.ndarray, colour: tuple) -> None:
    """Filled dots where the step was computed, hollow ones where it was reused, extrapolated or not."""
    for here, face in ((flags == 0, colour), (flags != 0, "white")):
        axes.plot(at[here], values[here], linestyle="", marker="o", markersize=4.5, color=colour, markerfacecolor=face)


def _name_lines(figure: Figure, axes: Axes, made: range, *, reused: bool) -> None:
    """A colour bar for many lines. For few a legend, of the dots too."""
    if len(made) <= FEW:
        for name, face in [("computed", GREY), *([("reused", "white")] if reused else [])]:
            axes.plot([], [], linestyle="", marker="o", markersize=4.5, color=GREY, markerfacecolor=face, label=name)
        axes.legend(fontsize=9, ncols=1 + len(made) // 8)
        return
    axes.legend(handles=axes.lines[-1:], fontsize=9)
    scale = ScalarMappable(Normalize(made.start, made.start + (len(made) - 1) / 0.95), colormaps["viridis"])
    bar = figure.colorbar(scale, ax=axes, label="chunk", boundaries=np.arange(made.start, made.stop + 1) - 0.5)
    bar.locator = MaxNLocator(integer=True, nbins=8)
    bar.update_ticks()


# ---- the KV that is kept


def kv_figure(record: RunRecord) -> Figure:
    """The share of each past chunk that is held after each chunk's retirement; below, how full the buffer is."""
    schedule = record.schedule
    figure = Figure(figsize=(10, 1.6 + _map_height(schedule.chunks)), layout="constrained")
    heights = (max(2.2, _map_height(schedule.chunks) - 1.6), 1.2)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    if any(span.chunks - span.first > 1 for span in schedule.spans):
        _draw_shares(figure, axes, record)
    else:
        axes.text(0.5, 0.5, "no chunk has left the window", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    axes.set_ylabel("past chunk")
    at = np.arange(schedule.ticks + 1) / schedule.quantum_ticks
    fill = np.append(record.fill, record.fill[-1])
    below.fill_between(at, fill, step="post", color=COMPUTED, alpha=0.25, linewidth=0)
    below.step(at, fill, where="post", color=COMPUTED, linewidth=1.2)
    below.set(xlim=(0, at[-1]), ylim=(0, 1.05), xlabel="time, in chunks (the window moves on by one)")
    below.set_ylabel("buffer fill")
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.grid(color=GRID, linewidth=0.6)
    size = record.settings.get("kv_bytes")
    if isinstance(size, int) and size < 2**63:
        below.text(0.995, 0.06, f"100% = {size / 1e6:,.1f} MB", transform=below.transAxes, ha="right", fontsize=9)
    _add_title(figure, "What of the past is kept", record)
    return figure


def _draw_shares(figure: Figure, axes: Axes, record: RunRecord) -> None:
    """The heat map: time to the right, past chunks downwards."""
    schedule, kept = record.schedule, record.kept
    lasts = [at.chunk + span.chunks - 1 for at, span in zip(schedule.places, schedule.spans, strict=False)]
    retired = [chunk for chunk in range(schedule.first, schedule.chunks) if chunk not in lasts]  # they end a span
    # A column for each chunk of time. Where a span begins anew, no chunk leaves the window for a while.
    ends = [-(-schedule.tick_of(chunk, schedule.num_steps) // schedule.quantum_ticks) for chunk in retired]
    start, columns = float(ends[0]), np.array(ends) - ends[0]
    shown = np.ma.masked_array(np.zeros((retired[-1] + 1, int(columns[-1]) + 1)), mask=True)
    for chunk, column in zip(retired, columns, strict=True):
        shown[: chunk + 1, column] = kept[chunk, : chunk + 1]
    colours = colormaps["viridis"].with_extremes(bad="white", under=_GONE)
    extent = (start, start + shown.shape[1], len(shown) - 0.5, -0.5)
    image = axes.imshow(shown, cmap=colours, norm=PowerNorm(0.5, vmin=1e-4, vmax=1), extent=extent, **_CELLS)
    if len(retired) <= FEW:
        _cell_lines(axes, start + np.arange(shown.shape[1] + 1), np.arange(len(shown) + 1) - 0.5)
        _write_shares(axes, shown, start)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    bar = figure.colorbar(image, ax=axes, label="share of the chunk's tokens that lives on", pad=0.01)
    bar.set_ticks([0.01, 0.1, 0.25, 0.5, 1.0])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    meanings = {"nothing is left": _GONE, "has not left the window yet": "white"}
    patches = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in meanings.items()]
    axes.legend(handles=patches, loc="lower left", frameon=False)


def _write_shares(axes: Axes, shares: np.ma.MaskedArray, start: float) -> None:
    for (chunk, when), share in np.ndenumerate(shares.filled(np.nan)):
        if np.isfinite(share):
            colour = "black" if share > 0.4 or share == 0 else "white"
            axes.text(start + when + 0.5, chunk, f"{share:.0%}", ha="center", va="center", fontsize=9, color=colour)


# ---- what they share


def _map_height(chunks: int) -> float:
    """Height of a map with a row for each chunk, in inches."""
    return min(9.5, max(3.4, 2.0 + 0.3 * chunks))


def _cell_lines(axes: Axes, xs: np.ndarray, ys: np.ndarray) -> None:
    """White lines between the cells of a map."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.remove_overlapping_locs = False  # lines also where there are labels
    axes.set_xticks(xs, minor=True)
    axes.set_yticks(ys, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)


def _add_title(figure: Figure, title: str, record: RunRecord) -> None:
    """The figure's title; below it, in small, the run."""
    schedule = record.schedule
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
    made = schedule.chunks - schedule.first
    parts = [*_settings(record.settings), f"{made} chunk{'s' if made > 1 else ''} of {schedule.num_steps} steps"]
    figure.axes[0].set_title(_drawable(", ".join(parts)), loc="left", fontsize=10, color="#555555", parse_math=False)


def settings_line(settings: Mapping[str, Any]) -> str:
    """The run's settings in a line; empty if none are known."""
    parts = _settings(settings)
    if "pp" in settings and "cp" in settings:
        parts.append(f"pp {settings['pp']} x cp {settings['cp']}")
    return _drawable(", ".join(parts)).replace("$", r"\$")


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """The settings that tell runs apart, as far as the record has them."""
    parts = [f'"{textwrap.shorten(str(settings["prompt"]), 50, placeholder=" ...")}"'] if "prompt" in settings else []
    parts += [f"{word}{settings[name]}" for name, word in _SHOWN.items() if name in settings]
    cache, kv = settings.get("cache"), settings.get("kv")
    if isinstance(cache, dict) and cache.get("policy") != "none" and "threshold" in cache:
        parts.append(f"threshold {cache['threshold']}")
    if isinstance(kv, dict) and kv.get("budget") is not None:
        parts.append(f"KV budget {kv['budget']}")
    return parts


def _drawable(text: str) -> str:
    """The text with a box for every character that the font lacks, as it would be drawn, but without a warning."""
    font = FT2Font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(letter if font.get_char_index(ord(letter)) else "\N{WHITE SQUARE}" for letter in text)
