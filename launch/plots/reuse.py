"""The map of computed and reused steps."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from engine.record import NOT_ACTIVE, RunRecord
from engine.schedule import Schedule
from launch.plots.style import COMPUTED, EXTRAPOLATED, FEW, GREY, REUSED, add_title, cell_lines, map_height

_STATES = {"computed": COMPUTED, "reused": REUSED, "extrapolated": EXTRAPOLATED, "not in the window": "#f1f1f1"}
_OUTSIDE = 3  # state of a cell outside the window; smaller ones are the record's flags
_MANY = 100  # chunks whose window is too thin a line to be read


def reuse_figure(record: RunRecord) -> Figure:
    """A map of chunks and ticks: computed, reused, not in the window; at its side each chunk's computed share.

    In a long video the window is a thin line across that map; then a chunk's row begins when the chunk enters.
    """
    schedule = record.schedule
    figure = Figure(figsize=(11, map_height(schedule.chunks)), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(6, 1))
    axes = figure.add_subplot(grid[0])
    side = figure.add_subplot(grid[1], sharey=axes)
    if schedule.chunks > _MANY:
        given = np.full((schedule.first, schedule.num_steps), NOT_ACTIVE, dtype=np.uint8)
        states = np.concatenate([given, record.decisions])
    else:
        states = record.flags.T
    states = np.where(states == NOT_ACTIVE, _OUTSIDE, states)
    axes.imshow(
        states,
        cmap=ListedColormap(list(_STATES.values())),
        norm=BoundaryNorm(np.arange(len(_STATES) + 1) - 0.5, len(_STATES)),
        extent=(0, states.shape[1], schedule.chunks - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    if states.shape[1] <= 100 and schedule.chunks <= _MANY:
        cell_lines(axes, np.arange(schedule.ticks + 1), np.arange(schedule.chunks + 1) - 0.5)
    if schedule.first:
        middle = (states.shape[1] / 2, (schedule.first - 1) / 2)
        axes.text(*middle, "given", ha="center", va="center", color=GREY)
    axes.set(xlabel=_tick_label(schedule), ylabel="chunk")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=1))
    labelled = schedule.quantum_ticks * math.ceil(states.shape[1] / schedule.quantum_ticks / 12)
    axes.xaxis.set_major_locator(MultipleLocator(labelled))
    _computed_bars(side, record)
    patches = [
        Patch(facecolor=colour, edgecolor="#999999", label=name)
        for state, (name, colour) in enumerate(_STATES.items())
        if (states == state).any()
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False)
    add_title(figure, f"Steps computed and reused: {record.computed_fraction:.0%} computed", record)
    return figure


def _tick_label(schedule: Schedule) -> str:
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
