"""Decides which request runs on which gang, and which chunk enters a gang's window next.

A pure object: events go in and decisions come out. The same events give the same decisions. It knows no Ray, no torch,
no threads and no clock.

Rules
    Quanta. A gang announces the next quantum of each of its requests, and the scheduler permits them one after another
    as window slots get free. The highest priority goes first; among equals, the quantum that was announced first, so
    equals take turns. A quantum may be permitted while the one before it still runs; the two never run together, so the
    request occupies the slots of the wider one. Where the next quantum does not fit, no other one takes its place.

    Admission. The highest priority goes first; among equals, the oldest. A request is admitted where its KV fits into
    the free memory, on the emptiest such gang (fewest promised slots, then least memory, then by name). Where there is
    no room for the one whose turn it is, no other one takes its place. A gang promises its slots at most twice,
    counting requests of the same or a higher priority: it leaves the rest to a gang that comes up later.

    No starvation. Of every `share` quanta in a row that a gang is permitted, at least one is the quantum that has
    waited longest: with r quanta waiting before it, a quantum is at the latest the `share * (r + 1)`-th after its
    announcement. Of every `share` requests in a row that a gang admits, at least one is the oldest.

    Loss. When a gang goes down its requests go back to the queue and keep their age. One that is blamed for it
    twice with the same reason is set aside. When nobody is blamed, every request is suspected that was in a quantum or
    not yet at its first chunk boundary. A request that is blamed or suspected four times without getting further
    than ever before is set aside; from the second time it is isolated: the gang that has the fewest requests is
    emptied for it, and it runs there alone, so that it harms no other request and no other one harms it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.schedule import Timetable
from models.errors import InputError

_PROMISED = 2  # how often a gang promises its slots
_SAME = 2  # how often a request may be blamed for the same reason until it is set aside
_LOSSES = 4  # how often it may be blamed or suspected without getting further until it is set aside


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSize:
    """What a video takes."""

    schedule: Timetable  # when each chunk takes each step
    kv_bytes: int  # of keys and values, on the rank that holds most of them; held from admission to the end
    kv_host_bytes: int = 0  # in host memory beside it; nobody schedules by that

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
    """What a gang has to give."""

    slots: int  # window slots: the gang's concurrency times the window
    kv_bytes: int  # memory for keys and values in bytes, counted as `VideoSize.kv_bytes` is

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
class Figures:
    """The queue and the gangs at this moment."""

    states: Mapping[RequestState, int]  # requests by where they are, those that have ended among them
    utilisation: Mapping[str, float | None]  # busy slots of each gang, as a share; None while it is down


# ---- the queue and the gangs; the scheduler alone changes them


@dataclass(kw_only=True, slots=True, eq=False)
class QueueEntry:
    """A request that has not ended."""

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
        return max(map(self.size.schedule.slots, self.permitted), default=0)

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
class _GangEntry:
    """A gang, over all of its lives."""

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


class Scheduler:
    """Holds requests, gangs and window slots.

    Events may come late: an event of a gang that does not hold the request any more is ignored. A gang that comes
    back may have its old name, if none of the events before it went down is passed on after that.

    A request that has ended leaves nothing but its count.

    All gangs have one `size`; a request that does not fit into it is refused. One in `share` decisions of a gang goes
    to what has waited longest.
    """

    def __init__(self, size: GangSize, *, share: int = 8) -> None:
        self._size, self._share = size, share
        self._entries: dict[str, QueueEntry] = {}
        self._gangs: dict[str, _GangEntry] = {}
        self._ended: Counter[RequestState] = Counter()
        self._submitted = self._announcements = 0
        self._admissions_due = False
        """Something has changed that admission depends on, so that a long queue is not read for nothing."""

    # ---- requests

    def submit(self, request: str, size: VideoSize, *, priority: int = 0) -> None:
        """Queue a request, the highest priority first; an InputError if no gang can hold it, or the id is taken."""
        if request in self._entries:
            raise InputError(f"there is a request {request} already: give every request its own id")
        most = self._size
        if not most.holds(size):
            raise InputError(
                f"request {request} needs {size.slots} window slots and {size.kv_bytes / 1e6:.1f} MB for keys and "
                f"values, a gang has {most.slots} and {most.kv_bytes / 1e6:.1f} MB at most: ask for a smaller video or "
                "a smaller KV budget"
            )
        entry = QueueEntry(request=request, size=size, priority=priority, number=self._submitted)
        self._submitted += 1
        self._entries[request] = entry
        self._admissions_due = True

    def cancel(self, request: str) -> None:
        """Forget a request; its slots and memory are free at once. Nothing happens if it has ended.

        The caller cancels it on its gang before it carries out another decision.
        """
        if (entry := self._entries.get(request)) is not None:
            self._end(entry, RequestState.CANCELLED)

    def quantum_ready(self, request: str, gang: str, quantum: int) -> None:
        """The gang has announced a quantum, at first the one where it goes on; a ValueError if that is not next."""
        entry = self._resident(request, gang)
        if entry is None:
            return
        expected = entry.expected
        if expected is not None and quantum < expected:
            return  # announced before
        known = 0 <= quantum < entry.size.schedule.quanta
        if not known or (expected is not None and quantum > expected) or entry.ready is not None:
            raise ValueError(f"request {request}: quantum {quantum} was announced, {expected} comes next")
        if entry.done is None:
            entry.done = quantum
        self._announcements += 1
        entry.ready, entry.announcement = quantum, self._announcements

    def quantum_done(self, request: str, gang: str, quantum: int) -> None:
        """All ticks of a quantum are done: its slots are free; a ValueError if another one was permitted before it."""
        entry = self._resident(request, gang)
        if entry is None or (entry.done is not None and quantum < entry.done):
            return
        if not entry.permitted or entry.permitted[0] != quantum:
            raise ValueError(f"request {request}: quantum {quantum} is reported as done, not of {entry.permitted}")
        entry.permitted.pop(0)
        entry.done = quantum + 1
        if entry.done > entry.furthest:
            entry.furthest, entry.losses = entry.done, 0

    def request_done(self, request: str, gang: str) -> None:
        """The video is complete and handed out."""
        if (entry := self._resident(request, gang)) is not None:
            self._end(entry, RequestState.DONE)

    # ---- gangs

    def gang_up(self, gang: str) -> None:
        """A gang can be given work; a ValueError if it is up already."""
        entry = self._gangs.setdefault(gang, _GangEntry(gang, self._size))
        if entry.up:
            raise ValueError(f"gang {gang} is up already")
        entry.up = True
        self._admissions_due = True

    def gang_down(self, gang: str, *, blamed: Mapping[str, str] | None = None) -> list[QueueEntry]:
        """A gang is lost. Nothing happens if it is down already.

        Requests that are known to have caused it are `blamed`, each for a reason. Returns the requests that it held,
        the oldest first; each is queued again or set aside.
        """
        lost = self._gangs.get(gang)
        if lost is None or not lost.up:
            return []
        lost.up = False
        held, blamed = sorted(lost.residents.values(), key=lambda entry: entry.number), blamed or {}
        lost.residents.clear()
        for entry in held:
            # A request that waited at a chunk boundary did nothing that could break the gang; any other one may have.
            suspected = not blamed and (bool(entry.permitted) or entry.done is None)
            self._lose(entry, blamed.get(entry.request), suspected=suspected)
        self._admissions_due = True
        return held

    # ---- decisions and figures

    def decide(self) -> list[Admit | Permit]:
        """What to do now, in order. Each decision is given out once: a second call without an event gives none."""
        decisions: list[Admit | Permit] = []
        if self._admissions_due:
            while (admit := self._admit()) is not None:
                decisions.append(admit)
            self._admissions_due = False
        for gang in self._up():
            while (entry := self._next_quantum(gang)) is not None:
                assert entry.ready is not None
                decisions.append(Permit(request=entry.request, gang=gang.name, quantum=entry.ready))
                entry.permitted.append(entry.ready)
                entry.ready = None
        return decisions

    def entry(self, request: str) -> QueueEntry:
        """A request, to be read only; a KeyError if there is none of that id, or it has ended."""
        return self._entries[request]

    def figures(self) -> Figures:
        """Figures of this moment."""
        states = self._ended + Counter(entry.state for entry in self._entries.values())
        used = {gang.name: gang.slots_busy / gang.size.slots if gang.up else None for gang in self._gangs.values()}
        return Figures(states={one: states[one] for one in RequestState}, utilisation=used)

    @property
    def idle(self) -> bool:
        """All requests have ended."""
        return not self._entries

    # ---- inside

    def _up(self) -> list[_GangEntry]:
        return [gang for gang in self._gangs.values() if gang.up]

    def _queue(self) -> list[QueueEntry]:
        return [entry for entry in self._entries.values() if entry.gang is None]

    def _resident(self, request: str, gang: str) -> QueueEntry | None:
        """The request, if that gang holds it."""
        entry = self._entries.get(request)
        return entry if entry is not None and entry.gang == gang else None

    def _next_quantum(self, gang: _GangEntry) -> QueueEntry | None:
        """The request whose announced quantum is to be permitted, if it fits now."""
        waiting = [entry for entry in gang.residents.values() if entry.ready is not None]
        if not waiting:
            return None
        chosen, passed = self._preferred(waiting, gang.passed_quanta, lambda entry: entry.announcement)
        assert chosen.ready is not None
        if chosen.size.schedule.slots(chosen.ready) - chosen.slots > gang.size.slots - gang.slots_busy:
            return None
        gang.passed_quanta = passed
        return chosen

    def _preferred(
        self, waiting: list[QueueEntry], passed: int, age: Callable[[QueueEntry], int]
    ) -> tuple[QueueEntry, int]:
        """Who goes next: the highest priority, but once in `share` times who has waited longest; and how often it had
        to wait since."""
        longest = min(waiting, key=age)
        chosen = longest if passed >= self._share - 1 else min(waiting, key=lambda entry: (-entry.priority, age(entry)))
        return chosen, 0 if chosen is longest else passed + 1

    def _admit(self) -> Admit | None:
        emptied = self._emptied()
        for gang in sorted(self._up(), key=lambda gang: gang.load):
            if gang.name in emptied:
                entry = None if gang.residents else emptied[gang.name]
            else:
                entry = self._next_admission(gang)
            if entry is not None:
                entry.gang = gang.name
                gang.residents[entry.request] = entry
                return Admit(request=entry.request, gang=gang.name)
        return None

    def _emptied(self) -> dict[str, QueueEntry]:
        """The isolated requests of the queue, by the gang that is emptied for each."""
        isolated = sorted((entry for entry in self._queue() if entry.isolated), key=lambda entry: entry.number)
        gangs = sorted(self._up(), key=lambda gang: (len(gang.residents), gang.name))
        return {gang.name: entry for gang, entry in zip(gangs, isolated)}

    def _next_admission(self, gang: _GangEntry) -> QueueEntry | None:
        """The queued request that is to be admitted on a gang, if it fits now."""
        if any(entry.isolated for entry in gang.residents.values()):
            return None
        eligible = [entry for entry in self._queue() if not entry.isolated]
        if not eligible:
            return None
        chosen, passed = self._preferred(eligible, gang.passed_requests, lambda entry: entry.number)
        if not gang.has_room(chosen):
            return None
        gang.passed_requests = passed
        return chosen

    def _lose(self, entry: QueueEntry, blame: str | None, *, suspected: bool) -> None:
        """A request came off its gang before its end."""
        if blame is not None:
            entry.failures[blame] += 1
        entry.losses += suspected or blame is not None
        if entry.losses >= _LOSSES or (blame is not None and entry.failures[blame] >= _SAME):
            self._end(entry, RequestState.QUARANTINED)
            return
        entry.isolated = entry.losses >= _LOSSES // 2
        entry.leave()

    def _end(self, entry: QueueEntry, state: RequestState) -> None:
        del self._entries[entry.request]
        for gang in self._gangs.values():
            gang.residents.pop(entry.request, None)
        entry.leave()
        entry.ended = state
        self._ended[state] += 1
        self._admissions_due = True
