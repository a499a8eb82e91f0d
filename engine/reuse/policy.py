"""Reuse of steps: what was seen of a chunk goes in, whether to compute it comes out (what stands in: `memory.py`).

A policy sees figures, never tensors, and does not know where a step is computed. Its state is a few numbers per chunk
of the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from engine.reuse.memory import KINDS, ReuseMemory
from models.errors import InputError

POLICIES = ("none", "flowcache", "teacache", "teacache-cyclic")
DISTANCES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Arithmetics of distances between patch embeddings, by name; the code that is published for MAGI-1 takes them in bf16,
where each of its steps is rounded."""
_BRANCHES = 2  # of guidance
CONDITION = "condition"
"""The distance that looks at no latents: of the layers' condition in a step, known before a video begins."""


class Decision(Enum):
    """What happens to a chunk in a tick."""

    COMPUTE = 0
    REUSE = 1
    EXTRAPOLATE = 2  # reused too, but with the change of the velocity taken on: between the other two
    REUSE_TEXT = 3  # the pass with the text is reused, and the one without it computed
    REUSE_NULL = 4  # the other way round

    @property
    def computes(self) -> bool:
        """Some pass of the step is run."""
        return self not in (Decision.REUSE, Decision.EXTRAPOLATE)

    def leaves_out(self, caption: str) -> bool:
        """Of a step that `computes`, whether the pass with that caption is reused all the same."""
        return self is (Decision.REUSE_TEXT if caption == "text" else Decision.REUSE_NULL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One chunk at the start of a tick."""

    chunk: int  # absolute number
    step: int  # the chunk's own step
    tick: int  # of the video
    final: bool  # the family computes it in any case: the video ends with this tick, or the chunk with this step
    change: float | None
    """L1 norm of the difference of its patch embeddings of this tick and the one before; None at step 0."""
    scale: float | None  # L1 norm of the patch embeddings of the tick before; None at step 0
    rounded: bool = False  # the distance is rounded to bf16, as the two norms are

    @property
    def distance(self) -> float | None:
        """Relative L1 distance (FlowCache, Eq. 5)."""
        if self.change is None or self.scale is None:
            return None
        quotient = self.change / self.scale if self.scale else float("inf")
        return torch.tensor(quotient, dtype=torch.bfloat16).item() if self.rounded else quotient


def change_norms(then: Tensor, now: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """L1 norms (of the change, of what was before) of patch embeddings, in an arithmetic of `DISTANCES`.

    In bf16 the difference and both means are rounded, and 1e-8 is added to the second, as published.
    """
    then, now = then.to(dtype), now.to(dtype)
    change, scale = ((part.abs().float().mean()).to(dtype) for part in (now - then, then))
    return change, scale + 1e-8 if dtype == torch.bfloat16 else scale


class Policy:
    """Decides, for chunks of one request. This one computes everything."""

    scope: Literal["chunk", "window"] = "chunk"
    """Whether it decides for one chunk at a time, or needs to see the whole window at once."""
    observes = False
    """Whether it looks at distances at all."""

    def decide(self, observations: Sequence[Observation]) -> list[Decision]:
        """Decide for the chunks that were observed, in order."""
        return [Decision.COMPUTE] * len(observations)

    def forget(self, chunk: int) -> None:
        """A chunk has left the window."""

    def state(self) -> dict[str, float]:
        """All that the next decisions depend on."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""


class _Accumulator(Policy):
    """Sums of distances since the last computation, one for each key; each is put into the polynomial first."""

    observes = True

    def __init__(
        self,
        threshold: float,  # epsilon, bound of a sum
        warmup_steps: int,  # m, first steps of a chunk or ticks of the window, which are computed; so is the last tick
        extrapolate_from: float = 1.0,  # share of the threshold above which a step is extrapolated and not just reused
        polynomial: Sequence[float] = (),  # coefficients of a fit, of the highest power first; none takes distances
    ) -> None:
        if not 0 <= extrapolate_from <= 1:
            raise InputError(f"extrapolation from {extrapolate_from} of the threshold on: give a share of 0 to 1")
        if not threshold >= 0:
            raise InputError(f"the reuse threshold {threshold} must be zero or more")
        if warmup_steps < 1:
            raise InputError(f"{warmup_steps} warm-up steps: a chunk's first step must be computed, so give 1 or more")
        self.threshold, self.warmup_steps, self._middle = threshold, warmup_steps, extrapolate_from * threshold
        self._sums: dict[str, float] = {}
        self._polynomial = tuple(polynomial)

    def rescale(self, distance: float | None) -> float:
        """What a distance adds to a sum, which may be negative; an unknown one is infinitely far."""
        if distance is None:
            return float("inf")
        if not self._polynomial:
            return distance
        return reduce(lambda value, coefficient: value * distance + coefficient, self._polynomial, 0.0)

    def add(self, key: str, distance: float | None, *, forced: bool) -> Decision:
        total = self._sums.get(key, 0.0) + self.rescale(distance)
        if forced or not total < self.threshold:
            self._sums[key] = 0.0
            return Decision.COMPUTE
        self._sums[key] = total
        return Decision.REUSE if total <= self._middle else Decision.EXTRAPOLATE

    def forget(self, chunk: int) -> None:
        self._sums.pop(str(chunk), None)

    def state(self) -> dict[str, float]:
        return dict(self._sums)

    def restore(self, state: Mapping[str, float]) -> None:
        self._sums = dict(state)


class ChunkPolicy(_Accumulator):
    """FlowCache: each chunk sums its own distances and is reused while the sum stays below the threshold (Eq. 8)."""

    def decide(self, observations: Sequence[Observation]) -> list[Decision]:
        return [self.add(str(one.chunk), one.distance, forced=self._forced(one)) for one in observations]

    def _forced(self, one: Observation) -> bool:
        return one.step < self.warmup_steps or one.final


class WindowPolicy(_Accumulator):
    """TeaCache on a window: one sum and one decision for all chunks. A chunk in its first step is computed anyway."""

    scope = "window"

    def decide(self, observations: Sequence[Observation]) -> list[Decision]:
        """Decide once for the window."""
        now = observations[0]
        forced = now.final or now.tick < self.warmup_steps
        shared = self.add("window", _whole_distance(observations), forced=forced)
        return [Decision.COMPUTE if one.step == 0 else shared for one in observations]


class CyclicPolicy(_Accumulator):
    """TeaCache as published for Wan: each branch of guidance decides by itself, and warms up every so many passes.

    These are counted through both branches, so that an odd number makes them begin at different ticks.
    """

    scope = "window"

    def __init__(self, threshold: float, warmup_steps: int, polynomial: Sequence[float], cycle: int) -> None:
        super().__init__(threshold, warmup_steps, polynomial=polynomial)
        self._cycle = cycle

    def decide(self, observations: Sequence[Observation]) -> list[Decision]:
        """Decide once for each branch of the window."""
        now, distance = observations[0], _whole_distance(observations)
        text, null = (self._reuses(branch, now, distance) for branch in range(_BRANCHES))
        if text and null:
            shared = Decision.REUSE
        else:
            shared = Decision.REUSE_TEXT if text else Decision.REUSE_NULL if null else Decision.COMPUTE
        return [Decision.COMPUTE if one.step == 0 else shared for one in observations]

    def _reuses(self, branch: int, now: Observation, distance: float | None) -> bool:
        since = (_BRANCHES * now.tick + branch) % self._cycle
        forced = now.final or since < _BRANCHES * self.warmup_steps
        return self.add(f"branch {branch}", distance, forced=forced) is Decision.REUSE


def _whole_distance(observations: Sequence[Observation]) -> float | None:
    """Of the window, over its chunks; None if none has one."""
    known = [(one.change, one.scale) for one in observations if one.change is not None and one.scale is not None]
    scale = sum(scale for _, scale in known)
    return sum(change for change, _ in known) / scale if scale else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseSettings:
    """How steps are reused."""

    policy: str = "none"  # one of `POLICIES`
    threshold: float = 0.0  # epsilon; what it means is the policy's
    warmup_steps: int = 1  # m, first steps that are always computed
    reuse: str = "residual"  # one of `KINDS`
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated; 1 never does
    cycle: int | None = None  # passes, through both branches, after which `teacache-cyclic` warms up anew
    distance: str = "fp32"  # arithmetic of distances, one of `DISTANCES`; or `CONDITION`
    polynomial: tuple[float, ...] = ()  # what rescales distances before they are summed, of the highest power first
    clean_pass: bool = True  # renew the KV of a finished chunk by a pass of its own; the published runs do not
    copy_pass: bool = True  # the context-free pass of the cleanest chunk of a distilled model

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"unknown reuse policy {self.policy!r}: choose from {', '.join(POLICIES)}")
        if self.reuse not in KINDS:
            raise InputError(f"unknown kind of reuse {self.reuse!r}: choose from {', '.join(KINDS)}")
        if self.distance not in (known := (*DISTANCES, CONDITION)):
            raise InputError(f"unknown arithmetic of distances {self.distance!r}: choose from {', '.join(known)}")
        if self.policy == "teacache-cyclic" and not self.cycle:
            raise InputError("teacache-cyclic warms up every so many passes: say how many by its cycle")
        if self.distance == "bf16" and self.policy.startswith("teacache"):
            raise InputError("distances in bf16 are those of one chunk, as FlowCache takes them: not for teacache")
        self.new_policy()  # checks the figures

    def new_policy(self) -> Policy:
        """A policy with empty state, for one request."""
        if self.policy == "none":
            return Policy()
        if self.policy == "teacache-cyclic":
            return CyclicPolicy(self.threshold, self.warmup_steps, self.polynomial, self.cycle or 1)
        figures = self.threshold, self.warmup_steps, self.extrapolate_from, self.polynomial
        return ChunkPolicy(*figures) if self.policy == "flowcache" else WindowPolicy(*figures)

    def new_memory(self) -> ReuseMemory:
        """An empty memory, for one request."""
        return ReuseMemory(self.reuse, both=self.extrapolate_from < 1)

    def with_threshold(self, threshold: float) -> ReuseSettings:
        """The same with another threshold."""
        return replace(self, threshold=threshold)
