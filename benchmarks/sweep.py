"""Which settings the quality benchmark compares, and thresholds that give a wanted amount of work.

The distances of a model decide what a threshold means. So thresholds are found, not listed. Policies that decide on
the distances of a video made without reuse show in which range to look, at no cost; a few videos that are really made,
since reuse changes the distances, give the thresholds of the curves; and bisection those whose counted work must be
exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.kv.size import KVSettings
from engine.record import Recorder
from engine.reuse.memory import KINDS
from engine.reuse.policy import Decision, Observation, Policy
from engine.reuse.settings import ReuseSettings

METHODS = ("flowcache", "teacache")
VANILLA, LEAN = "vanilla", "lean"
WORK = {"flowcache-slow": 0.53, "flowcache-fast": 0.46}
"""Counted operations of the presets as a share of vanilla's, as in the paper."""
_LOWEST, _HIGHEST = 1e-6, 1e2  # thresholds that are searched
_HALVINGS = 40
_NEAR = 0.02  # of a computed fraction

Ticks = Sequence[Sequence[Observation]]
"""What was seen of a video's chunks, tick by tick."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StandIn:
    """What stands in for a step that is not computed."""

    kind: str
    extrapolate_from: float = 1.0
    """Share of the threshold above which it is extrapolated in place of that; 1 never does."""

    @property
    def label(self) -> str:
        """As it stands in tables and legends."""
        if self.extrapolate_from >= 1:
            return self.kind
        return f"{self.kind}, extrapolate from {self.extrapolate_from:g}"


STAND_INS = (*(StandIn(kind=kind) for kind in KINDS), StandIn(kind="velocity", extrapolate_from=0.5))
"""Those that are always swept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to make a video."""

    method: str = "none"  # policy of reuse, or `none`
    kind: str = "residual"  # what stands in for a reused step
    extrapolate_from: float = 1.0  # see `StandIn`
    threshold: float = 0.0  # of the policy
    warmup: int = 1  # first steps that are computed
    passes: str = VANILLA
    """`vanilla` has the clean and the context-free passes, `lean` neither, as the published reuse runs."""
    budget: int | None = None  # of the KV buffer in chunks; None holds what the model's own range asks for

    @property
    def stand_in(self) -> StandIn:
        """What stands in for a reused step."""
        return StandIn(kind=self.kind, extrapolate_from=self.extrapolate_from)

    @property
    def cache(self) -> ReuseSettings:
        """The engine's settings of reuse."""
        extra = self.passes == VANILLA
        return ReuseSettings(
            policy=self.method,
            threshold=self.threshold,
            warmup_steps=self.warmup,
            reuse=self.kind,
            extrapolate_from=self.extrapolate_from,
            clean_pass=extra,
            copy_pass=extra,
        )

    @property
    def kv(self) -> KVSettings:
        """The engine's settings of the KV buffer."""
        return KVSettings(budget=self.budget)

    @property
    def plain(self) -> Setting:
        """The same passes and KV without reuse."""
        return Setting(passes=self.passes, budget=self.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is swept."""

    warmup: int  # first steps that are computed
    chosen: StandIn  # what stands in for a reused step in the presets
    fractions: tuple[float, ...] = (0.9, 0.8, 0.65, 0.5, 0.4)  # computed fractions that thresholds of the curves aim at
    budgets: tuple[int, ...] = (1, 2, 3, 4)  # of the KV buffer
    rungs: int = 9  # thresholds that are tried to find those of the curves

    @property
    def stand_ins(self) -> tuple[StandIn, ...]:
        """All that are swept."""
        return tuple(dict.fromkeys((*STAND_INS, self.chosen)))

    def reuse(self, method: str, stand_in: StandIn, threshold: float) -> Setting:
        """A point of a method's curve."""
        return Setting(
            method=method,
            kind=stand_in.kind,
            extrapolate_from=stand_in.extrapolate_from,
            threshold=threshold,
            warmup=self.warmup,
            passes=LEAN,
        )

    def settings(
        self, threshold: Callable[[str, StandIn, float], float], presets: Mapping[str, Setting]
    ) -> tuple[Setting, ...]:
        """All settings, each once.

        Args:
            threshold: of a method and what stands in, for a computed fraction.
            presets: by name; those of `WORK` are also run with vanilla passes and with compression.
        """
        found = [Setting(), Setting(passes=LEAN), *presets.values()]
        for method, stand_in, fraction in itertools.product(METHODS, self.stand_ins, self.fractions):
            found.append(self.reuse(method, stand_in, threshold(method, stand_in, fraction)))
        found += [replace(presets[name], passes=VANILLA) for name in WORK]
        for budget in self.budgets:
            found.append(Setting(passes=LEAN, budget=budget))
            found += [replace(presets[name], budget=budget) for name in WORK]
        return tuple(dict.fromkeys(found))


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


def estimate_threshold(videos: Sequence[Ticks], policy: Callable[[float], Policy], fraction: float) -> float:
    """The threshold at which a policy would compute that fraction of the chunk-steps, on distances seen without reuse.

    Args:
        videos: what was seen of each.
        policy: makes one with a threshold.
        fraction: 0..1; where the warm-up alone computes more, the highest threshold is the answer.
    """

    def computed(threshold: float) -> float:
        decisions = []
        for ticks in videos:
            deciding = policy(threshold)
            decisions += [one for seen in ticks for one in deciding.decide(seen)]
        return sum(one is Decision.COMPUTE for one in decisions) / len(decisions)

    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if computed(math.exp(middle)) > fraction else (low, middle)
    return rounded(math.exp(high))


def ladder(lowest: float, highest: float, count: int) -> list[float]:
    """Thresholds at equal ratios."""
    ratio = (highest / lowest) ** (1 / (count - 1))
    return [rounded(lowest * ratio**i) for i in range(count)]


def refined(measure: Callable[[float], float], measured: dict[float, float], target: float, tries: int = 5) -> float:
    """The threshold of a computed fraction: between or beyond known ones, measured until it is near.

    Args:
        measure: computed fraction at a threshold; it may jump, and rise a little where it should fall.
        measured: what is known, of two thresholds at least; the new points are added.
        target: the fraction that is wanted.
        tries: most measurements.
    """
    for attempt in range(tries):
        nearest = min(measured, key=lambda one: (abs(measured[one] - target), one))
        if abs(measured[nearest] - target) <= _NEAR:
            return nearest
        threshold = rounded(_between(measured, target, halve=attempt % 2 == 1))
        if threshold in measured:
            break
        measured[threshold] = measure(threshold)
    return min(measured, key=lambda one: (abs(measured[one] - target), one))


def _between(measured: Mapping[float, float], target: float, *, halve: bool) -> float:
    """A threshold to try next: interpolated, or half-way between the two where the fraction falls below the target."""
    thresholds = sorted(measured)
    fractions = list(itertools.accumulate((measured[one] for one in thresholds), min))
    above = sum(fraction > target for fraction in fractions)
    if above == 0:
        return thresholds[0] / 2
    if above == len(thresholds):
        return thresholds[-1] * 2
    before, after = fractions[above - 1], fractions[above]
    share = 0.5 if halve else (before - target) / (before - after)
    return thresholds[above - 1] ** (1 - share) * thresholds[above] ** share


def calibrate(measure: Callable[[float], float], *, start: float, target: float, halvings: int = 8) -> float:
    """The threshold, to three digits, whose measured work is nearest to a target; work falls as the threshold rises.

    Args:
        measure: work at a threshold.
        start: a guess; the search goes from half of it to twice it.
        target: the work that is wanted.
        halvings: of the range, each one measurement.
    """
    low, high = math.log(start / 2), math.log(start * 2)
    tried: dict[float, float] = {}
    for _ in range(halvings):
        middle = (low + high) / 2
        threshold = rounded(math.exp(middle))
        if threshold not in tried:
            tried[threshold] = measure(threshold)
        low, high = (middle, high) if tried[threshold] > target else (low, middle)
    return min(tried, key=lambda one: (abs(tried[one] - target), one))


def rounded(value: float) -> float:
    """To three digits, as it would be written in a preset."""
    return float(f"{value:.3g}")
