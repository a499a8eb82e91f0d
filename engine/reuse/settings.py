"""Reuse settings by name, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.reuse.memory import KINDS, ReuseMemory
from engine.reuse.policy import ChunkPolicy, NoReuse, Policy, WindowPolicy
from models.errors import InputError

POLICIES = ("none", "flowcache", "teacache")


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
            return NoReuse()
        kind = ChunkPolicy if self.policy == "flowcache" else WindowPolicy
        return kind(self.threshold, self.warmup_steps, self.extrapolate_from)

    def new_memory(self) -> ReuseMemory:
        """An empty memory, for one request."""
        return ReuseMemory(self.reuse, both=self.extrapolate_from < 1)

    def with_threshold(self, threshold: float) -> ReuseSettings:
        """The same with another threshold."""
        return replace(self, threshold=threshold)
