"""How long the ranks of a gang, and a process that watches them, wait for one another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Limits in seconds."""

    silent: float = 20.0  # for a rank without a heartbeat, and for a store that does not answer
    first: float = 900.0  # for all ranks to join, for loading, and for a rank's first items, which may compile
    step: float = 180.0  # for one item after that, and for results on which no rank works
    grace: float = 3.0  # for a rank to unwind after a failure

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats of a rank."""
        return min(0.5, self.silent / 8)
