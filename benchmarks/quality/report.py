"""Many trials as tables, curves, figures and verdicts. It knows trials; it makes no videos and writes no files.

A method's curve on one prompt is linear between the thresholds that were run. Methods are compared at equal computed
fraction, on the same prompts, where both curves have a value.
"""

import itertools
import math
import operator
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import Cell, Row, Verdict, legend_below, median, new_plot, table
from benchmarks.quality.trial import WORK, Setting, Trial

FRACTIONS = (0.8, 0.65, 0.5)
"""Computed fractions at which curves are compared."""
_WORK_TOLERANCE = 0.02
_SPEED_SHARE = 0.9
_MOST_PROMPTS = 0.75  # share of the prompts that a comparison must rest on
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000")  # of what stands in
_STYLES = {"flowcache": ("-", "o", "chunk by chunk"), "teacache": ("--", "s", "whole window")}

Way = tuple[str, str]
"""A method and the label of what stands in for a reused step; a curve for each."""


def mean(values: Sequence[float]) -> float:
    """The mean; not a number where there are no values."""
    return statistics.fmean(values) if values else math.nan


def _mean(name: str) -> Callable[[Sequence[Trial]], Cell]:
    return lambda same: mean([getattr(one, name) for one in same])


def speed_up(same: Sequence[Trial]) -> float:
    """Median speed-up of trials over those without reuse."""
    return median(one.plain_seconds / one.seconds for one in same)


_MEASURED: dict[str, Callable[[Sequence[Trial]], Cell]] = {
    "prompts": len,
    "computed": _mean("computed"),
    "passes_run": _mean("items"),
    "tflop": _mean("tflop"),
    "flop_vs_vanilla": _mean("work"),
    "seconds": lambda same: median(one.seconds for one in same),
    "speedup": speed_up,
    "speedup_vs_vanilla": lambda same: median(one.vanilla_seconds / one.seconds for one in same),
    "psnr": _mean("psnr"),
    "psnr_worst": lambda same: min(one.psnr for one in same),
    "ssim": _mean("ssim"),
    "latent_error": _mean("latent_error"),
    "psnr_uncompressed": _mean("psnr_uncompressed"),
    "psnr_vs_vanilla": _mean("psnr_vanilla"),
    "colour_right": _mean("colour_right"),
    "direction_right": _mean("motion_right"),
    "whole_shape": _mean("whole"),
}


