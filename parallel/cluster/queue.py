"""State of the scheduler: requests in its queue and on gangs, the gangs, and the decisions and figures it gives out.

Plain values: no Ray, no torch, no clock. `scheduler.py` has the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.schedule import Schedule
from models.errors import InputError

_PROMISED = 2  # how often a gang promises its slots


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSize:
    """What a video takes; an InputError if the bytes are negative."""

    schedule: Schedule  # when each chunk takes each step
    kv_bytes: int  # of keys and values, on the rank that holds most of them; held from admission to the end

    def __post_init__(self) -> None:
        if self.kv_bytes < 0:
            raise InputError(f"a video cannot hold {self.kv_bytes} bytes of keys and values")

    @property
    def chunks(self) -> int:
        """Chunks that are generated and handed out."""
        return self.schedule.chunks - self.schedule.first

    @property
    def slots(self) -> int:
        """Window slots of its widest quantum."""
        return min(self.schedule.window, self.chunks)


@dataclass(frozen=True, kw_only=True, slots=True)
class GangSize:
    """What a gang has to give; an InputError if it could hold no video."""

    slots: int  # window slots: the gang's concurrency times the window
    kv_bytes: int  # memory for keys and values in bytes, counted as `VideoSize.kv_bytes` is

    def __post_init__(self) -> None:
        if self.slots < 1 or self.kv_bytes < 0:
            raise InputError(f"a gang of {self.slots} slots and {self.kv_bytes} bytes can hold no video")

    def holds(self, video: VideoSize) -> bool:
        """Whether an empty gang of this size can make the video."""
        return video.kv_bytes <= self.kv_bytes and video.slots <= self.slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Admit:
    """Decision: submit the request to the gang, which holds its KV from now on."""

    request: str
    gang: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Permit:
    """Decision: the request may begin the quantum."""

    request: str
    gang: str  # where the request is
    quantum: int  # index


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PAUSED = "paused"  # on a gang, at a chunk boundary or being prepared
    RUNNING = "running"  # on a gang, in a quantum
    DONE = "done"
    QUARANTINED = "set aside"  # it failed too often and is not tried again
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class GangFigures:
    """A gang at this moment."""

    gang: str
    up: bool  # it can be given work
    utilisation: float  # busy slots as a share of all
    residents: int  # requests on it


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The queue and the gangs at this moment."""

    states: Mapping[RequestState, int]  # requests by where they are, those that have ended among them
    gangs: tuple[GangFigures, ...]  # each gang that ever was up, by name


@dataclass(kw_only=True, slots=True, eq=False)
class QueueEntry:
    """A request that has not ended. The scheduler alone changes it."""

    request: str  # its id
    size: VideoSize
    priority: int  # higher goes first
    number: int  # requests are numbered as they are submitted; less is older
    ended: RequestState | None = None  # how it ended
    gang: str | None = None  # the gang that holds its KV
    permitted: list[int] = field(default_factory=list)  # quanta that were permitted and are not done, in order
    ready: int | None = None  # the quantum that is announced and waits for its permit
    announcement: int = 0  # announcements are numbered in their order; that of `ready`
    done: int | None = None  # quanta done, counted from the video's start; None until this gang has announced one
    furthest: int = 0  # the most quanta that were ever done
    failures: Counter[str] = field(default_factory=Counter)  # how often it was blamed, by reason
    losses: int = 0  # how often it was blamed or suspected since it last got further than ever
    isolated: bool = False  # it is suspected of breaking gangs, and runs alone

    @property
    def state(self) -> RequestState:
        """Where it is."""
        if self.ended is not None:
            return self.ended
        if self.gang is None:
            return RequestState.QUEUED
        return RequestState.RUNNING if self.permitted else RequestState.PAUSED

    @property
    def slots(self) -> int:
        """Slots that it occupies. Of two permitted quanta the second waits for the first, so the wider one counts."""
        return max((self.size.schedule.quantum(quantum).slots for quantum in self.permitted), default=0)

    @property
    def expected(self) -> int | None:
        """The quantum that its gang announces next; None where any may come."""
        if self.ready is not None:
            return self.ready + 1
        return self.permitted[-1] + 1 if self.permitted else self.done

    def leave(self) -> None:
        """Leave the gang; what was permitted or announced there is void."""
        self.gang, self.ready, self.done = None, None, None
        self.permitted.clear()


@dataclass(slots=True, eq=False)
class GangEntry:
    """A gang, over all of its lives. The scheduler alone changes it."""

    name: str
    size: GangSize
    up: bool = False
    residents: dict[str, QueueEntry] = field(default_factory=dict)
    passed_quanta: int = 0  # preferred to the one that has waited longest, since the last time that none was
    passed_requests: int = 0  # the same

    @property
    def slots_busy(self) -> int:
        """Slots that quanta occupy."""
        return sum(entry.slots for entry in self.residents.values())

    @property
    def kv_used(self) -> int:
        """Bytes that its requests hold."""
        return sum(entry.size.kv_bytes for entry in self.residents.values())

    @property
    def load(self) -> tuple[float, float, str]:
        """Sorts gangs, the emptiest first: by promised slots, then by memory, then by name."""
        promised = sum(entry.size.slots for entry in self.residents.values())
        memory = self.kv_used / self.size.kv_bytes if self.size.kv_bytes else 0.0
        return promised / self.size.slots, memory, self.name

    def has_room(self, new: QueueEntry) -> bool:
        """Whether it has the memory for a request, and slots that it has not promised too often."""
        equals = [entry.size.slots for entry in self.residents.values() if entry.priority >= new.priority]
        fits = new.size.kv_bytes <= self.size.kv_bytes - self.kv_used
        return fits and sum(equals) + new.size.slots <= _PROMISED * self.size.slots

    def figures(self) -> GangFigures:
        """Figures of this moment."""
        used = self.slots_busy / self.size.slots
        return GangFigures(gang=self.name, up=self.up, utilisation=used, residents=len(self.residents))
