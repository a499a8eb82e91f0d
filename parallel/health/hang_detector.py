"""Finds, from the signs of life of all ranks, the one that hangs. It knows no clock, no store and no process.

A rank that is silent is the first suspect: as long as there is one, nobody else is judged, for others may wait for it
in the middle of their work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from parallel.health.heartbeats import Heartbeat
from parallel.topology.mesh import Mesh

_SUSPECT = 1 / 6
"""Part of the time without a sign of life after which nothing else is judged."""
_AS_WELL = 3 / 4
"""Part of that time after which a rank is named with one that is over it: a machine takes all its ranks along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """How long to wait, in seconds."""

    silent: float = 20.0  # without a sign of life from a rank
    first: float = 900.0  # for all ranks to come, for loading, and for a rank's first items, which may compile
    step: float = 180.0  # for one item after that
    grace: float = 3.0  # for a rank to unwind after a failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What is wrong."""

    message: str  # one line
    hung: tuple[int, ...] = ()  # ranks that cannot hear of it


@dataclass(slots=True)
class _Seen:
    """Seconds for which a rank's sign of life, and the thing that it does, have been the same."""

    heartbeat: Heartbeat
    silent: float = 0.0
    busy: float = 0.0


@dataclass(slots=True)
class HangDetector:
    """Looks at all ranks again and again.

    Args:
        mesh: names of ranks.
        timeouts: how long to wait.
    """

    mesh: Mesh
    timeouts: Timeouts
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _absent: float = 0.0
    _idle: float = 0.0
    _begun: int = 0

    def look(self, heartbeats: Mapping[int, Heartbeat | None], passed: float, expected: int) -> Diagnosis | None:
        """Look at all ranks.

        Args:
            heartbeats: of those that have come; None for those that have left.
            passed: seconds since the last look.
            expected: results that this rank does nothing but wait for.

        Returns:
            What is wrong, if anything is.
        """
        self._note(heartbeats, passed)
        times = self.timeouts
        if silent := [rank for rank, seen in self._seen.items() if seen.silent > times.silent * _SUSPECT]:
            return self._silent(silent)
        absent = [rank for rank in range(self.mesh.layout.world_size) if rank not in heartbeats]
        self._absent = self._absent + passed if absent else 0.0
        if absent:
            if self._absent <= times.first:
                return None
            return Diagnosis(message=f"{self._names(absent)} not come within {times.first:.0f} s")
        return self._stuck(passed) or self._asleep(passed, expected)

    def _note(self, heartbeats: Mapping[int, Heartbeat | None], passed: float) -> None:
        for rank, heartbeat in heartbeats.items():
            if heartbeat is None:
                self._seen.pop(rank, None)
                continue
            seen = self._seen.setdefault(rank, _Seen(heartbeat))
            seen.silent = 0.0 if heartbeat.count != seen.heartbeat.count else seen.silent + passed
            if not heartbeat.doing or (heartbeat.items, heartbeat.doing) != (
                seen.heartbeat.items,
                seen.heartbeat.doing,
            ):
                seen.busy = 0.0
            seen.heartbeat = heartbeat

    def _silent(self, suspects: list[int]) -> Diagnosis | None:
        longest = max(suspects, key=lambda rank: self._seen[rank].silent)
        seconds = self._seen[longest].silent
        if seconds <= self.timeouts.silent:
            return None
        hung = [rank for rank in suspects if self._seen[rank].silent > self.timeouts.silent * _AS_WELL]
        message = f"{self._names(hung)} given no sign of life for {seconds:.0f} s {self._seen[longest].heartbeat.at}"
        return Diagnosis(message=message, hung=tuple(hung))

    def _stuck(self, passed: float) -> Diagnosis | None:
        working = {rank: seen for rank, seen in self._seen.items() if seen.heartbeat.doing}
        for seen in working.values():
            seen.busy += passed
        late = [seen for seen in working.values() if seen.busy > seen.heartbeat.limit]
        if not late:
            return None
        # The ranks of a stage wait for each other within an item, so one that is stuck holds up those beside it.
        item = late[0].heartbeat.doing
        ranks = [rank for rank, seen in working.items() if seen.heartbeat.doing == item]
        return Diagnosis(message=f"{self._names(ranks)} not come on for {late[0].busy:.0f} s {late[0].heartbeat.at}")

    def _asleep(self, passed: float, expected: int) -> Diagnosis | None:
        begun = sum(seen.heartbeat.items for seen in self._seen.values())
        working = any(seen.heartbeat.doing for seen in self._seen.values())
        self._idle = self._idle + passed if expected and not working and begun == self._begun else 0.0
        self._begun = begun
        if self._idle <= self.timeouts.step:
            return None
        return Diagnosis(message=f"no rank works, though {expected} items are under way")

    def _names(self, ranks: list[int]) -> str:
        names = [self.mesh.name(rank) for rank in sorted(ranks)]
        return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'}"
