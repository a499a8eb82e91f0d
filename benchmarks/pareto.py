"""Quality over computed fraction: a curve for each way to reuse, compared at equal fractions, and drawn.

A method's curve on one prompt is linear between the thresholds that were run. Methods are compared on the same prompts,
where both curves have a value. It knows trials; it makes no videos.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.sweep import LEAN, Setting
from benchmarks.trial import Trial

Way = tuple[str, str]
"""A method and the label of what stands in for a reused step."""
_COLOURS = {"residual": "#d55e00", "velocity": "#0072b2", "extrapolate": "#009e73"}
_OTHER_COLOURS = ("#cc79a7", "#000000")
_STYLES = {"flowcache": ("-", "o", "chunk by chunk"), "teacache": ("--", "s", "whole window")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two ways at equal computed fraction."""

    first: float  # mean PSNR of one, dB; nan where there is no prompt to compare on
    second: float  # of the other
    better: int  # prompts on which the first has more
    prompts: int  # that were compared


def way_of(setting: Setting) -> Way:
    """Which curve a setting is on."""
    return setting.method, setting.stand_in.label


def on_curves(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that a curve is made of: reuse with lean passes and without compression."""
    return [
        one
        for one in trials
        if one.setting.method != "none" and one.setting.passes == LEAN and one.setting.budget is None
    ]


def psnr_at(trials: Sequence[Trial], way: Way, fraction: float) -> dict[tuple[str, int], float]:
    """PSNR of a way at a computed fraction, for each (prompt, seed) whose curve reaches it."""
    curves: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in on_curves(trials):
        if way_of(one.setting) == way and one.computed < 1:
            curves[one.prompt, one.seed][one.computed].append(one.psnr)
    found = {}
    for prompt, points in curves.items():
        curve = sorted((at, statistics.fmean(values)) for at, values in points.items())
        if curve[0][0] <= fraction <= curve[-1][0]:
            found[prompt] = _between(curve, fraction)
    return found


def _between(curve: Sequence[tuple[float, float]], at: float) -> float:
    """Linear interpolation within a curve of rising places."""
    above = next(i for i, (place, _) in enumerate(curve) if place >= at)
    right, value = curve[above]
    if right == at:
        return value
    left, before = curve[above - 1]
    return before + (value - before) * (at - left) / (right - left)


def compare(trials: Sequence[Trial], first: Way, second: Way, fraction: float) -> Comparison:
    """Compare two ways at a computed fraction, prompt by prompt."""
    one, other = psnr_at(trials, first, fraction), psnr_at(trials, second, fraction)
    both = [(one[prompt], other[prompt]) for prompt in one if prompt in other]
    return Comparison(
        first=_mean([a for a, _ in both]),
        second=_mean([b for _, b in both]),
        better=sum(a > b for a, b in both),
        prompts=len(both),
    )


def pareto_figure(trials: Sequence[Trial], title: str, fractions: Sequence[float]) -> Figure:
    """PSNR over computed fraction, one line per way; dotted lines where they are compared."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.add_subplot()
    for at in fractions:
        axes.axvline(100 * at, color="#888888", linewidth=1, linestyle=":")
    curves = _mean_points(trials)
    colours = _colours(curves)
    for way, points in curves.items():
        _draw(axes, way, colours[way[1]], [(100 * one.computed, one.psnr) for one in points], joined=True)
    axes.set(title=title, xlabel="computed chunk-steps (% of all)", ylabel="PSNR against no reuse, same passes (dB)")
    _finish(figure, axes)
    return figure


def speed_figure(trials: Sequence[Trial], title: str) -> Figure:
    """Measured speed-up over computed fraction, with the line of a cost-free policy and 0.9 of it."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.add_subplot()
    curves = _mean_points(trials)
    colours = _colours(curves)
    for way, points in curves.items():
        _draw(axes, way, colours[way[1]], [(100 * one.computed, one.speedup) for one in points], joined=False)
    lowest = min((one.computed for points in curves.values() for one in points), default=None)
    if lowest is not None:
        places = [lowest + (1 - lowest) * i / 100 for i in range(101)]
        for share, style, label in ((1.0, "-", "1 / computed fraction"), (0.9, ":", "0.9 / computed fraction")):
            ys = [share / at for at in places]
            axes.plot([100 * at for at in places], ys, color="#444444", linewidth=1, linestyle=style, label=label)
    axes.set(title=title, xlabel="computed chunk-steps (% of all)", ylabel="speed-up over no reuse, same passes (x)")
    _finish(figure, axes)
    return figure


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    computed: float
    psnr: float
    speedup: float


def _mean_points(trials: Sequence[Trial]) -> dict[Way, list[_Point]]:
    """One point per threshold: mean fraction and PSNR, median speed-up over the prompts; by rising fraction."""
    groups: dict[Way, dict[float, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for one in on_curves(trials):
        groups[way_of(one.setting)][one.setting.threshold].append(one)
    found = {}
    for way, by_threshold in sorted(groups.items()):
        points = [
            _Point(
                computed=_mean([one.computed for one in same]),
                psnr=_mean([one.psnr for one in same]),
                speedup=statistics.median(one.plain_seconds / one.seconds for one in same),
            )
            for same in by_threshold.values()
        ]
        found[way] = sorted((one for one in points if one.computed < 1), key=lambda one: one.computed)
    return found


def _colours(ways: Iterable[Way]) -> dict[str, str]:
    labels = dict.fromkeys(label for _, label in ways)
    others = itertools.cycle(_OTHER_COLOURS)
    return {label: _COLOURS.get(label) or next(others) for label in labels}


def _draw(axes: Axes, way: Way, colour: str, points: Sequence[tuple[float, float]], *, joined: bool) -> None:
    method, label = way
    line, marker, name = _STYLES[method]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(
        xs,
        ys,
        linestyle=line if joined else "",
        marker=marker,
        markersize=5,
        color=colour,
        label=f"{method} ({name}), {label}",
    )


def _finish(figure: Figure, axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
