"""Many measured videos in few figures: shares that are right, typical and bad cases, and the verdict on them.

It knows `Adherence` only; nothing here measures or makes a video.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.adherence import Adherence
from benchmarks.report import Cell
from models.pocket.words import COLOURS, MOTIONS, SHAPES

COLOUR_SHARE, DIRECTION_SHARE, BORDER_PIXELS = 0.9, 0.8, 2.0  # what the project holds itself to

COLUMNS = (
    *("prompt", "colour", "colour_share", "motion", "velocity_x", "velocity_y", "chunks_as_asked", "shape", "overlap"),
    *("stray", "found", "border_error_mean", "border_error_max", "deviation", "chunk_seam", "tile_seam"),
    *("colour_right", "motion_right", "shape_right", "whole"),
)
WORD_COLUMNS = ("word", "videos", "colour right", "direction right", "shape right", "border error, median (px)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of the result."""

    name: str  # what was measured
    value: float
    unit: str = ""  # `share`, `px` or nothing
    least: float | None = None  # it must be at least this
    most: float | None = None  # it must be at most this

    @property
    def passed(self) -> bool | None:
        """Whether the threshold is met; None without one. Not a number meets none."""
        if self.least is not None:
            return self.value >= self.least
        return self.value <= self.most if self.most is not None else None

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Name, value, what is wanted, verdict."""
        verdict = {None: "", True: "PASS", False: "FAIL"}[self.passed]
        limits = ((">=", self.least), ("<=", self.most))
        wanted = " ".join(f"{sign} {self._shown(limit)}" for sign, limit in limits if limit is not None)
        return self.name, self._shown(self.value), wanted, verdict

    def _shown(self, value: float) -> str:
        if self.unit == "share" and math.isfinite(value):
            return f"{100 * value:.1f} %"
        return f"{value:.2f} {self.unit}".strip()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them do not exceed (nearest rank); infinite ones count."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def figures(measured: Sequence[Adherence]) -> list[Figure]:
    """The figures over all videos, those with thresholds first."""

    def share(right: Callable[[Adherence], bool]) -> float:
        return statistics.fmean(right(one) for one in measured)

    errors = [error for one in measured for error in one.border_errors]
    deviations = [one.deviation for one in measured]
    strays = [one.stray for one in measured]
    seams = [one.chunk_seam for one in measured if one.border_errors]
    tiles = [one.tile_seam for one in measured if not math.isnan(one.tile_seam)]
    asked = [motion == one.scene.motion for one in measured for motion in one.chunk_motions]
    return [
        Figure(name="colour right", value=share(lambda m: m.colour_right), unit="share", least=COLOUR_SHARE),
        Figure(name="direction right", value=share(lambda m: m.motion_right), unit="share", least=DIRECTION_SHARE),
        Figure(name="error after a chunk border, median", value=_median(errors), unit="px", most=BORDER_PIXELS),
        Figure(name="error after a chunk border, 90th percentile", value=percentile(errors, 0.9), unit="px"),
        Figure(name="distance from one line at worst, median", value=_median(deviations), unit="px"),
        Figure(name="distance from one line at worst, 90th percentile", value=percentile(deviations, 0.9), unit="px"),
        Figure(name="single chunks that move as asked", value=statistics.fmean(asked), unit="share"),
        Figure(name="frames with one compact object", value=statistics.fmean(m.found for m in measured), unit="share"),
        Figure(name="shape right", value=share(lambda m: m.shape_right), unit="share"),
        Figure(name="overlap with the prompt's shape, mean", value=statistics.fmean(m.overlap for m in measured)),
        Figure(name="one whole object of the right shape", value=share(lambda m: m.whole), unit="share"),
        Figure(name="colour outside the object, median", value=_median(strays), unit="share"),
        Figure(name="colour outside the object, 90th percentile", value=percentile(strays, 0.9), unit="share"),
        Figure(name="change at chunk borders over that inside, median", value=_median(seams)),
        Figure(name="change at chunk borders over that inside, 90th percentile", value=percentile(seams, 0.9)),
        Figure(name="change at 12-frame tile borders over that inside, median", value=_median(tiles)),
    ]


def by_word(measured: Sequence[Adherence]) -> list[tuple[Cell, ...]]:
    """How many videos are right, for each word of the prompts that came up; columns WORD_COLUMNS."""
    rows: list[tuple[Cell, ...]] = []
    for word in (*COLOURS, *SHAPES, *MOTIONS):
        these = [m for m in measured if word in (m.scene.colour, m.scene.shape, m.scene.motion)]
        if these:
            right = (
                sum(m.colour_right for m in these),
                sum(m.motion_right for m in these),
                sum(m.shape_right for m in these),
            )
            rows.append((word, len(these), *right, round(_median([e for m in these for e in m.border_errors]), 2)))
    return rows


def csv_row(one: Adherence) -> tuple[Cell, ...]:
    """One video as a row of a CSV; columns COLUMNS."""
    errors = one.border_errors or (math.nan,)
    asked = sum(motion == one.scene.motion for motion in one.chunk_motions)
    seen = (one.colour, one.colour_share, one.motion, *one.velocity, asked, one.shape, one.overlap)
    doubts = (one.stray, one.found, statistics.fmean(errors), max(errors), one.deviation, one.chunk_seam, one.tile_seam)
    return one.scene.prompt, *seen, *doubts, one.colour_right, one.motion_right, one.shape_right, one.whole


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
