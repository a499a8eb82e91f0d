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

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import Cell, Headers, Rows, Verdict, columns, legend_below, markdown_table, median, new_plot
from benchmarks.quality.sweep import LEAN, WORK, Setting, mean
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
"""A method and the label of what stands in for a reused step."""


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
        lambda setting: setting.method == "none" and setting.budget is None,
    ),
    (
        "Reuse",
        (*_COST, "psnr", "psnr_worst", "ssim", "latent_error", "psnr_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.method != "none" and setting.budget is None,
    ),
    (
        "Compressed KV",
        (*_COST, "psnr", "ssim", "psnr_uncompressed", "psnr_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.budget is not None,
    ),
)


def setting_tables(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> dict[str, str]:
    """Markdown tables of the runs without reuse, with reuse, and with compressed KV; a row per setting.

    Args:
        trials: all of them.
        presets: by name; the rows with their thresholds are named after them.
    """
    groups, found = _by_setting(trials), {}
    for title, names, belongs in _TABLES:
        rows = [_row(setting, same, names, presets) for setting, same in groups.items() if belongs(setting)]
        if rows:
            headers, cells = columns(rows)
            found[title] = markdown_table([name.replace("_", " ") for name in headers], cells)
    return found


def csv_rows(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> tuple[Headers, Rows]:
    """All figures, a row per setting."""
    names = tuple(_MEASURED)
    return columns([_row(setting, same, names, presets) for setting, same in _by_setting(trials).items()])


def _row(
    setting: Setting, same: Sequence[Trial], names: Sequence[str], presets: Mapping[str, Setting]
) -> dict[str, Cell]:
    row: dict[str, Cell] = {"method": setting.method, "stands_in": "", "threshold": ""}
    if setting.method != "none":
        named = [name for name, one in presets.items() if one == replace(setting, passes=LEAN, budget=None)]
        label = setting.stand_in.label
        row = {"method": (*named, setting.method)[0], "stands_in": label, "threshold": setting.threshold}
    row |= {"passes": setting.passes, "kv_budget": "own range" if setting.budget is None else setting.budget}
    return row | {name: _MEASURED[name](same) for name in names}


def _by_setting(trials: Sequence[Trial]) -> dict[Setting, list[Trial]]:
    groups: dict[Setting, list[Trial]] = defaultdict(list)
    for one in sorted(trials, key=_order):
        groups[one.setting].append(one)
    return dict(groups)


def _order(trial: Trial) -> tuple[object, ...]:
    one = trial.setting
    return one.passes == LEAN, one.budget or 0, one.method, one.kind, one.extrapolate_from, one.threshold, trial.seed


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
        first=mean([a for a, _ in both]),
        second=mean([b for _, b in both]),
        better=sum(a > b for a, b in both),
        prompts=len(both),
    )


def curve_table(trials: Sequence[Trial]) -> str:
    """Mean PSNR of every method and kind at equal computed fractions, over the prompts that all curves reach."""
    ways = sorted({way_of(one.setting) for one in on_curves(trials)})
    rows: list[list[Cell]] = [list(way) for way in ways]
    counts = []
    for fraction in FRACTIONS:
        found = {way: psnr_at(trials, way, fraction) for way in ways}
        shared = set.intersection(*(set(prompts) for prompts in found.values()))
        counts.append(f"{fraction:.0%}: {len(shared)}")
        for row, way in zip(rows, ways, strict=True):
            row.append(f"{statistics.fmean(found[way][one] for one in shared):.2f}" if shared else "none")
    headers = ("method", "stands in", *(f"PSNR at {fraction:.0%} (dB)" for fraction in FRACTIONS))
    return f"{markdown_table(headers, rows)}\n\nPrompts compared at {', '.join(counts)}."


def verdicts(trials: Sequence[Trial], chosen: str, presets: Mapping[str, Setting]) -> list[Verdict]:
    """What the project holds itself to.

    Args:
        trials: all of them.
        chosen: label of what stands in for a reused step.
        presets: settings by name.
    """
    prompts = len({(one.prompt, one.seed) for one in trials})
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
    groups = _by_setting(on_curves(trials)).values()
    shares = [speed_up(same) * mean([one.computed for one in same]) for same in groups]
    lowest = min(shares, default=math.nan)
    name = f"speed-up x computed fraction, least of {len(shares)} settings with reuse"
    measured = f"{lowest:.3f} (median {median(shares):.3f})"
    return Verdict(name, measured, f">= {_SPEED_SHARE}", lowest >= _SPEED_SHARE)


def _work_verdict(name: str, preset: Setting, groups: Mapping[Setting, Sequence[Trial]]) -> Verdict:
    work, wanted = mean([one.work for one in groups.get(preset, ())]), WORK[name]
    return Verdict(
        f"operations of {name} (threshold {preset.threshold:g}) as a share of vanilla's",
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
    lowest = min((place for points in curves.values() for place, _ in points), default=None)
    if lowest is not None:
        places = [lowest + (1 - lowest) * i / 100 for i in range(101)]
        for share, style, label in ((1.0, "-", "1 / computed fraction"), (0.9, ":", "0.9 / computed fraction")):
            ys = [share / at for at in places]
            axes.plot([100 * at for at in places], ys, color="#444444", linewidth=1, linestyle=style, label=label)
    legend_below(figure, axes, 2)
    return figure


def _points(trials: Sequence[Trial]) -> dict[Way, list[tuple[float, float, float]]]:
    """One point per threshold: mean fraction and PSNR, median speed-up over the prompts; by rising fraction."""
    found: dict[Way, list[tuple[float, float, float]]] = defaultdict(list)
    for setting, same in _by_setting(on_curves(trials)).items():
        computed = mean([one.computed for one in same])
        if computed < 1:
            found[way_of(setting)].append((computed, mean([one.psnr for one in same]), speed_up(same)))
    return {way: sorted(points) for way, points in sorted(found.items())}


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
