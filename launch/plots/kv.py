"""How much of each past chunk the KV buffer keeps."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from engine.record import RunRecord
from launch.plots.style import COMPUTED, FEW, GREY, GRID, add_title, cell_lines, map_height

_GONE = "#dcdcdc"


def kv_figure(record: RunRecord) -> Figure:
    """The share of each past chunk that is held after each chunk's retirement; below, how full the buffer is."""
    schedule = record.schedule
    figure = Figure(figsize=(10, 1.6 + map_height(schedule.chunks)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(max(2.2, map_height(schedule.chunks) - 1.6), 1.2))
    axes = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=axes)
    if schedule.chunks - schedule.first > 1:
        _draw_shares(figure, axes, record)
    else:
        axes.text(0.5, 0.5, "no chunk has left the window", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    axes.set_ylabel("past chunk")
    axes.tick_params(labelbottom=False)
    at = np.arange(schedule.ticks + 1) / schedule.quantum_ticks
    fill = np.append(record.fill, record.fill[-1])
    below.fill_between(at, fill, step="post", color=COMPUTED, alpha=0.25, linewidth=0)
    below.step(at, fill, where="post", color=COMPUTED, linewidth=1.2)
    below.set(xlim=(0, schedule.quanta), ylim=(0, 1.05), xlabel="time, in chunks (the window moves on by one)")
    below.set_ylabel("buffer fill")
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.grid(color=GRID, linewidth=0.6)
    size = record.settings.get("kv_bytes")
    if isinstance(size, int):
        below.text(0.995, 0.06, f"100% = {size / 1e6:,.1f} MB", transform=below.transAxes, ha="right", fontsize=9)
    add_title(figure, "What of the past is kept", record)
    return figure


def _draw_shares(figure: Figure, axes: Axes, record: RunRecord) -> None:
    """The heat map: time to the right, past chunks downwards."""
    retired = range(record.schedule.first, record.schedule.chunks - 1)  # the last chunk ends with the video
    shares = record.kept[retired.start : retired.stop].T  # [past chunk, time]
    chunk, when = np.indices(shares.shape)
    shown = np.ma.masked_where(chunk > when + retired.start, shares)[: retired.stop]
    colours = colormaps["viridis"].with_extremes(bad="white", under=_GONE)
    start = float(record.schedule.window)
    image = axes.imshow(
        shown,
        cmap=colours,
        norm=PowerNorm(0.5, vmin=1e-4, vmax=1),
        extent=(start, start + len(retired), retired.stop - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    if len(retired) <= FEW:
        cell_lines(axes, start + np.arange(len(retired) + 1), np.arange(retired.stop + 1) - 0.5)
        _write_shares(axes, shown, start)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    bar = figure.colorbar(image, ax=axes, label="share of the chunk's tokens that lives on", pad=0.01)
    bar.set_ticks([0.01, 0.1, 0.25, 0.5, 1.0])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    gone = Patch(facecolor=_GONE, edgecolor="#999999", label="nothing is left")
    later = Patch(facecolor="white", edgecolor="#999999", label="has not left the window yet")
    axes.legend(handles=[gone, later], loc="lower left", frameon=False)


def _write_shares(axes: Axes, shares: np.ma.MaskedArray, start: float) -> None:
    for (chunk, when), share in np.ndenumerate(shares.filled(np.nan)):
        if np.isfinite(share):
            colour = "black" if share > 0.4 or share == 0 else "white"
            axes.text(start + when + 0.5, chunk, f"{share:.0%}", ha="center", va="center", fontsize=9, color=colour)
