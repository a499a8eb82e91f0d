"""Reuse settings by name, and what stands in for a step that is not computed.

Three kinds, by name: `residual` adds the increment of the last computed step, as published; `velocity` takes its
velocity times the present step size, which is right when step sizes differ; `extrapolate` continues the last two
computed velocities to the present time, a first-order Taylor step (the idea of TaylorSeer and SCOPE).

The memory is per chunk and bounded by the window. Shapes: latents and velocities [1, C, T, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.reuse.policy import ChunkPolicy, Decision, Policy, WindowPolicy
from models.errors import InputError

POLICIES = ("none", "flowcache", "teacache")
KINDS = ("residual", "velocity", "extrapolate")


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """A step that was computed."""

    time: float  # before it
    size: float  # what its velocity is multiplied with
    velocity: Tensor  # [1, C, T, h, w]


class ReuseMemory:
    """The last computed velocities of every chunk of the window; two each if a policy may extrapolate (`both`)."""

    def __init__(self, kind: str, *, both: bool = False) -> None:
        if kind not in KINDS:
            raise InputError(f"unknown kind of reuse {kind!r}: choose from {', '.join(KINDS)}")
        self._kind = kind
        self._keep = 2 if both or kind == "extrapolate" else 1
        self._held: dict[int, tuple[ComputedStep, ...]] = {}

    def computed(self, chunk: int, *, time: float, size: float, velocity: Tensor) -> None:
        """Remember a computed step."""
        now = ComputedStep(time, size, velocity)
        self._held[chunk] = (*self._held.get(chunk, ()), now)[-self._keep :]

    def increment(self, chunk: int, decision: Decision, *, time: float, size: float) -> Tensor:
        """The increment of the latent that stands in for a step of that time and size."""
        *older, last = self._held[chunk]
        extrapolated = decision is Decision.EXTRAPOLATE or self._kind == "extrapolate"
        if self._kind == "residual" and not extrapolated:
            return last.velocity * last.size
        velocity = last.velocity
        if older and extrapolated:
            slope = (time - last.time) / (last.time - older[0].time)
            velocity = velocity + slope * (velocity - older[0].velocity)
        return velocity * size

    def forget(self, chunk: int) -> None:
        """A chunk has left the window."""
        self._held.pop(chunk, None)

    def state(self) -> dict[int, tuple[ComputedStep, ...]]:
        """Everything that is held, by chunk."""
        return dict(self._held)

    def restore(self, state: Mapping[int, Sequence[ComputedStep]], device: torch.device) -> None:
        """Go on from a saved state, on a device."""
        for chunk, held in state.items():
            self._held[chunk] = tuple(replace(one, velocity=one.velocity.to(device)) for one in held)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseSettings:
    """How steps are reused."""

    policy: str = "none"  # one of `POLICIES`
    threshold: float = 0.0  # epsilon; what it means is the policy's
    warmup_steps: int = 1  # m, first steps that are always computed
    reuse: str = "residual"  # one of `KINDS`
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated; 1 never does
    clean_pass: bool = True  # renew the KV of a finished chunk by a pass of its own; the published runs do not
    copy_pass: bool = True  # the context-free pass of the cleanest chunk of a distilled model

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"unknown reuse policy {self.policy!r}: choose from {', '.join(POLICIES)}")
        if self.reuse not in KINDS:
            raise InputError(f"unknown kind of reuse {self.reuse!r}: choose from {', '.join(KINDS)}")
        self.new_policy()  # checks the figures

    def new_policy(self) -> Policy:
        """A policy with empty state, for one request."""
        if self.policy == "none":
            return Policy()
        kind = ChunkPolicy if self.policy == "flowcache" else WindowPolicy
        return kind(self.threshold, self.warmup_steps, self.extrapolate_from)

    def new_memory(self) -> ReuseMemory:
        """An empty memory, for one request."""
        return ReuseMemory(self.reuse, both=self.extrapolate_from < 1)

    def with_threshold(self, threshold: float) -> ReuseSettings:
        """The same with another threshold."""
        return replace(self, threshold=threshold)
