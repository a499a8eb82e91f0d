"""Many trials as tables and verdicts. It knows trials; it makes no videos and writes no files."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks.pareto import Comparison, compare, on_curves, psnr_at, way_of
from benchmarks.report import Cell, csv_text, markdown_table
from benchmarks.sweep import LEAN, WORK, Setting
from benchmarks.trial import Trial
from benchmarks.verdict import Verdict

FRACTIONS = (0.8, 0.65, 0.5)
"""Computed fractions at which curves are compared."""
_WORK_TOLERANCE = 0.02
_SPEED_SHARE = 0.9
_MOST_PROMPTS = 0.75  # share of the prompts that a comparison must rest on

_SETTING = ("method", "stands_in", "threshold", "passes", "kv_budget")
_MEASURED: dict[str, Callable[[Sequence[Trial]], Cell]] = {
    "prompts": len,
    "computed": lambda same: _mean(same, "computed"),
    "passes_run": lambda same: _mean(same, "items"),
    "tflop": lambda same: _mean(same, "tflop"),
    "flop_vs_vanilla": lambda same: _mean(same, "work"),
    "seconds": lambda same: statistics.median(one.seconds for one in same),
    "decode_seconds": lambda same: statistics.median(one.decode_seconds for one in same),
    "speedup": lambda same: _speedup(same),
    "speedup_vs_vanilla": lambda same: statistics.median(one.vanilla_seconds / one.seconds for one in same),
    "psnr": lambda same: _mean(same, "psnr"),
    "psnr_worst": lambda same: min(one.psnr for one in same),
    "ssim": lambda same: _mean(same, "ssim"),
    "latent_error": lambda same: _mean(same, "latent_error"),
    "psnr_uncompressed": lambda same: _mean(same, "psnr_uncompressed"),
    "psnr_vs_vanilla": lambda same: _mean(same, "psnr_vanilla"),
    "ssim_vs_vanilla": lambda same: _mean(same, "ssim_vanilla"),
    "colour_right": lambda same: _mean(same, "colour_right"),
    "direction_right": lambda same: _mean(same, "motion_right"),
    "whole_shape": lambda same: _mean(same, "whole"),
    "border_error_px": lambda same: statistics.median(one.border_error for one in same),
}
_COMMON = ("computed", "tflop", "flop_vs_vanilla", "seconds", "speedup", "speedup_vs_vanilla")
_FOLLOWS = ("colour_right", "direction_right", "whole_shape")
_TABLES: tuple[tuple[str, tuple[str, ...], Callable[[Setting], bool]], ...] = (
    (
        "Without reuse",
        (*_COMMON, "psnr_vs_vanilla", "ssim_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.method == "none" and setting.budget is None,
    ),
    (
        "Reuse",
        (*_COMMON, "psnr", "psnr_worst", "ssim", "latent_error", "psnr_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.method != "none" and setting.budget is None,
    ),
    (
        "Compressed KV",
        (*_COMMON, "psnr", "ssim", "psnr_uncompressed", "psnr_vs_vanilla", *_FOLLOWS),
        lambda setting: setting.budget is not None,
    ),
)


def setting_tables(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> str:
    """A Markdown table each for the runs without reuse, with reuse, and with compressed KV; a row per setting.

    Args:
        trials: all of them.
        presets: by name; the rows with their thresholds are named after them.
    """
    groups = _by_setting(trials)
    parts = []
    for title, columns, belongs in _TABLES:
        rows = [
            (*_setting_cells(setting, presets), *(_MEASURED[name](same) for name in columns))
            for setting, same in groups.items()
            if belongs(setting)
        ]
        if rows:
            parts.append(f"## {title}\n\n{markdown_table(_headers(columns), rows)}")
    return "\n\n".join(parts)


def _headers(columns: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in (*_SETTING, *columns)]


def csv(trials: Sequence[Trial], presets: Mapping[str, Setting]) -> str:
    """All figures, a row per setting."""
    rows = [
        (*_setting_cells(setting, presets), *(measure(same) for measure in _MEASURED.values()))
        for setting, same in _by_setting(trials).items()
    ]
    return csv_text((*_SETTING, *_MEASURED), rows)


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
    found = [_chunk_wise_verdict(trials, one, at) for one in dict.fromkeys(("residual", chosen)) for at in FRACTIONS]
    found += [_stand_in_verdict(trials, chosen, at) for at in FRACTIONS if chosen != "residual"]
    groups = _by_setting(trials)
    return [*found, _speed_verdict(trials), *(_work_verdict(name, presets[name], groups) for name in WORK)]


def _chunk_wise_verdict(trials: Sequence[Trial], label: str, fraction: float) -> Verdict:
    found = compare(trials, ("flowcache", label), ("teacache", label), fraction)
    return Verdict(
        name=f"PSNR at {fraction:.0%} computed, {label}: chunk by chunk against whole window",
        measured=_against(found),
        wanted="more",
        passed=found.first > found.second and _rests_on_most(found, trials),
    )


def _stand_in_verdict(trials: Sequence[Trial], chosen: str, fraction: float) -> Verdict:
    found = compare(trials, ("flowcache", chosen), ("flowcache", "residual"), fraction)
    return Verdict(
        name=f"PSNR at {fraction:.0%} computed, chunk by chunk: {chosen} against residual",
        measured=_against(found),
        wanted="as much or more",
        passed=found.first >= found.second and _rests_on_most(found, trials),
    )


def _rests_on_most(found: Comparison, trials: Sequence[Trial]) -> bool:
    return found.prompts >= _MOST_PROMPTS * len({(one.prompt, one.seed) for one in trials})


def _against(found: Comparison) -> str:
    if not found.prompts:
        return "no prompt with both curves there"
    return f"{found.first:.2f} against {found.second:.2f} dB, better on {found.better} of {found.prompts} prompts"


def _speed_verdict(trials: Sequence[Trial]) -> Verdict:
    """Speed-up times computed fraction would be 1 if deciding and bookkeeping cost nothing."""
    shares = [_speedup(same) * _mean(same, "computed") for same in _by_setting(on_curves(trials)).values()]
    lowest, typical = (min(shares), statistics.median(shares)) if shares else (math.nan, math.nan)
    return Verdict(
        name=f"speed-up x computed fraction, least of {len(shares)} settings with reuse",
        measured=f"{lowest:.3f} (median {typical:.3f})",
        wanted=f">= {_SPEED_SHARE}",
        passed=lowest >= _SPEED_SHARE,
    )


def _work_verdict(name: str, preset: Setting, groups: dict[Setting, list[Trial]]) -> Verdict:
    work = _mean(groups[preset], "work") if preset in groups else math.nan
    return Verdict(
        name=f"operations of {name} (threshold {preset.threshold:g}) as a share of vanilla's",
        measured=f"{work:.3f}",
        wanted=f"{WORK[name]:.2f} +- {_WORK_TOLERANCE:.2f}",
        passed=abs(work - WORK[name]) <= _WORK_TOLERANCE,
    )


def _by_setting(trials: Sequence[Trial]) -> dict[Setting, list[Trial]]:
    groups: dict[Setting, list[Trial]] = defaultdict(list)
    for one in sorted(trials, key=_order):
        groups[one.setting].append(one)
    return dict(groups)


def _order(trial: Trial) -> tuple[object, ...]:
    one = trial.setting
    return one.passes == LEAN, one.budget or 0, one.method, one.kind, one.extrapolate_from, one.threshold, trial.seed


def _setting_cells(setting: Setting, presets: Mapping[str, Setting]) -> tuple[Cell, ...]:
    kv: Cell = "own range" if setting.budget is None else setting.budget
    if setting.method == "none":
        return setting.method, "", "", setting.passes, kv
    names = [name for name, one in presets.items() if one == replace(setting, passes=LEAN, budget=None)]
    return (*names, setting.method)[0], setting.stand_in.label, setting.threshold, setting.passes, kv


def _speedup(same: Sequence[Trial]) -> float:
    return statistics.median(one.plain_seconds / one.seconds for one in same)


def _mean(same: Sequence[Trial], name: str) -> float:
    return statistics.fmean(getattr(one, name) for one in same)
