"""The books of the chunk scheduler: what each request and each gang has and waits for, and who is next.

It decides nothing about failures and hears of no events; `scheduler.py` does, and keeps these books.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from models.errors import InputError
from parallel.cluster.jobs import GangFigures, GangSize, Job, Standing, View

__all__ = ["ENDED", "GangBook", "Ready", "RequestBook", "check_fit", "lot", "next_admission", "next_turn", "reserve"]

ENDED = (Standing.DONE, Standing.ASIDE, Standing.CANCELLED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A turn that is announced and not granted.

    Attributes:
        turn: its index.
        since: when it was announced.
        number: announcements are numbered in their order.
        lot: decides where nothing else does.
    """

    turn: int
    since: float
    number: int
    lot: int


@dataclass(kw_only=True, slots=True)
class RequestBook:
    """A request.

    Attributes:
        job: as submitted.
        submitted: when.
        number: requests are numbered in the order of submission; with `submitted`, their age.
        lot: decides where nothing else does.
        checkpoint: the turn that its last whole checkpoint goes on with.
        standing: where it is; on a gang always PAUSED, whether a turn runs is seen from `granted`.
        gang: that holds its KV.
        granted: turns that were granted and are not done, in order.
        ready: the turn that waits for its grant.
        done: turns done in this life, counted from the start of the video; None until the gang has announced one.
        served: turns had, as fair share counts them.
        furthest: the most turns that were ever done.
        restarts: how often it went back to the queue.
        failures: by reason.
        fruitless: losses and failures since it last got further than ever.
        suspicions: those of them that were losses of its gang for which nobody is blamed.
        alone: it has to run alone.
        reason: of the last failure.
    """

    job: Job
    submitted: float
    number: int
    lot: int
    checkpoint: int
    standing: Standing = Standing.QUEUED
    gang: str | None = None
    granted: list[int] = field(default_factory=list)
    ready: Ready | None = None
    done: int | None = None
    served: int = 0
    furthest: int = 0
    restarts: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    fruitless: int = 0
    suspicions: int = 0
    alone: bool = False
    reason: str | None = None

    @property
    def age(self) -> tuple[float, int]:
        """Less is older."""
        return self.submitted, self.number

    @property
    def slots(self) -> int:
        """That it uses now. Of two granted turns the second waits for the first, so the wider one counts."""
        return max((self.job.turns[turn].slots for turn in self.granted), default=0)

    @property
    def expected(self) -> int | None:
        """The turn that its gang announces next; None where any may come."""
        if self.ready is not None:
            return self.ready.turn + 1
        return self.granted[-1] + 1 if self.granted else self.done

    def more_slots(self, turn: int) -> int:
        """How many the turn needs on top of those that it uses."""
        return max(0, self.job.turns[turn].slots - self.slots)

    def leave(self, standing: Standing) -> None:
        """Go off the gang; what was granted or announced there is void."""
        self.standing, self.gang, self.ready, self.done = standing, None, None, None
        self.granted.clear()

    def view(self) -> View:
        """For others."""
        return View(
            request=self.job.request,
            standing=Standing.RUNNING if self.granted else self.standing,
            gang=self.gang,
            turn=self._turn(),
            turns=len(self.job.turns),
            restarts=self.restarts,
            reason=self.reason,
            alone=self.alone,
        )

    def _turn(self) -> int:
        if self.standing is Standing.DONE:
            return len(self.job.turns)
        return self.checkpoint if self.done is None else self.done


