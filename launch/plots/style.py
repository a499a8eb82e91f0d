"""Colours, sizes and titles that the pictures share."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from engine.record import RunRecord

COMPUTED, REUSED, EXTRAPOLATED = "#27548a", "#f3b23f", "#6fae8f"
GREY, GRID = "#666666", "#e4e4e4"
FEW = 12  # chunks that can be told apart by colour, and whose cells have room for a number

_SHOWN = {"model": "", "reuse_preset": "cache "}  # settings in titles, and the word before each


def map_height(chunks: int) -> float:
    """Height of a map with a row for each chunk, in inches."""
    return min(9.5, max(3.4, 2.0 + 0.3 * chunks))


def cell_lines(axes: Axes, xs: np.ndarray, ys: np.ndarray) -> None:
    """White lines between the cells of a map."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.remove_overlapping_locs = False  # lines also where there are labels
    axes.set_xticks(xs, minor=True)
    axes.set_yticks(ys, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)


def add_title(figure: Figure, title: str, record: RunRecord) -> None:
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
