"""Which failures are caused when, by tie-break, and the thread that causes them.

A strike waits until all gangs that were hit before work again, and then for a while; some do not wait. Loss of a node
goes on until it is replaced, which the main thread does.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from benchmarks.chaos_account import Accountant, Strike
from benchmarks.chaos_ground import Ground
from models.errors import InputError
from parallel.cluster.gang import GangState, GangView

_NODE_SHARE, _STOP_SHARE, _HASTY_SHARE = 0.15, 0.25, 0.2
_WAIT, _HASTE = (0.3, 2.5), (0.1, 1.0)
_LOOK, _PATIENCE = 0.05, 120.0


class Kind(StrEnum):
    """What fails."""

    RANK = "rank"
    GANG = "gang"
    NODE = "node"


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A strike to come."""

    kind: Kind  # what fails
    how: signal.Signals  # SIGKILL or SIGSTOP; a node is cut off in any case
    wait: float  # seconds, once it is its quantum
    hasty: bool  # its quantum comes while others are not yet made good
    tie_break: float  # picks whom it hits, 0 to 1


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Kinds by name, with commas between.

    Raises:
        InputError: there is no such kind, or none at all.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in list(Kind)]
    if unknown:
        raise InputError(f"--kinds {text}: {unknown[0]!r} cannot fail here; choose from {', '.join(Kind)}")
    return tuple(kind for kind in Kind if kind in names)


def plan_strikes(count: int, kinds: Sequence[Kind], seed: int) -> list[Planned]:
    """Strikes in order. The same for the same arguments.

    Few of them are losses of nodes, which Ray takes a quarter of a minute to believe; of the others a quarter stops
    processes in place of ending them. A fifth does not wait; never the first, nor two in a row.
    """
    draw = random.Random(seed)
    nodes = count if list(kinds) == [Kind.NODE] else 0
    if Kind.NODE in kinds and not nodes:
        nodes = min(count - 1, max(1, round(_NODE_SHARE * count)))
    others = [kind for kind in kinds if kind is not Kind.NODE]
    whats = [Kind.NODE] * nodes + [others[index % len(others)] for index in range(count - nodes)]
    stops = max(round(_STOP_SHARE * (count - nodes)), int(count - nodes > 1))
    hows = [signal.SIGKILL] * nodes + [signal.SIGSTOP] * stops + [signal.SIGKILL] * (count - nodes - stops)
    pairs = list(zip(whats, hows, strict=True))
    draw.shuffle(pairs)
    hasty = _apart(draw, count, round(_HASTY_SHARE * count))
    return [
        Planned(
            kind=kind,
            how=how,
            wait=draw.uniform(*(_HASTE if index in hasty else _WAIT)),
            hasty=index in hasty,
            tie_break=draw.random(),
        )
        for index, (kind, how) in enumerate(pairs)
    ]


def _apart(draw: random.Random, count: int, wanted: int) -> set[int]:
    """Numbers from 1 below a count, no two in a row; as many as are wanted where there is room."""
    chosen: set[int] = set()
    for index in draw.sample(range(1, count), max(0, count - 1)):
        if len(chosen) < wanted and not {index - 1, index + 1} & chosen:
            chosen.add(index)
    return chosen


class Injector:
    """Causes failures in a thread of its own. A context: the thread ends with it.

    Args:
        plan: what to cause.
        ground: where.
        account: knows which gangs work.
        clock: seconds, as the account counts them.

    Attributes:
        strikes: so far.
    """

    def __init__(
        self, plan: Sequence[Planned], ground: Ground, account: Accountant, clock: Callable[[], float]
    ) -> None:
        self._plan, self._ground, self._account, self._clock = plan, ground, account, clock
        self.strikes: list[Strike] = []
        self.pids: set[int] = set()
        """Of all ranks that were ever seen."""
        self._views: tuple[GangView, ...] = ()
        self._stop, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="injector", daemon=True)

    def __enter__(self) -> Injector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    @property
    def over(self) -> bool:
        """Nothing more will be struck, and what was struck is made good or will not be."""
        return self._over.is_set()

    def see(self, views: Sequence[GangView]) -> None:
        """The gangs at this moment; called often, since the driver's own thread alone may ask for them."""
        self._views = tuple(views)
        self.pids |= {rank.pid for view in views for rank in view.ranks if rank.pid is not None}

    def stop(self) -> None:
        """Strike no more."""
        self._stop.set()

    def _run(self) -> None:
        try:
            for planned in self._plan:
                if not planned.hasty and not self._until(self._all_good):
                    return
                if self._stop.wait(planned.wait):
                    return
                self._until(lambda planned=planned: self._strike(planned))  # type: ignore[misc]
            self._until(self._all_good)
        finally:
            self._over.set()

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Wait for something, with patience; False when there is no point in going on."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if self._stop.wait(_LOOK):
                return False
            if time.monotonic() > deadline:
                return True
        return True

    def _all_good(self) -> bool:
        """Every gang that was ever hit was lost and works again, and all nodes are there."""
        last = {gang: strike.seconds for strike in self.strikes for gang in strike.gangs}
        return self._ground.whole and all(self._account.good_again(gang, since) for gang, since in last.items())

    def _strike(self, planned: Planned) -> bool:
        """Hit somebody; False if nobody can be hit now."""
        views = [view for view in self._views if view.ranks and all(rank.pid for rank in view.ranks)]
        if not planned.hasty:
            views = [view for view in views if view.state is GangState.UP and view.gang in self._account.working]
        if not views or (planned.kind is Kind.NODE and not self._ground.whole):
            return False
        place = planned.tie_break * len(views)
        view, tie_break = views[int(place)], place % 1
        strike = Strike(
            number=len(self.strikes) + 1,
            seconds=self._clock(),
            kind=planned.kind,
            how=planned.how.name,
            whom=view.gang,
            gangs=(view.gang,),
            hasty=planned.hasty,
        )
        hit = (
            self._cut(view, tie_break, strike)
            if planned.kind is Kind.NODE
            else self._signal(view, tie_break, planned, strike)
        )
        if hit is None:
            return False
        self.strikes.append(hit)
        return True

    def _signal(self, view: GangView, tie_break: float, planned: Planned, strike: Strike) -> Strike | None:
        ranks = list(view.ranks)
        if planned.kind is Kind.RANK:
            ranks = [ranks[int(tie_break * len(ranks))]]
            strike = replace(strike, whom=f"{view.gang} rank {ranks[0].rank}")
        sent = self._ground.hit([rank.pid for rank in ranks if rank.pid is not None], planned.how)
        return strike if sent else None

    def _cut(self, view: GangView, tie_break: float, strike: Strike) -> Strike | None:
        node = view.ranks[int(tie_break * len(view.ranks))].node
        there = [(one.gang, rank.pid) for one in self._views for rank in one.ranks if rank.node == node]
        gangs = tuple(sorted({gang for gang, _ in there}))
        if not self._ground.cut(node, [pid for _, pid in there if pid is not None]):
            return None
        return replace(strike, how="cut off", whom=f"the node of {', '.join(gangs)}", gangs=gangs)
