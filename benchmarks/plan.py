"""Finds the thresholds that the quality benchmark runs with: of its curves by computed fraction, of presets by work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.ledger import Plan
from benchmarks.sweep import (
    LEAN,
    METHODS,
    WORK,
    Grid,
    Setting,
    StandIn,
    Ticks,
    calibrate,
    estimate_threshold,
    ladder,
    refined,
)
from benchmarks.trial import Case, Studio
from engine.reuse.policy import Policy
from engine.reuse.settings import ReuseSettings

_LADDER_CASES, _CALIBRATION_CASES = 2, 4  # prompts that thresholds are found on
_WIDEST, _NARROWEST = 0.97, 0.38  # computed fractions that the ladder spans, as estimated


def make_plan(
    studio: Studio,
    grid: Grid,
    cases: Sequence[Case],
    presets: Mapping[str, Setting] | None,
    run: Mapping[str, Any],
    report: Callable[[str], None],
) -> Plan:
    """Find all thresholds, on the first few of the cases.

    Args:
        studio: makes the videos.
        grid: what is swept.
        cases: of the benchmark.
        presets: by name; None takes the calibrated thresholds.
        run: what the results depend on; goes into the plan as it is.
        report: told what is being done.
    """
    report("thresholds: watching distances")
    few = cases[:_LADDER_CASES]
    seen = [studio.observe(case) for case in few]

    def computed(method: str, stand_in: StandIn, threshold: float) -> float:
        setting = grid.reuse(method, stand_in, threshold)
        return statistics.fmean(studio.make(setting, case).computed for case in few)

    known: dict[tuple[str, StandIn], dict[float, float]] = {}

    def threshold(method: str, stand_in: StandIn, fraction: float) -> float:
        report(f"thresholds: {method}, {stand_in.label}, {fraction:.0%}")
        measure = partial(computed, method, stand_in)
        if (method, stand_in) not in known:
            known[method, stand_in] = {rung: measure(rung) for rung in rungs[method]}
        return refined(measure, known[method, stand_in], fraction)

    rungs = {method: _rungs(seen, method, grid) for method in METHODS}
    found = _calibrated(studio, grid, cases[:_CALIBRATION_CASES], partial(threshold, "flowcache", grid.chosen))
    presets = presets or {name: grid.reuse("flowcache", grid.chosen, one) for name, one in found.items()}
    return Plan(run=run, settings=grid.settings(threshold, presets), presets=presets, calibrated=found)


def _rungs(seen: Sequence[Ticks], method: str, grid: Grid) -> list[float]:
    """Thresholds that span all useful fractions. Reuse shrinks the distances of some kinds, so they begin lower."""

    def policy(threshold: float) -> Policy:
        return ReuseSettings(policy=method, threshold=threshold, warmup_steps=grid.warmup).new_policy()

    lowest, highest = (estimate_threshold(seen, policy, fraction) for fraction in (_WIDEST, _NARROWEST))
    return ladder(lowest / 2, highest, grid.rungs)


def _calibrated(studio: Studio, grid: Grid, cases: Sequence[Case], start: Callable[[float], float]) -> dict[str, float]:
    """Thresholds at which chunk-wise reuse does the share of vanilla's operations that `WORK` asks for.

    Args:
        studio: makes the videos.
        grid: what stands in, and the warm-up.
        cases: to measure on.
        start: threshold of a computed fraction, near enough to search around.
    """
    vanilla = [studio.make(Setting(), case).flops for case in cases]

    def work(setting: Setting) -> float:
        return statistics.fmean(
            studio.make(setting, case).flops / whole for case, whole in zip(cases, vanilla, strict=True)
        )

    def at(threshold: float) -> float:
        return work(grid.reuse("flowcache", grid.chosen, threshold))

    lean = work(Setting(passes=LEAN))
    return {name: calibrate(at, start=start(target / lean), target=target) for name, target in WORK.items()}
