"""Many trials as tables, curves, figures and verdicts. It knows trials; it makes no videos and writes no files.

A method's curve on one prompt is linear between the thresholds that were run. Methods are compared at equal computed
fraction, on the same prompts, where both curves have a value.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import Cell, Row, Verdict, legend_below, median, new_plot, renamed, table
from benchmarks.quality.sweep import WORK, Setting, mean
from benchmarks.quality.trial import Trial

FRACTIONS = (0.8, 0.65, 0.5)
"""Computed fractions at which curves are compared."""
_WORK_TOLERANCE = 0.02
_SPEED_SHARE = 0.9
_MOST_PROMPTS = 0.75  # share of the prompts that a comparison must rest on
_COLOURS = {"residual": "#d55e00", "velocity": "#0072b2", "extrapolate": "#009e73"}
_OTHER_COLOURS = ("#cc79a7", "#000000")
_STYLES = {"flowcache": ("-", "o", "chunk by chunk"), "teacache": ("--", "s", "whole window")}

Way = tuple[str, str]
"""A method and the label of what stands in for a reused step; a curve for each."""


def _mean(name: str) -> Callable[[Sequence[Trial]], Cell]:
    return lambda same: mean([getattr(one, name) for one in same])


def _median(name: str) -> Callable[[Sequence[Trial]], Cell]:
    return lambda same: median(getattr(one, name) for one in same)


def speed_up(same: Sequence[Trial]) -> float:
    """Median speed-up of trials over those without reuse."""
    return median(one.plain_seconds / one.seconds for one in same)


_MEASURED: dict[str, Callable[[Sequence[Trial]], Cell]] = {
    "prompts": len,
    "computed": _mean("computed"),
    "passes_run": _mean("items"),
    "tflop": _mean("tflop"),
    "flop_vs_vanilla": _mean("work"),
    "seconds": _median("seconds"),
    "decode_seconds": _median("decode_seconds"),
    "speedup": speed_up,
    "speedup_vs_vanilla": lambda same: median(one.vanilla_seconds / one.seconds for one in same),
    "psnr": _mean("psnr"),
    "psnr_worst": lambda same: min(one.psnr for one in same),
    "ssim": _mean("ssim"),
    "latent_error": _mean("latent_error"),
    "psnr_uncompressed": _mean("psnr_uncompressed"),
    "psnr_vs_vanilla": _mean("psnr_vanilla"),
    "ssim_vs_vanilla": _mean("ssim_vanilla"),
    "colour_right": _mean("colour_right"),
    "direction_right": _mean("motion_right"),
    "whole_shape": _mean("whole"),
    "boundary_error_px": _median("boundary_error"),
}
_COST = ("computed", "tflop", "flop_vs_vanilla", "seconds", "speedup", "speedup_vs_vanilla")
_FOLLOWS = ("colour_right", "direction_right", "whole_shape")
_TABLES: tuple[tuple[str, tuple[str, ...], Callable[[Setting], bool]], ...] = (
    (
        "Without reuse",
        (*_COST, "psnr_vs_vanilla", "ssim_vs_vanilla", *_FOLLOWS),
        lambda setting: not setting.reuses and setting.budget is None,
    ),
    (
        "Reuse",
        (*_COST, "psnr", "psnr_worst", "ssim", "latent_error", "psnr_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.reuses and setting.budget is None,
    ),
    (
        "Compressed KV",
        (*_COST, "psnr", "ssim", "psnr_uncompressed", "psnr_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.budget is not None,
    ),
)


def setting_tables(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> dict[str, list[Row]]:
    """A row for each setting: without reuse, with reuse, and with compressed KV; the presets' have their names."""
    groups, found = _by_setting(trials), {}
    for title, names, belongs in _TABLES:
        rows = [_row(setting, same, names, presets) for setting, same in groups.items() if belongs(setting)]
        found[title] = [renamed(row, [name.replace("_", " ") for name in row]) for row in rows]
    return found


