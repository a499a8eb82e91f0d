"""Says which chunk of which video enters which gang's window next.

A pure object: it is told what happens, with the time, and answers with decisions. Same seed and same events, same
decisions. It knows no Ray, no torch, no threads and no clock.

Rules
    Turns. A quantum is granted after it was announced, and the quanta of a request in their order. Among the announced
    quanta of a gang the highest priority goes first, then who has had the fewest quanta (a newcomer counts as having
    had as many as the least of its equals on the gang), then who was ready first, then by tie-break. A quantum may be
    granted while the one before still runs; as they never run together, a request uses the wider one's slots. Where the
    next quantum does not fit into the free slots, none slips past it.

    Admission. A request is admitted by priority, then age, then by tie-break, where its KV fits into the gang's free
    memory, on the gang whose slots are spoken for least, then with the most free memory, then by name. None slips past
    one that the gang could hold but for its present requests. A gang takes no more requests than `crowd` times
    its slots, counting those of the same or a higher priority only: more would make all of them late and leave
    nothing to a gang that comes up later.

    No starvation. Of every `share` quanta in a row that a gang grants, one at least goes to the quantum that has waited
    longest. So a quantum is granted at the latest as the `share * (r + 1)`-th of its gang after it was announced, when
    r quanta were waiting there before it. Likewise for admission: while a request waits, a gang that could hold it
    admits at most `(share - 1) * (a + 1)` younger requests, where a is the number of older ones that it admits
    meanwhile. (A request that has to run alone is not counted.) The rule on crowding does not hold the oldest back.

    Loss. When a gang goes down its requests go back to the queue with the quantum of their last checkpoint and keep
    their age. One that fails `same` times with the same reason is set aside. So is one that fails, or whose gang is
    lost while it runs, `fruitless` times without getting further than ever before. From half as many such losses for
    which nobody is blamed it runs alone: it may be what kills the gangs, and so it harms no other and no other harms
    it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from models.errors import InputError
from parallel.cluster.queue import (
    ENDED,
    Admit,
    Assignment,
    Figures,
    GangEntry,
    GangSize,
    Job,
    Permit,
    Ready,
    RequestEntry,
    RequestState,
    View,
    check_fit,
    next_admission,
    next_quantum,
    reserve,
    tie_break,
)


class Scheduler:
    """Holds requests, gangs and window slots.

    Events may come late: what a gang says of a request that it does not hold any more is ignored. A gang that comes
    back may have its old name, if nothing that it said before it went down is passed on after that.

    Times are in seconds on any clock that does not go backwards.

    Args:
        seed: of the lots.
        gangs: sizes that a gang may ever have; a request that fits none of them is refused.
        share: a quantum, or a request, is passed over at most `share - 1` times for each that has waited longer.
        crowd: how many requests a gang may hold, as a multiple of those whose quanta fit into its slots.
        same: how often a request may fail in the same way until it is set aside.
        fruitless: how often a request may be lost or fail without getting further until it is set aside.
    """

    def __init__(
        self,
        *,
        seed: int,
        gangs: Iterable[GangSize],
        share: int = 8,
        crowd: int = 2,
        same: int = 2,
        fruitless: int = 4,
    ) -> None:
        if share < 1 or crowd < 1 or same < 1 or fruitless < 1:
            raise InputError(f"share {share}, crowd {crowd}, same {same} and fruitless {fruitless} must be 1 or more")
        self._seed, self._sizes = seed, set(gangs)
        self._share, self._crowd, self._same, self._fruitless = share, crowd, same, fruitless
        self._requests: dict[str, RequestEntry] = {}
        self._queue: dict[str, RequestEntry] = {}
        self._gangs: dict[str, GangEntry] = {}
        self._now = float("-inf")
        self._announcements = 0
        self._admissions_due = False
        """Something has changed that admission depends on, so that a long queue is not read for nothing."""

    # ---- requests

    def submit(self, job: Job, now: float) -> None:
        """Queue a request.

        Raises:
            InputError: no gang can ever hold it, or there is one of that id.
        """
        self._tell_time(now)
        if job.request in self._requests:
            raise InputError(f"there is a request {job.request} already: give every request its own id")
        check_fit(job, self._sizes)
        one = RequestEntry(
            job=job,
            submitted=now,
            number=len(self._requests),
            tie_break=tie_break(self._seed, job.request),
            checkpoint=job.resume_quantum,
            furthest=job.resume_quantum,
        )
        self._requests[job.request] = self._queue[job.request] = one
        self._admissions_due = True

    def cancel(self, request: str, now: float) -> None:
        """Forget a request; its slots and memory are free at once. Nothing happens if it has ended.

        The gang must be told before it is given anything else.
        """
        self._tell_time(now)
        one = self._requests[request]
        if one.standing not in ENDED:
            self._end(one, RequestState.CANCELLED)

    def quantum_ready(self, request: str, gang: str, quantum: int, now: float) -> None:
        """The gang has announced a quantum. The first one after admission says with which quantum the request goes on.

        Raises:
            ValueError: it is not the quantum that comes next.
        """
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is None:
            return
        expected = one.expected
        if expected is not None and quantum < expected:
            return  # said before
        if quantum >= len(one.job.quanta) or quantum < 0 or (expected is not None and quantum > expected) or one.ready:
            raise ValueError(f"request {request}: quantum {quantum} was announced, {expected} comes next")
        if one.done is None:
            one.done = quantum
        self._announcements += 1
        one.ready = Ready(
            quantum=quantum, since=now, number=self._announcements, tie_break=tie_break(self._seed, request, quantum)
        )

    def quantum_done(self, request: str, gang: str, quantum: int, now: float) -> None:
        """All ticks of a quantum are done; its slots are free.

        Raises:
            ValueError: a quantum before it is not done, or it was not granted.
        """
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is None or (one.done is not None and quantum < one.done):
            return
        if not one.granted or one.granted[0] != quantum:
            raise ValueError(f"request {request}: quantum {quantum} is said to be done, granted are {one.granted}")
        one.granted.pop(0)
        one.done = quantum + 1
        if one.done > one.furthest:
            one.furthest, one.fruitless, one.suspicions = one.done, 0, 0

    def checkpointed(self, request: str, gang: str, quantum: int, now: float) -> None:
        """There is a whole checkpoint, from which the request would go on with this quantum."""
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is not None:
            one.checkpoint = quantum

    def request_done(self, request: str, gang: str, now: float) -> None:
        """The video is complete and handed out."""
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is not None:
            self._end(one, RequestState.DONE)

    def request_failed(self, request: str, gang: str, reason: str, now: float) -> None:
        """The gang gave the request up and is well itself. It is queued again, or set aside."""
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is not None:
            self._gangs[gang].residents.pop(request)
            self._lost(one, reason, guilty=True, suspect=False)

    # ---- gangs

    def gang_up(self, gang: str, size: GangSize, now: float) -> None:
        """A gang can be given work.

        Raises:
            ValueError: it is up already.
        """
        self._tell_time(now)
        book = self._gangs.setdefault(gang, GangEntry(gang))
        if book.up:
            raise ValueError(f"gang {gang} is up already")
        book.tell_time(now)
        book.up, book.size = True, size
        self._sizes.add(size)
        self._admissions_due = True

    def gang_down(self, gang: str, now: float, *, blamed: Mapping[str, str] | None = None) -> list[str]:
        """A gang is lost. Nothing happens if it is down already.

        Args:
            gang: which.
            now: the time.
            blamed: requests that are known to have caused it, with the reason; they count as failed.

        Returns:
            The requests that it held, in order of submission; `view` says which are queued again and which set aside.
        """
        self._tell_time(now)
        book = self._gangs.get(gang)
        if book is None or not book.up:
            return []
        book.up = False
        book.losses += 1
        held, blamed = sorted(book.residents.values(), key=lambda one: one.number), blamed or {}
        book.residents.clear()
        for one in held:
            guilty = one.job.request in blamed
            # Whoever waited at a border did nothing, and cannot have done it; anybody else can.
            suspect = not blamed and (bool(one.granted) or one.done is None)
            self._lost(one, blamed.get(one.job.request, f"gang {gang} was lost"), guilty=guilty, suspect=suspect)
        self._admissions_due = True
        return [one.job.request for one in held]

    # ---- decisions and figures

    def assignments(self, now: float) -> list[Assignment]:
        """What to do now, in order. Each decision is given out once: a second call without an event gives none."""
        self._tell_time(now)
        made: list[Assignment] = []
        if self._admissions_due:
            reserve(self._gangs.values(), self._queue.values())
            while (admit := self._admit()) is not None:
                made.append(admit)
            self._admissions_due = False
        for gang in self._up():
            while (one := next_quantum(gang, self._share)) is not None:
                made.append(self._grant(gang, one))
        return made

    def view(self, request: str) -> View:
        """What is known of a request.

        Raises:
            KeyError: there never was one of that id.
        """
        return self._requests[request].view()

    def figures(self, now: float) -> Figures:
        """Figures of this moment."""
        self._tell_time(now)
        views = [one.view() for one in self._requests.values()]
        up = [gang.size for gang in self._up()]
        return Figures(
            queued=len(self._queue),
            standings={standing: sum(view.standing is standing for view in views) for standing in RequestState},
            restarts=sum(view.restarts for view in views),
            gangs=tuple(gang.figures() for _, gang in sorted(self._gangs.items())),
            unplaceable=tuple(name for name, one in self._queue.items() if not any(size.holds(one.job) for size in up)),
        )

    @property
    def idle(self) -> bool:
        """All requests have ended."""
        return not self._queue and not any(gang.residents for gang in self._gangs.values())

    # ---- inside

    def _tell_time(self, now: float) -> None:
        if now < self._now:
            raise ValueError(f"the time goes backwards, from {self._now} to {now}")
        self._now = now
        for gang in self._gangs.values():
            gang.tell_time(now)

    def _up(self) -> list[GangEntry]:
        return [gang for gang in self._gangs.values() if gang.up]

    def _resident(self, request: str, gang: str) -> RequestEntry | None:
        """The request, if that gang holds it."""
        one = self._requests[request]
        return one if one.gang == gang else None

    def _admit(self) -> Admit | None:
        for gang in sorted(self._up(), key=lambda gang: gang.load):
            one = next_admission(gang, self._queue.values(), share=self._share, crowd=self._crowd)
            if one is None:
                continue
            del self._queue[one.job.request]
            if gang.reserved is one:
                gang.reserved = None
            equals = [other.served for other in gang.residents.values() if other.job.priority == one.job.priority]
            one.standing, one.gang, one.served = RequestState.PAUSED, gang.name, min(equals, default=0)
            gang.residents[one.job.request] = one
            return Admit(request=one.job.request, gang=gang.name, resume_quantum=one.checkpoint)
        return None

    def _grant(self, gang: GangEntry, one: RequestEntry) -> Permit:
        ready, one.ready = one.ready, None
        assert ready is not None
        one.granted.append(ready.quantum)
        one.served += 1
        gang.quanta_granted += 1
        plan = one.job.quanta[ready.quantum]
        return Permit(
            request=one.job.request, gang=gang.name, quantum=ready.quantum, chunk=plan.chunk, slots=plan.slots
        )

    def _lost(self, one: RequestEntry, reason: str, *, guilty: bool, suspect: bool) -> None:
        """A request came off its gang before its end."""
        one.reason = reason
        one.failures[reason] += guilty
        one.fruitless += guilty or suspect
        one.suspicions += suspect
        if one.failures[reason] >= self._same or one.fruitless >= self._fruitless:
            self._end(one, RequestState.QUARANTINED)
            return
        one.alone = one.suspicions >= max(1, self._fruitless // 2)
        one.restarts += 1
        one.leave(RequestState.QUEUED)
        self._queue[one.job.request] = one
        self._admissions_due = True

    def _end(self, one: RequestEntry, standing: RequestState) -> None:
        self._queue.pop(one.job.request, None)
        for gang in self._gangs.values():
            gang.residents.pop(one.job.request, None)
        one.leave(standing)
        self._admissions_due = True
