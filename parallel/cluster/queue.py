"""What goes into the chunk scheduler and what comes out of it.

Plain values: no Ray, no torch, no clock. `scheduler.py` says what they mean together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from models.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantumPlan:
    """The stretch of a video's schedule from one chunk border to the next."""

    chunk: int | None  # that enters the window with it; None at the end of the video, where none does
    slots: int  # window slots that it occupies while it runs: chunks that are active in it


def plan_quanta(*, chunks: int, window: int, first: int = 0) -> tuple[QuantumPlan, ...]:
    """The quanta of a video, in order; quantum i is stage i of `engine.schedule.Schedule`.

    Args:
        chunks: all chunks, given and generated.
        window: chunks that are denoised at once.
        first: the first chunk that is generated.
    """
    made = chunks - first
    return tuple(
        QuantumPlan(
            chunk=first + quantum if quantum < made else None,
            slots=min(quantum + 1, window, made, made + window - 1 - quantum),
        )
        for quantum in range(made + window - 1)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GangSize:
    """What a gang has to give."""

    slots: int  # window slots, the gang's concurrency times the window
    kv_bytes: int  # memory for keys and values, in bytes, counted as `Job.kv_bytes` is

    def __post_init__(self) -> None:
        if self.slots < 1 or self.kv_bytes < 0:
            raise InputError(f"a gang of {self.slots} slots and {self.kv_bytes} bytes can hold no video")

    def holds(self, job: Job) -> bool:
        """Whether an empty gang of this size can make the video."""
        return job.kv_bytes <= self.kv_bytes and job.width <= self.slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request as the scheduler sees it.

    Raises:
        InputError: there are no quanta, one of them needs no slot, or the quantum to go on with is none of them.
    """

    request: str  # its id, unique for the life of the scheduler
    quanta: tuple[QuantumPlan, ...]  # what there is to do, in order
    kv_bytes: int  # what it holds on a gang from admission to its end, in bytes
    priority: int = 0  # higher goes first
    resume_quantum: int = 0  # the quantum that it goes on with, when there is a checkpoint of an earlier run

    def __post_init__(self) -> None:
        if not self.quanta or min(quantum.slots for quantum in self.quanta) < 1:
            raise InputError(f"request {self.request} has a quantum that needs no slot, or no quanta at all")
        if self.kv_bytes < 0:
            raise InputError(f"request {self.request} cannot hold {self.kv_bytes} bytes of keys and values")
        if not 0 <= self.resume_quantum < len(self.quanta):
            raise InputError(
                f"request {self.request} cannot go on with quantum {self.resume_quantum}: it has {len(self.quanta)}"
            )

    @property
    def width(self) -> int:
        """Slots of its widest quantum."""
        return max(quantum.slots for quantum in self.quanta)


@dataclass(frozen=True, kw_only=True, slots=True)
class Admit:
    """Decision: submit the request to the gang, which holds its KV from now on."""

    request: str
    gang: str
    resume_quantum: int
    """The quantum of its last checkpoint that is known; the gang's first announcement says which quantum it really goes
    on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Permit:
    """Decision: the request's gate is open for the quantum."""

    request: str
    gang: str  # where it is
    quantum: int  # index of the quantum
    chunk: int | None  # that enters the window; None where none does
    slots: int  # that the quantum occupies


Assignment = Admit | Permit


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PAUSED = "paused"
    """On a gang, at a border or being prepared."""
    RUNNING = "running"
    """On a gang, with a quantum."""
    DONE = "done"
    QUARANTINED = "set aside"
    """It failed too often; nobody tries it again."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the scheduler knows of a request."""

    request: str
    standing: RequestState  # where it is
    gang: str | None  # that holds its KV; None where none does
    quantum: int  # the quantum that comes after those that are done, or that a restart goes on with
    quanta: int
    restarts: int  # how often it went back to the queue
    reason: str | None  # why it was set aside, or failed the last time; None if it never failed
    alone: bool  # it is suspected of killing gangs, and runs alone


@dataclass(frozen=True, kw_only=True, slots=True)
class GangFigures:
    """A gang at this moment, and so far."""

    gang: str
    up: bool  # it can be given work
    slots: int
    slots_busy: int  # of quanta that run
    utilisation: float  # busy slots as a share of all, averaged over the time it was up; 0 if it never was
    kv_bytes: int
    kv_used: int  # held by its requests
    residents: int  # requests on it
    quanta_waiting: int  # announced and not granted
    quanta_granted: int  # so far
    losses: int  # how often it went down


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The whole at this moment."""

    queued: int  # length of the queue
    standings: dict[RequestState, int]  # requests by where they are
    restarts: int  # of all requests together
    gangs: tuple[GangFigures, ...]  # each gang that ever was up, by id
    unplaceable: tuple[str, ...]  # queued requests that none of the gangs that are up could ever hold


ENDED = (RequestState.DONE, RequestState.QUARANTINED, RequestState.CANCELLED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A quantum that is announced and not granted."""

    quantum: int
    since: float  # when it was announced
    number: int  # announcements are numbered in their order
    tie_break: int  # decides where nothing else does


@dataclass(kw_only=True, slots=True)
class RequestEntry:
    """A request."""

    job: Job
    submitted: float  # when
    number: int  # requests are numbered in the order of submission; with `submitted`, their age
    tie_break: int  # decides where nothing else does
    checkpoint: int  # the quantum that its last whole checkpoint goes on with
    standing: RequestState = RequestState.QUEUED
    """Where it is; on a gang always PAUSED, whether a quantum runs is seen from `granted`."""
    gang: str | None = None  # that holds its KV
    granted: list[int] = field(default_factory=list)  # quanta that were granted and are not done, in order
    ready: Ready | None = None  # the quantum that waits for its grant
    done: int | None = None
    """Quanta done in this life, counted from the start of the video; None until the gang has announced one."""
    served: int = 0  # quanta had, as fair share counts them
    furthest: int = 0  # the most quanta that were ever done
    restarts: int = 0  # how often it went back to the queue
    failures: Counter[str] = field(default_factory=Counter)  # by reason
    fruitless: int = 0  # losses and failures since it last got further than ever
    suspicions: int = 0  # those of them that were losses of its gang for which nobody is blamed
    alone: bool = False  # it has to run alone
    reason: str | None = None  # of the last failure

    @property
    def age(self) -> tuple[float, int]:
        """Less is older."""
        return self.submitted, self.number

    @property
    def slots(self) -> int:
        """That it uses now. Of two granted quanta the second waits for the first, so the wider one counts."""
        return max((self.job.quanta[quantum].slots for quantum in self.granted), default=0)

    @property
    def expected(self) -> int | None:
        """The quantum that its gang announces next; None where any may come."""
        if self.ready is not None:
            return self.ready.quantum + 1
        return self.granted[-1] + 1 if self.granted else self.done

    def more_slots(self, quantum: int) -> int:
        """How many the quantum needs on top of those that it uses."""
        return max(0, self.job.quanta[quantum].slots - self.slots)

    def leave(self, standing: RequestState) -> None:
        """Go off the gang; what was granted or announced there is void."""
        self.standing, self.gang, self.ready, self.done = standing, None, None, None
        self.granted.clear()

    def view(self) -> View:
        """For others."""
        return View(
            request=self.job.request,
            standing=RequestState.RUNNING if self.granted else self.standing,
            gang=self.gang,
            quantum=self._quantum(),
            quanta=len(self.job.quanta),
            restarts=self.restarts,
            reason=self.reason,
            alone=self.alone,
        )

    def _quantum(self) -> int:
        if self.standing is RequestState.DONE:
            return len(self.job.quanta)
        return self.checkpoint if self.done is None else self.done


class GangEntry:
    """A gang, over all of its lives.

    Args:
        name: its id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = GangSize(slots=1, kv_bytes=0)
        self.up = False
        self.residents: dict[str, RequestEntry] = {}
        self.reserved: RequestEntry | None = None
        """A queued request that will run alone here, once the gang is empty."""
        self.passed_quanta = self.passed_requests = 0
        """How many were preferred to the one that has waited longest, since the last time that none was."""
        self.quanta_granted = self.losses = 0
        self._slot_seconds = self._busy_seconds = self._seen = 0.0

    @property
    def slots_busy(self) -> int:
        """Slots that quanta use."""
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
            quanta_waiting=sum(one.ready is not None for one in self.residents.values()),
            quanta_granted=self.quanta_granted,
            losses=self.losses,
        )

    def has_room(self, one: RequestEntry, crowd: int | None) -> bool:
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


def tie_break(*parts: object) -> int:
    """A number drawn by tie-break, the same for the same parts in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def next_quantum(gang: GangEntry, share: int) -> RequestEntry | None:
    """Whose announced quantum is to be granted, if it fits now. Books who was passed over."""
    waiting = [(one, one.ready) for one in gang.residents.values() if one.ready is not None]
    if not waiting:
        return None
    oldest = min(waiting, key=lambda pair: pair[1].number)
    chosen = min(
        waiting,
        key=lambda pair: (-pair[0].job.priority, pair[0].served, pair[1].since, pair[1].tie_break, pair[1].number),
    )
    if gang.passed_quanta >= share - 1:
        chosen = oldest
    one, ready = chosen
    if one.more_slots(ready.quantum) > gang.size.slots - gang.slots_busy:
        return None
    gang.passed_quanta = 0 if chosen is oldest else gang.passed_quanta + 1
    return one


def next_admission(gang: GangEntry, queue: Iterable[RequestEntry], *, share: int, crowd: int) -> RequestEntry | None:
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
        chosen, limit = (
            min(eligible, key=lambda one: (-one.job.priority, one.submitted, one.tie_break, one.number)),
            crowd,
        )
    if not gang.has_room(chosen, limit):
        return None
    gang.passed_requests = 0 if chosen is oldest else gang.passed_requests + 1
    return chosen


def reserve(gangs: Collection[GangEntry], queue: Iterable[RequestEntry]) -> None:
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