def csv_rows(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> list[Row]:
    """All figures, a row per setting."""
    return [_row(setting, same, tuple(_MEASURED), presets) for setting, same in _by_setting(trials).items()]


def _row(setting: Setting, same: Sequence[Trial], names: Sequence[str], presets: Mapping[str, Setting]) -> Row:
    row: Row = {"method": "none", "stands_in": "", "threshold": ""}
    if setting.reuses:
        own = Setting(reuse=replace(setting.reuse, clean_pass=False, copy_pass=False))
        named = [name for name, one in presets.items() if one == own]
        method = (*named, setting.reuse.policy)[0]
        row = {"method": method, "stands_in": setting.label, "threshold": setting.reuse.threshold}
    row |= {"passes": "lean" if setting.lean else "vanilla", "kv_budget": setting.budget or "own range"}
    return row | {name: _MEASURED[name](same) for name in names}


def _by_setting(trials: Sequence[Trial]) -> dict[Setting, list[Trial]]:
    def order(trial: Trial) -> tuple[object, ...]:
        one, reuse = trial.setting, trial.setting.reuse
        method = (reuse.policy, reuse.reuse, reuse.extrapolate_from, reuse.threshold)
        return one.lean, one.budget or 0, method, trial.seed

    groups: dict[Setting, list[Trial]] = defaultdict(list)
    for one in sorted(trials, key=order):
        groups[one.setting].append(one)
    return dict(groups)


def _groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    return list(_by_setting(trials).values())


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two ways at equal computed fraction, prompt by prompt."""

    first: float  # mean PSNR of one, dB; nan where there is no prompt to compare on
    second: float  # of the other
    better: int  # prompts on which the first has more
    prompts: int  # that were compared


def compare(trials: Sequence[Trial], first: Way, second: Way, fraction: float) -> Comparison:
    """Compare two ways at a computed fraction."""
    one, other = psnr_at(trials, first, fraction), psnr_at(trials, second, fraction)
    both = [(one[case], other[case]) for case in one if case in other]
    means = mean([a for a, _ in both]), mean([b for _, b in both])
    return Comparison(first=means[0], second=means[1], better=sum(a > b for a, b in both), prompts=len(both))


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
    prompts = len({one.case for one in trials})
    found = []
    for label, at in itertools.product(dict.fromkeys(("residual", chosen)), FRACTIONS):
        pair = compare(trials, ("flowcache", label), ("teacache", label), at)
        name = f"PSNR at {at:.0%} computed, {label}: chunk by chunk against whole window"
        found.append(_compared(name, pair, "more", pair.first > pair.second, prompts))
    for at in FRACTIONS if chosen != "residual" else ():
        pair = compare(trials, ("flowcache", chosen), ("flowcache", "residual"), at)
        name = f"PSNR at {at:.0%} computed, chunk by chunk: {chosen} against residual"
        found.append(_compared(name, pair, "as much or more", pair.first >= pair.second, prompts))
    groups = _by_setting(trials)
    return [*found, _speed_verdict(trials), *(_work_verdict(name, presets[name], groups) for name in WORK)]


def _compared(name: str, pair: Comparison, wanted: str, holds: bool, prompts: int) -> Verdict:
    """A comparison counts if it rests on most of the prompts."""
    measured = f"{pair.first:.2f} against {pair.second:.2f} dB, better on {pair.better} of {pair.prompts} prompts"
    if not pair.prompts:
        measured = "no prompt with both curves there"
    return Verdict(name, measured, wanted, holds and pair.prompts >= _MOST_PROMPTS * prompts)


def _speed_verdict(trials: Sequence[Trial]) -> Verdict:
    """Speed-up times computed fraction would be 1 if deciding and bookkeeping cost nothing."""
    groups = [same for own in _curves(trials).values() for same in _groups(own)]
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
        same = [(mean([t.computed for t in one]), mean([t.psnr for t in one]), speed_up(one)) for one in _groups(own)]
        points = sorted(point for point in same if point[0] < 1)
        if points:
            found[way] = points
    return found


def _draw(axes: Axes, curves: Mapping[Way, Sequence[tuple[float, float]]], *, joined: bool) -> None:
    """A line or points for every way; fractions are drawn in percent."""
    others = itertools.cycle(_OTHER_COLOURS)
    colours = {label: _COLOURS.get(label) or next(others) for label in dict.fromkeys(label for _, label in curves)}
    for (method, label), points in curves.items():
        style, marker, name = _STYLES[method]
        axes.plot(
            [100 * x for x, _ in points],
            [y for _, y in points],
            linestyle=style if joined else "",
            marker=marker,
            markersize=5,
            color=colours[label],
            label=f"{method} ({name}), {label}",
        )
