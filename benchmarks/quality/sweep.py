"""Which settings the quality benchmark compares, and thresholds that give a wanted amount of work.

The distances of a model decide what a threshold means. So thresholds are found, not listed. Policies that decide on
the distances of a video made without reuse show in which range to look, at no cost; a few videos that are really made,
since reuse changes the distances, give the thresholds of the curves, and those whose counted work must be exact.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.common import nearest, rounded, search
from engine.record import Recorder
from engine.reuse.policy import KINDS, Decision, Observation, Policy, ReuseSettings

METHODS = ("flowcache", "teacache")
VANILLA, LEAN = ReuseSettings(), ReuseSettings(clean_pass=False, copy_pass=False)
"""No reuse, with the clean and the context-free passes and without them, as the published reuse runs."""
WORK = {"flowcache-slow": 0.53, "flowcache-fast": 0.46}
"""Counted operations of the presets as a share of vanilla's, as in the paper."""
_LOWEST, _HIGHEST = 1e-6, 1e2  # thresholds that are searched
_WIDEST, _NARROWEST = 0.97, 0.38  # computed fractions that the ladder of thresholds spans, as estimated
_NEAR = 0.02  # of a computed fraction

Ticks = Sequence[Sequence[Observation]]
"""What was seen of a video's chunks, tick by tick."""
StandIn = tuple[str, float]
"""What stands in for a reused step, and the share of the threshold above which it is extrapolated; 1 never does."""
STAND_INS: tuple[StandIn, ...] = (*((kind, 1.0) for kind in KINDS), ("velocity", 0.5))
"""Those that are always swept."""


