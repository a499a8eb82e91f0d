"""Finds the rank that hangs from the heartbeats of all ranks. Pure: no clock, no store and no process in here.

A silent rank is the first suspect. While there is one, no other rank is blamed: others may wait for it in the middle of
their work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from parallel.health.failure import Failure
from parallel.health.timeouts import Timeouts
from parallel.mesh import Mesh

_SUSPECT = 1 / 6  # of `silent`: a rank without a heartbeat for so long keeps others from being blamed
_ALSO = 3 / 4  # of `silent`: a rank is named along with one that exceeds it, for a lost machine takes all its ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a rank says of itself."""

    count: int  # heartbeats so far
    items: int  # tasks begun so far
    doing: str  # the present task, in words; empty while the rank waits
    last: str  # the task begun last
    limit: float  # seconds that the present task may take
    pid: int  # of the rank's process
    machine: str  # of the rank's process, as `this_machine` names it

    @property
    def at(self) -> str:
        """What the rank does, or has done last."""
        return f"at {self.doing}" if self.doing else f"after {self.last}"


@dataclass(slots=True)
class _Observed:
    """A rank's latest heartbeat, and for how many seconds it has stayed the same."""

    heartbeat: Heartbeat
    silent: float = 0.0  # since the heartbeat changed
    busy: float = 0.0  # since the task changed


@dataclass(slots=True)
class HangDetector:
    """Looks at all ranks again and again."""

    mesh: Mesh  # for the names of ranks; its rank is named as the reporter
    timeouts: Timeouts
    slack: float = 0.0  # seconds more than each limit
    _ranks: dict[int, _Observed] = field(default_factory=dict)
    _absent: float = 0.0
    _idle: float = 0.0
    _items: int = 0

    def look(self, heartbeats: Mapping[int, Heartbeat | None], passed: float, expected: int = 0) -> Failure | None:
        """What is wrong, if anything is, `passed` seconds after the last look.

        Heartbeats are of the ranks that have joined, None for one that has left. `expected` are results for which the
        caller does nothing but wait.
        """
        self._observe(heartbeats, passed)
        limit = self.timeouts.silent + self.slack
        if suspects := [rank for rank, one in self._ranks.items() if one.silent > limit * _SUSPECT]:
            return self._silent(suspects, limit)
        absent = [rank for rank in range(self.mesh.layout.world_size) if rank not in heartbeats]
        self._absent = self._absent + passed if absent else 0.0
        if not absent:
            return self._stuck(passed) or self._asleep(passed, expected)
        if self._absent <= self.timeouts.first + self.slack:
            return None
        return self._failure(f"{self._names(absent)} not come within {self.timeouts.first:.0f} s")

    def _failure(self, message: str, hung: tuple[int, ...] = ()) -> Failure:
        return Failure(message=message, reporter=self.mesh.rank, hung=hung)

    def _observe(self, heartbeats: Mapping[int, Heartbeat | None], passed: float) -> None:
        for rank, heartbeat in heartbeats.items():
            if heartbeat is None:
                self._ranks.pop(rank, None)
                continue
            one = self._ranks.setdefault(rank, _Observed(heartbeat))
            before, one.heartbeat = one.heartbeat, heartbeat
            one.silent = 0.0 if heartbeat.count != before.count else one.silent + passed
            if not heartbeat.doing or (heartbeat.items, heartbeat.doing) != (before.items, before.doing):
                one.busy = 0.0

    def _silent(self, suspects: list[int], limit: float) -> Failure | None:
        worst = max((self._ranks[rank] for rank in suspects), key=lambda one: one.silent)
        if worst.silent <= limit:
            return None
        hung = [rank for rank in suspects if self._ranks[rank].silent > limit * _ALSO]
        message = f"{self._names(hung)} given no sign of life for {worst.silent:.0f} s {worst.heartbeat.at}"
        return self._failure(message, tuple(hung))

    def _stuck(self, passed: float) -> Failure | None:
        working = {rank: one for rank, one in self._ranks.items() if one.heartbeat.doing}
        for one in working.values():
            one.busy += passed
        late = [one for one in working.values() if one.busy > one.heartbeat.limit + self.slack]
        if not late:
            return None
        # The ranks of a stage wait for each other within an item, so all that are at it are named.
        ranks = [rank for rank, one in working.items() if one.heartbeat.doing == late[0].heartbeat.doing]
        return self._failure(f"{self._names(ranks)} not come on for {late[0].busy:.0f} s {late[0].heartbeat.at}")

    def _asleep(self, passed: float, expected: int) -> Failure | None:
        items = sum(one.heartbeat.items for one in self._ranks.values())
        working = any(one.heartbeat.doing for one in self._ranks.values())
        self._idle = self._idle + passed if expected and not working and items == self._items else 0.0
        self._items = items
        if self._idle <= self.timeouts.step + self.slack:
            return None
        return self._failure(f"no rank works, though {expected} items are under way")

    def _names(self, ranks: list[int]) -> str:
        names = [self.mesh.name(rank) for rank in sorted(ranks)]
        return f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'}"
