"""Distances between steps, over the denoising."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from engine.record import RunRecord
from launch.plots.style import FEW, GREY, GRID, add_title


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
        _log_scale(axes)
    if not np.isfinite(known).any():
        axes.text(0.5, 0.5, "no distance was taken", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xlim=(0, 100), xlabel="denoising progress (%)", ylabel="relative L1 distance to the step before")
    axes.grid(which="both", color=GRID, linewidth=0.6)
    if not few:
        axes.plot(progress, _medians(known), color="black", linewidth=2.2, label="median of the chunks")
    _name_lines(figure, axes, made, reused=bool(np.isin(record.decisions, (1, 2)).any()))
    add_title(figure, "How far each chunk changes from step to step", record)
    return figure


def _mark_decisions(axes: Axes, at: np.ndarray, values: np.ndarray, flags: np.ndarray, colour: tuple) -> None:
    """Filled dots where the step was computed, hollow ones where it was reused, extrapolated or not."""
    for here, face in ((flags == 0, colour), (flags != 0, "white")):
        axes.plot(at[here], values[here], linestyle="", marker="o", markersize=4.5, color=colour, markerfacecolor=face)


def _log_scale(axes: Axes) -> None:
    """A logarithmic scale with plain numbers; zeros are left out."""
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _medians(lines: np.ndarray) -> np.ndarray:
    """Of each column what is known of it; NaN where nothing is."""
    columns = (column[np.isfinite(column)] for column in lines.T)
    return np.array([np.median(column) if len(column) else np.nan for column in columns])


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