def label_of(stand_in: StandIn) -> str:
    """What stands in, as it is called in tables and legends."""
    kind, share = stand_in
    return kind if share >= 1 else f"{kind}, extrapolate from {share:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to make a video."""

    reuse: ReuseSettings = VANILLA
    budget: int | None = None  # of the KV buffer in chunks; None holds what the model's own range asks for

    @property
    def lean(self) -> bool:
        """Without the clean and the context-free passes."""
        return not self.reuse.clean_pass

    @property
    def reuses(self) -> bool:
        """Whether steps may be reused."""
        return self.reuse.policy != "none"

    @property
    def label(self) -> str:
        """What stands in for a reused step, in words."""
        return label_of((self.reuse.reuse, self.reuse.extrapolate_from))

    @property
    def plain(self) -> Setting:
        """The same passes and KV without reuse."""
        return Setting(reuse=LEAN if self.lean else VANILLA, budget=self.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is swept."""

    warmup: int  # first steps that are computed
    chosen: StandIn  # of the presets
    fractions: tuple[float, ...] = (0.9, 0.8, 0.65, 0.5, 0.4)  # computed fractions that thresholds of the curves aim at
    budgets: tuple[int, ...] = (1, 2, 3, 4)  # of the KV buffer
    rungs: int = 9  # thresholds that are tried to find those of the curves

    @property
    def stand_ins(self) -> tuple[StandIn, ...]:
        """All that are swept."""
        return tuple(dict.fromkeys((*STAND_INS, self.chosen)))

    def reuse(self, method: str, stand_in: StandIn, threshold: float) -> Setting:
        """A point of a method's curve."""
        kind, share = stand_in
        own = replace(LEAN, policy=method, threshold=threshold, warmup_steps=self.warmup)
        return Setting(reuse=replace(own, reuse=kind, extrapolate_from=share))

    def settings(
        self, threshold: Callable[[str, StandIn, float], float], presets: Mapping[str, Setting]
    ) -> tuple[Setting, ...]:
        """All settings, each once.

        Args:
            threshold: of a method and what stands in, for a computed fraction.
            presets: by name; those of `WORK` are also run with vanilla passes and with compression.
        """
        found = [Setting(), Setting(reuse=LEAN), *presets.values()]
        for method, stand_in, fraction in itertools.product(METHODS, self.stand_ins, self.fractions):
            found.append(self.reuse(method, stand_in, threshold(method, stand_in, fraction)))
        for name in WORK:
            found.append(Setting(reuse=replace(presets[name].reuse, clean_pass=True, copy_pass=True)))
        for budget in self.budgets:
            found.append(Setting(reuse=LEAN, budget=budget))
            found += [replace(presets[name], budget=budget) for name in WORK]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run does, decided once."""

    run: dict[str, Any]  # what results depend on: model, prompts, length, steps, seed
    settings: tuple[Setting, ...]  # all that are compared
    presets: dict[str, Setting]  # settings that have a name
    calibrated: dict[str, float] = field(default_factory=dict)
    """Thresholds at which the presets of that name would do the paper's share of the work."""


class ObservationLog(Recorder):
    """Keeps what a policy would see, tick by tick."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks: list[list[Observation]] = []

    def decided(self, seen: Observation, decision: Decision) -> None:
        """A chunk's step was decided."""
        super().decided(seen, decision)
        if not self.ticks or self.ticks[-1][0].tick != seen.tick:
            self.ticks.append([])
        self.ticks[-1].append(seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What thresholds are found with: videos of a few prompts."""

    observe: Callable[[], Sequence[Ticks]]  # what policies would see of videos without reuse
    computed: Callable[[Setting], float]  # mean computed fraction of a setting
    work: Callable[[Setting], float]  # mean counted operations of a setting, as a share of vanilla's


def make_plan(
    probe: Probe,
    grid: Grid,
    presets: dict[str, Setting] | None,
    run: dict[str, Any],
    log: Callable[[str], None],
) -> Plan:
    """Find all thresholds.

    Args:
        probe: makes videos.
        grid: what is swept.
        presets: by name; None takes the calibrated thresholds.
        run: what the results depend on; goes into the plan as it is.
        log: told what is being done.
    """
    log("thresholds: watching distances")
    seen = probe.observe()
    rungs = {method: _rungs(seen, method, grid) for method in METHODS}
    known: dict[tuple[str, StandIn], dict[float, float]] = {}

    def threshold(method: str, stand_in: StandIn, fraction: float) -> float:
        log(f"thresholds: {method}, {label_of(stand_in)}, {fraction:.0%}")

        def measure(one: float) -> float:
            return probe.computed(grid.reuse(method, stand_in, one))

        if (method, stand_in) not in known:
            known[method, stand_in] = {rung: measure(rung) for rung in rungs[method]}
        found = search(measure, fraction, known[method, stand_in], tries=5, near=_NEAR, geometric=True)
        return nearest(found, fraction)

    calibrated = _calibrated(probe, grid, partial(threshold, "flowcache", grid.chosen))
    presets = presets or {name: grid.reuse("flowcache", grid.chosen, one) for name, one in calibrated.items()}
    return Plan(run=run, settings=grid.settings(threshold, presets), presets=presets, calibrated=calibrated)


def _rungs(seen: Sequence[Ticks], method: str, grid: Grid) -> list[float]:
    """Thresholds at equal ratios that span all useful fractions.

    Reuse shrinks the distances of some kinds, so they begin lower.
    """

    def policy(threshold: float) -> Policy:
        return ReuseSettings(policy=method, threshold=threshold, warmup_steps=grid.warmup).new_policy()

    lowest, highest = (estimate_threshold(seen, policy, fraction) for fraction in (_WIDEST, _NARROWEST))
    ratio = (2 * highest / lowest) ** (1 / (grid.rungs - 1))
    return [rounded(lowest / 2 * ratio**i) for i in range(grid.rungs)]


def estimate_threshold(videos: Sequence[Ticks], policy: Callable[[float], Policy], fraction: float) -> float:
    """The threshold at which a policy would compute that fraction of the chunk-steps, on distances seen without reuse.

    Where the warm-up alone computes more, the highest threshold is the answer.
    """

    def computed(threshold: float) -> float:
        deciders = [(policy(threshold), ticks) for ticks in videos]
        decisions = [one for decider, ticks in deciders for seen in ticks for one in decider.decide(seen)]
        return decisions.count(Decision.COMPUTE) / len(decisions)

    known = search(computed, fraction, {_LOWEST: math.inf, _HIGHEST: -math.inf}, tries=40, geometric=True)
    return min(threshold for threshold, share in known.items() if share <= fraction)


def _calibrated(probe: Probe, grid: Grid, start: Callable[[float], float]) -> dict[str, float]:
    """Thresholds at which chunk-wise reuse does the share of vanilla's operations that `WORK` asks for.

    `start` has thresholds of computed fractions, near enough to search around.
    """
    lean = probe.work(Setting(reuse=LEAN))
    found = {}
    for name, target in WORK.items():
        middle = start(target / lean)
        bounds = {middle / 2: math.inf, middle * 2: -math.inf}

        def measure(threshold: float) -> float:
            return probe.work(grid.reuse("flowcache", grid.chosen, threshold))

        found[name] = nearest(search(measure, target, bounds, tries=8, geometric=True), target)
    return found


def mean(values: Sequence[float]) -> float:
    """The mean; not a number where there are no values."""
    return statistics.fmean(values) if values else math.nan
