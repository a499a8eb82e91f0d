"""Gangs that behave as real ones do towards the scheduler, in simulated time, with an account of their own.

What must always hold is asserted here as it happens: slots, memory, one gang per request, order of quanta, and both
bounds on waiting.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from engine.schedule import Schedule, Timetable
from parallel.cluster.scheduler import Admit, GangSize, Permit, RequestState, Scheduler, VideoSize

WINDOW = 4


def size(*, chunks: int = 3, kv_bytes: int = 10, window: int = WINDOW) -> VideoSize:
    schedule = Schedule(first=0, chunks=chunks, num_steps=window, window=window)
    return VideoSize(schedule=Timetable(spans=(schedule,)), kv_bytes=kv_bytes)


@dataclass
class Held:
    """A request on a gang, as the gang sees it."""

    size: VideoSize
    next_quantum: int
    announced: bool = False
    granted: list[int] = field(default_factory=list)

    @property
    def slots(self) -> int:
        return self.size.schedule.slots(self.granted[0]) if self.granted else 0


@dataclass
class Gang:
    up: bool = False
    held: dict[str, Held] = field(default_factory=dict)
    permits: int = 0


class World:
    def __init__(self, size: GangSize, gangs: int, *, share: int = 8) -> None:
        self.size, self.share = size, share
        self.scheduler = Scheduler(size, share=share)
        self.gangs = {f"gang {number}": Gang() for number in range(gangs)}
        self.requests: dict[str, VideoSize] = {}
        self.age: dict[str, int] = {}
        self.checkpoints: dict[str, int] = {}
        self.ended: dict[str, RequestState] = {}
        self.plan: list[Admit | Permit] = []
        self._due: dict[str, int] = {}
        """The last permit of its gang that an announced quantum can be."""
        self._older: dict[tuple[str, str], int] = defaultdict(int)
        self._younger: dict[tuple[str, str], int] = defaultdict(int)

    # ---- what happens

    def submit(self, name: str, *, priority: int = 0, **what: int) -> None:
        video = size(**what)
        self.scheduler.submit(name, video, priority=priority)
        self.age[name], self.requests[name], self.checkpoints[name] = len(self.age), video, 0

    def up(self, name: str) -> None:
        self.gangs[name].up = True
        self.scheduler.gang_up(name)

    def down(self, name: str, blamed: dict[str, str] | None = None) -> None:
        gang = self.gangs[name]
        lost = self.scheduler.gang_down(name, blamed=blamed)
        assert [entry.request for entry in lost] == sorted(gang.held, key=self.age.__getitem__)
        gang.up = False
        gang.held.clear()
        for entry in lost:
            self._due.pop(entry.request, None)
            assert entry.state in (RequestState.QUEUED, RequestState.QUARANTINED) and entry.gang is None
            if entry.state is RequestState.QUARANTINED:
                self._end(entry.request, entry.state)

    def step(self, request: str) -> None:
        """The gang of a request does the next thing for it: announce a quantum, or end one."""
        name, gang = self.where(request)
        held = gang.held[request]
        quanta = held.size.schedule.quanta
        if not held.announced and held.next_quantum < quanta:
            waiting = sum(other.announced for other in gang.held.values())
            self.scheduler.quantum_ready(request, name, held.next_quantum)
            self._due[request] = gang.permits + self.share * (waiting + 1)
            held.announced = True
        elif held.granted:
            quantum = held.granted.pop(0)
            self.scheduler.quantum_done(request, name, quantum)
            if quantum + 1 == quanta:
                self.scheduler.request_done(request, name)
                self._let_go(request)
                self._end(request, RequestState.DONE)

    def checkpoint(self, request: str) -> None:
        """At a chunk boundary, with the quantum that comes."""
        held = self.where(request)[1].held[request]
        if not held.granted:
            self.checkpoints[request] = max(self.checkpoints[request], held.next_quantum)

    def cancel(self, request: str) -> None:
        self.scheduler.cancel(request)
        if request in self.resident():
            self._let_go(request)
        if request not in self.ended:
            self._end(request, RequestState.CANCELLED)

    # ---- what is decided

    def decide(self) -> list[Admit | Permit]:
        """Carry out the scheduler's decisions, and check each of them."""
        made = self.scheduler.decide()
        for one in made:
            self._admitted(one) if isinstance(one, Admit) else self._permitted(one)
        assert self.scheduler.decide() == []
        self.plan += made
        for gang in self.gangs.values():
            assert sum(held.slots for held in gang.held.values()) <= self.size.slots
            assert sum(held.size.kv_bytes for held in gang.held.values()) <= self.size.kv_bytes
        figures = self.scheduler.figures()
        for name, used in figures.utilisation.items():
            assert used is None and not self.gangs[name].held or 0 <= used <= 1
        assert sum(figures.states.values()) == len(self.requests)
        assert self.scheduler.idle == (len(self.ended) == len(self.requests))
        return made

    def _admitted(self, one: Admit) -> None:
        assert one.request not in self.resident(), "on two gangs"
        gang = self.gangs[one.gang]
        assert gang.up
        gang.held[one.request] = Held(size=self.requests[one.request], next_quantum=self.checkpoints[one.request])
        if self.scheduler.entry(one.request).isolated:
            assert len(gang.held) == 1
        else:
            assert not any(self.scheduler.entry(other).isolated for other in gang.held)
            self._count_admission(one.request, one.gang)
        for name in self.gangs:
            self._older.pop((one.request, name), None)
            self._younger.pop((one.request, name), None)

    def _count_admission(self, admitted: str, name: str) -> None:
        for other in self.queued():
            if self.scheduler.entry(other).isolated:
                continue
            count = self._older if self.age[admitted] < self.age[other] else self._younger
            count[other, name] += 1
            assert self._younger[other, name] <= (self.share - 1) * (self._older[other, name] + 1)

    def _permitted(self, one: Permit) -> None:
        gang = self.gangs[one.gang]
        held = gang.held[one.request]
        assert held.announced and one.quantum == held.next_quantum
        held.granted.append(one.quantum)
        held.next_quantum, held.announced = one.quantum + 1, False
        gang.permits += 1
        assert gang.permits <= self._due.pop(one.request)

    # ---- who is where

    def state(self, request: str) -> RequestState:
        return self.ended[request] if request in self.ended else self.scheduler.entry(request).state

    def resident(self) -> list[str]:
        return sorted(request for gang in self.gangs.values() for request in gang.held)

    def queued(self) -> list[str]:
        return [one for one in self.requests if self.state(one) is RequestState.QUEUED]

    def where(self, request: str) -> tuple[str, Gang]:
        return next((name, gang) for name, gang in self.gangs.items() if request in gang.held)

    def _let_go(self, request: str) -> None:
        self.where(request)[1].held.pop(request)
        self._due.pop(request, None)

    def _end(self, request: str, state: RequestState) -> None:
        self.ended[request] = state

    def run(self, rounds: int = 10_000) -> None:
        """All gangs work at the same pace until everything has ended."""
        for _ in range(rounds):
            if self.scheduler.idle:
                return
            self.decide()
            for request in self.resident():
                self.step(request)
        raise AssertionError(f"still at it after {rounds} rounds: {self.scheduler.figures()}")