def setting_rows(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> list[Row]:
    """All figures, a row per setting; the presets' have their names."""
    return [_row(setting, same, presets) for setting, same in _by_setting(trials).items()]


def _row(setting: Setting, same: Sequence[Trial], presets: Mapping[str, Setting]) -> Row:
    row: Row = {"method": "none", "stands_in": "", "threshold": ""}
    if setting.reuses:
        own = Setting(reuse=replace(setting.reuse, clean_pass=False, copy_pass=False))
        named = [name for name, one in presets.items() if one == own]
        method = (*named, setting.reuse.policy)[0]
        row = {"method": method, "stands_in": setting.label, "threshold": setting.reuse.threshold}
    row |= {"passes": "lean" if setting.lean else "vanilla", "kv_budget": setting.budget or "own range"}
    return row | {name: figure(same) for name, figure in _MEASURED.items()}


def _by_setting(trials: Sequence[Trial]) -> dict[Setting, list[Trial]]:
    def order(trial: Trial) -> tuple[object, ...]:
        one, reuse = trial.setting, trial.setting.reuse
        method = (reuse.policy, reuse.reuse, reuse.extrapolate_from, reuse.threshold)
        return one.lean, one.budget or 0, method, trial.seed

    groups: dict[Setting, list[Trial]] = defaultdict(list)
    for one in sorted(trials, key=order):
        groups[one.setting].append(one)
    return dict(groups)


def _curves(trials: Sequence[Trial]) -> dict[Way, list[Trial]]:
    """Trials that curves are made of, by curve: reuse with lean passes and without compression."""
    found: dict[Way, list[Trial]] = defaultdict(list)
    for one in trials:
        if one.setting.reuses and one.setting.lean and one.setting.budget is None:
            found[one.setting.reuse.policy, one.setting.label].append(one)
    return dict(sorted(found.items()))


def psnr_at(trials: Sequence[Trial], way: Way, fraction: float) -> dict[tuple[str, int], float]:
    """PSNR of a way at a computed fraction, for each (prompt, seed) whose curve reaches it."""
    points: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in _curves(trials).get(way, ()):
        if one.computed < 1:
            points[one.case][one.computed].append(one.psnr)
    found = {}
    for case, values in points.items():
        places = sorted(values)
        if places[0] <= fraction <= places[-1]:
            found[case] = float(np.interp(fraction, places, [statistics.fmean(values[place]) for place in places]))
    return found


def compare(trials: Sequence[Trial], first: Way, second: Way, fraction: float) -> list[tuple[float, float]]:
    """PSNR of two ways at a computed fraction, for each prompt on which both curves reach it."""
    one, other = psnr_at(trials, first, fraction), psnr_at(trials, second, fraction)
    return [(one[case], other[case]) for case in one if case in other]


def curve_table(trials: Sequence[Trial]) -> str:
    """Mean PSNR of every method and kind at equal computed fractions, over the prompts that all curves reach."""
    ways = list(_curves(trials))
    rows: list[Row] = [{"method": method, "stands in": label} for method, label in ways]
    counts = []
    for fraction in FRACTIONS:
        found = [psnr_at(trials, way, fraction) for way in ways]
        shared = set.intersection(*map(set, found))
        counts.append(f"{fraction:.0%}: {len(shared)}")
        for row, own in zip(rows, found, strict=True):
            psnr = f"{statistics.fmean(own[case] for case in shared):.2f}" if shared else "none"
            row[f"PSNR at {fraction:.0%} (dB)"] = psnr
    return f"{table(rows)}\n\nPrompts compared at {', '.join(counts)}."


def verdicts(trials: Sequence[Trial], chosen: str, presets: Mapping[str, Setting]) -> list[Verdict]:
    """What the project holds itself to; `chosen` is the label of what stands in for a reused step in the presets."""
    found = []
    for label, at in itertools.product(dict.fromkeys(("residual", chosen)), FRACTIONS):
        name = f"PSNR at {at:.0%} computed, {label}: chunk by chunk against whole window"
        found.append(_compared(name, trials, ("flowcache", label), ("teacache", label), at, operator.gt))
    for at in FRACTIONS if chosen != "residual" else ():
        name = f"PSNR at {at:.0%} computed, chunk by chunk: {chosen} against residual"
        found.append(_compared(name, trials, ("flowcache", chosen), ("flowcache", "residual"), at, operator.ge))
    groups = _by_setting(trials)
    return [*found, _speed_verdict(trials), *(_work_verdict(name, presets[name], groups) for name in WORK)]


def _compared(
    name: str, trials: Sequence[Trial], first: Way, second: Way, at: float, holds: Callable[[float, float], bool]
) -> Verdict:
    """A comparison counts if it rests on most of the prompts."""
    pairs = compare(trials, first, second, at)
    one, other, better = mean([a for a, _ in pairs]), mean([b for _, b in pairs]), sum(a > b for a, b in pairs)
    measured = f"{one:.2f} against {other:.2f} dB, better on {better} of {len(pairs)} prompts"
    if not pairs:
        measured = "no prompt with both curves there"
    enough = len(pairs) >= _MOST_PROMPTS * len({trial.case for trial in trials})
    return Verdict(name, measured, "more" if holds is operator.gt else "as much or more", holds(one, other) and enough)


def _speed_verdict(trials: Sequence[Trial]) -> Verdict:
    """Speed-up times computed fraction would be 1 if deciding and bookkeeping cost nothing."""
    groups = [same for own in _curves(trials).values() for same in _by_setting(own).values()]
    shares = [speed_up(same) * mean([one.computed for one in same]) for same in groups]
    lowest = min(shares, default=math.nan)
    name = f"speed-up x computed fraction, least of {len(shares)} settings with reuse"
    measured = f"{lowest:.3f} (median {median(shares):.3f})"
    return Verdict(name, measured, f">= {_SPEED_SHARE}", lowest >= _SPEED_SHARE)


def _work_verdict(name: str, preset: Setting, groups: Mapping[Setting, Sequence[Trial]]) -> Verdict:
    work, wanted = mean([one.work for one in groups.get(preset, ())]), WORK[name]
    return Verdict(
        f"operations of {name} (threshold {preset.reuse.threshold:g}) as a share of vanilla's",
        f"{work:.3f}",
        f"{wanted:.2f} +- {_WORK_TOLERANCE:.2f}",
        abs(work - wanted) <= _WORK_TOLERANCE,
    )


def pareto_figure(trials: Sequence[Trial], title: str) -> Figure:
    """PSNR over computed fraction, one line per way; dotted lines where they are compared."""
    x, y = "computed chunk-steps (% of all)", "PSNR against no reuse, same passes (dB)"
    figure, axes = new_plot(f"Quality kept by reuse\n{title}", x, y)
    for at in FRACTIONS:
        axes.axvline(100 * at, color="#888888", linewidth=1, linestyle=":")
    _draw(axes, {way: [(one[0], one[1]) for one in points] for way, points in _points(trials).items()}, joined=True)
    legend_below(figure, axes, 2)
    return figure


def speed_figure(trials: Sequence[Trial], title: str) -> Figure:
    """Measured speed-up over computed fraction, with the line of a cost-free policy and 0.9 of it."""
    x, y = "computed chunk-steps (% of all)", "speed-up over no reuse, same passes (x)"
    figure, axes = new_plot(f"Time saved by reuse\n{title}", x, y)
    curves = {way: [(one[0], one[2]) for one in points] for way, points in _points(trials).items()}
    _draw(axes, curves, joined=False)
    if curves:
        places = np.linspace(min(points[0][0] for points in curves.values()), 1, 101)
        for share, style in ((1.0, "-"), (_SPEED_SHARE, ":")):
            label = f"{share:g} / computed fraction"
            axes.plot(100 * places, share / places, color="#444444", linewidth=1, linestyle=style, label=label)
    legend_below(figure, axes, 2)
    return figure


def _points(trials: Sequence[Trial]) -> dict[Way, list[tuple[float, float, float]]]:
    """One point per threshold: mean fraction and PSNR, median speed-up over the prompts; by rising fraction."""
    found = {}
    for way, own in _curves(trials).items():
        same = [
            (mean([t.computed for t in one]), mean([t.psnr for t in one]), speed_up(one))
            for one in _by_setting(own).values()
        ]
        points = sorted(point for point in same if point[0] < 1)
        if points:
            found[way] = points
    return found


def _draw(axes: Axes, curves: Mapping[Way, Sequence[tuple[float, float]]], *, joined: bool) -> None:
    """A line or points for every way; fractions are drawn in percent."""
    labels = list(dict.fromkeys(label for _, label in curves))
    for (method, label), points in curves.items():
        style, marker, name = _STYLES[method]
        axes.plot(
            [100 * x for x, _ in points],
            [y for _, y in points],
            linestyle=style if joined else "",
            marker=marker,
            markersize=5,
            color=_COLOURS[labels.index(label)],
            label=f"{method} ({name}), {label}",
        )
