"""Gangs that behave as real ones do towards the scheduler, in simulated time, with an account of their own.

What must always hold is asserted here as it happens: slots, memory, one gang per request, order of quanta, and both
bounds on waiting.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from parallel.cluster.queue import Admit, GangSize, Job, Permit, RequestState, plan_quanta
from parallel.cluster.scheduler import Scheduler

WINDOW = 4


def job(request: str, *, chunks: int = 3, kv_bytes: int = 10, priority: int = 0, resume_quantum: int = 0) -> Job:
    quanta = plan_quanta(chunks=chunks, window=WINDOW)
    return Job(request=request, quanta=quanta, kv_bytes=kv_bytes, priority=priority, resume_quantum=resume_quantum)


@dataclass
class Held:
    """A request on a gang, as the gang sees it."""

    job: Job
    next_quantum: int
    announced: bool = False
    granted: list[int] = field(default_factory=list)

    @property
    def slots(self) -> int:
        return self.job.quanta[self.granted[0]].slots if self.granted else 0


@dataclass
class Gang:
    size: GangSize
    up: bool = False
    held: dict[str, Held] = field(default_factory=dict)
    grants: int = 0


class World:
    def __init__(self, sizes: dict[str, GangSize], *, seed: int = 0, share: int = 8, fruitless: int = 4) -> None:
        self.share = share
        self.scheduler = Scheduler(seed=seed, gangs=sizes.values(), share=share, fruitless=fruitless)
        self.gangs = {name: Gang(size=size) for name, size in sizes.items()}
        self.jobs: dict[str, Job] = {}
        self.age: dict[str, tuple[float, int]] = {}
        self.checkpoints: dict[str, int] = {}
        self.plan: list[Admit | Permit] = []
        self.now = 0.0
        self._due: dict[str, int] = {}
        """The last grant of its gang that an announced quantum can be."""
        self._older: dict[tuple[str, str], int] = defaultdict(int)
        self._younger: dict[tuple[str, str], int] = defaultdict(int)

    # ---- what happens

    def submit(self, one: Job) -> None:
        self.scheduler.submit(one, self.now)
        self.age[one.request] = (self.now, len(self.jobs))
        self.jobs[one.request], self.checkpoints[one.request] = one, one.resume_quantum

    def up(self, name: str) -> None:
        self.gangs[name].up = True
        self.scheduler.gang_up(name, self.gangs[name].size, self.now)

    def down(self, name: str, blamed: dict[str, str] | None = None) -> None:
        gang = self.gangs[name]
        lost = self.scheduler.gang_down(name, self.now, blamed=blamed)
        assert set(lost) == set(gang.held)
        gang.up = False
        for request in lost:
            view = self.scheduler.view(request)
            assert view.standing is RequestState.QUARANTINED or view.quantum == self.checkpoints[request]
            self._forget(request)
        gang.held.clear()

    def step(self, request: str) -> None:
        """The gang of a request does the next thing for it: announce a quantum, or end one."""
        name, gang = self.where(request)
        held = gang.held[request]
        if not held.announced and held.next_quantum < len(held.job.quanta):
            waiting = sum(other.announced for other in gang.held.values())
            self.scheduler.quantum_ready(request, name, held.next_quantum, self.now)
            self._due[request] = gang.grants + self.share * (waiting + 1)
            held.announced = True
        elif held.granted:
            quantum = held.granted.pop(0)
            self.scheduler.quantum_done(request, name, quantum, self.now)
            if quantum + 1 == len(held.job.quanta):
                self.scheduler.request_done(request, name, self.now)
                self._let_go(request)

    def checkpoint(self, request: str) -> None:
        """At a border, with the quantum that comes."""
        name, gang = self.where(request)
        held = gang.held[request]
        if not held.granted and held.next_quantum > self.checkpoints[request]:
            self.checkpoints[request] = held.next_quantum
            self.scheduler.checkpointed(request, name, held.next_quantum, self.now)

    def fail(self, request: str, reason: str) -> None:
        name, _ = self.where(request)
        self.scheduler.request_failed(request, name, reason, self.now)
        self._let_go(request)

    def cancel(self, request: str) -> None:
        self.scheduler.cancel(request, self.now)
        if request in self.resident():
            self._let_go(request)

    # ---- what is decided

    def decide(self) -> list[Admit | Permit]:
        """Carry out the scheduler's decisions, and check each of them."""
        made = self.scheduler.assignments(self.now)
        for one in made:
            self._admitted(one) if isinstance(one, Admit) else self._granted(one)
        assert self.scheduler.assignments(self.now) == []
        self.plan += made
        for gang in self.gangs.values():
            assert sum(held.slots for held in gang.held.values()) <= gang.size.slots
            assert sum(held.job.kv_bytes for held in gang.held.values()) <= gang.size.kv_bytes
        for name, figures in zip(sorted(self.gangs), self._figures()):
            if figures is not None:
                assert figures.residents == len(self.gangs[name].held)
                assert figures.slots_busy <= figures.slots and 0 <= figures.utilisation <= 1
        return made

    def _figures(self):
        known = {one.gang: one for one in self.scheduler.figures(self.now).gangs}
        return [known.get(name) for name in sorted(self.gangs)]

    def _admitted(self, one: Admit) -> None:
        assert one.request not in self.resident(), "on two gangs"
        gang = self.gangs[one.gang]
        assert gang.up and one.resume_quantum == self.checkpoints[one.request]
        gang.held[one.request] = Held(job=self.jobs[one.request], next_quantum=one.resume_quantum)
        if self.scheduler.view(one.request).alone:
            assert len(gang.held) == 1
        else:
            assert not any(self.scheduler.view(other).alone for other in gang.held)
            self._count_admission(one.request, one.gang)
        for name in self.gangs:
            self._older.pop((one.request, name), None)
            self._younger.pop((one.request, name), None)

    def _count_admission(self, admitted: str, name: str) -> None:
        for other in self.queued():
            if self.scheduler.view(other).alone or not self.gangs[name].size.holds(self.jobs[other]):
                continue
            count = self._older if self.age[admitted] < self.age[other] else self._younger
            count[other, name] += 1
            assert self._younger[other, name] <= (self.share - 1) * (self._older[other, name] + 1)

    def _granted(self, one: Permit) -> None:
        gang = self.gangs[one.gang]
        held = gang.held[one.request]
        assert held.announced and one.quantum == held.next_quantum
        assert (one.chunk, one.slots) == (held.job.quanta[one.quantum].chunk, held.job.quanta[one.quantum].slots)
        held.granted.append(one.quantum)
        held.next_quantum, held.announced = one.quantum + 1, False
        gang.grants += 1
        assert gang.grants <= self._due.pop(one.request)

    # ---- who is where

    def resident(self) -> list[str]:
        return sorted(request for gang in self.gangs.values() for request in gang.held)

    def queued(self) -> list[str]:
        return [one for one in self.jobs if self.scheduler.view(one).standing is RequestState.QUEUED]

    def where(self, request: str) -> tuple[str, Gang]:
        return next((name, gang) for name, gang in self.gangs.items() if request in gang.held)

    def _let_go(self, request: str) -> None:
        self.where(request)[1].held.pop(request)
        self._forget(request)

    def _forget(self, request: str) -> None:
        self._due.pop(request, None)

    def run(self, rounds: int = 10_000) -> None:
        """All gangs work at the same pace until everything has ended."""
        for _ in range(rounds):
            if self.scheduler.idle:
                return
            self.decide()
            self.now += 1.0
            for request in self.resident():
                self.step(request)
        raise AssertionError(f"still at it after {rounds} rounds: {self.scheduler.figures(self.now)}")