class GangBook:
    """A gang, over all of its lives.

    Args:
        name: its id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = GangSize(slots=1, kv_bytes=0)
        self.up = False
        self.residents: dict[str, RequestBook] = {}
        self.reserved: RequestBook | None = None
        """A queued request that will run alone here, once the gang is empty."""
        self.passed_turns = self.passed_requests = 0
        """How many were preferred to the one that has waited longest, since the last time that none was."""
        self.turns_granted = self.losses = 0
        self._slot_seconds = self._busy_seconds = self._seen = 0.0

    @property
    def slots_busy(self) -> int:
        """Slots that turns use."""
        return sum(one.slots for one in self.residents.values())

    @property
    def kv_used(self) -> int:
        """Bytes that its requests hold."""
        return sum(one.job.kv_bytes for one in self.residents.values())

    @property
    def load(self) -> tuple[float, float, str]:
        """Sorts gangs, the emptiest first."""
        spoken_for = sum(one.job.width for one in self.residents.values())
        memory = self.kv_used / self.size.kv_bytes if self.size.kv_bytes else 0.0
        return spoken_for / self.size.slots, memory, self.name

    def tell_time(self, now: float) -> None:
        """Book the time since the last call. To be called before anything changes."""
        if self.up:
            seconds = now - self._seen
            self._slot_seconds += seconds * self.size.slots
            self._busy_seconds += seconds * self.slots_busy
        self._seen = now

    def figures(self) -> GangFigures:
        """Figures of the moment that was told last."""
        return GangFigures(
            gang=self.name,
            up=self.up,
            slots=self.size.slots,
            slots_busy=self.slots_busy,
            utilisation=self._busy_seconds / self._slot_seconds if self._slot_seconds else 0.0,
            kv_bytes=self.size.kv_bytes,
            kv_used=self.kv_used,
            residents=len(self.residents),
            turns_waiting=sum(one.ready is not None for one in self.residents.values()),
            turns_granted=self.turns_granted,
            losses=self.losses,
        )

    def has_room(self, one: RequestBook, crowd: int | None) -> bool:
        """Whether a request may come now.

        Args:
            one: the request.
            crowd: how many times its slots the gang may promise to requests that would not give way to this one; None
                where memory alone counts.
        """
        if one.job.kv_bytes > self.size.kv_bytes - self.kv_used:
            return False
        if crowd is None:
            return True
        equals = sum(other.job.width for other in self.residents.values() if other.job.priority >= one.job.priority)
        return equals + one.job.width <= crowd * self.size.slots


def lot(*parts: object) -> int:
    """A number drawn by lot, the same for the same parts in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def next_turn(gang: GangBook, share: int) -> RequestBook | None:
    """Whose announced turn is to be granted, if it fits now. Books who was passed over."""
    waiting = [(one, one.ready) for one in gang.residents.values() if one.ready is not None]
    if not waiting:
        return None
    oldest = min(waiting, key=lambda pair: pair[1].number)
    chosen = min(
        waiting, key=lambda pair: (-pair[0].job.priority, pair[0].served, pair[1].since, pair[1].lot, pair[1].number)
    )
    if gang.passed_turns >= share - 1:
        chosen = oldest
    one, ready = chosen
    if one.more_slots(ready.turn) > gang.size.slots - gang.slots_busy:
        return None
    gang.passed_turns = 0 if chosen is oldest else gang.passed_turns + 1
    return one


def next_admission(gang: GangBook, queue: Iterable[RequestBook], *, share: int, crowd: int) -> RequestBook | None:
    """Which queued request is to be admitted on a gang, if it fits now. Books who was passed over."""
    if gang.reserved is not None:
        return None if gang.residents else gang.reserved
    if any(one.alone for one in gang.residents.values()):
        return None
    eligible = [one for one in queue if not one.alone and gang.size.holds(one.job)]
    if not eligible:
        return None
    oldest = min(eligible, key=lambda one: one.age)
    if gang.passed_requests >= share - 1:
        chosen, limit = oldest, None
    else:
        chosen, limit = min(eligible, key=lambda one: (-one.job.priority, one.submitted, one.lot, one.number)), crowd
    if not gang.has_room(chosen, limit):
        return None
    gang.passed_requests = 0 if chosen is oldest else gang.passed_requests + 1
    return chosen


def reserve(gangs: Collection[GangBook], queue: Iterable[RequestBook]) -> None:
    """Give each request that has to run alone a gang that will be emptied for it, as far as there are any.

    It moves to another gang only where fewer requests are left than on its own; so it comes to an empty one.
    """
    before = {gang.reserved.job.request: gang.name for gang in gangs if gang.reserved is not None}
    for gang in gangs:
        gang.reserved = None
    for one in sorted((one for one in queue if one.alone), key=lambda one: one.age):
        own = before.get(one.job.request)
        free = [gang for gang in gangs if gang.up and gang.reserved is None and gang.size.holds(one.job)]
        if free:
            emptiest = sorted(free, key=lambda gang: (len(gang.residents), gang.name))
            fewest = len(emptiest[0].residents)
            mine = [gang for gang in free if gang.name == own and len(gang.residents) == fewest]
            (mine or emptiest)[0].reserved = one


def check_fit(job: Job, sizes: Collection[GangSize]) -> None:
    """Refuse a request that no gang of these sizes can make.

    Raises:
        InputError: none can.
    """
    if any(size.holds(job) for size in sizes):
        return
    slots = max((size.slots for size in sizes), default=0)
    memory = max((size.kv_bytes for size in sizes), default=0)
    raise InputError(
        f"request {job.request} needs {job.width} window slots and {job.kv_bytes / 1e6:.1f} MB for keys and values, a "
        f"gang has {slots} and {memory / 1e6:.1f} MB at most: ask for a smaller video or a smaller KV budget"
    )
