"""Says which chunk of which video enters which gang's window next.

A pure object: it is told what happens, with the time, and answers with decisions. Same seed and same events, same
decisions. It knows no Ray, no torch, no threads and no clock.

Rules
    Turns. A turn is granted after it was announced, and the turns of a request in their order. Among the announced
    turns of a gang the highest priority goes first, then who has had the fewest turns (a newcomer counts as having had
    as many as the least of its equals on the gang), then who was ready first, then by lot. A turn may be granted while
    the one before still runs; as they never run together, a request uses the wider one's slots. Where the next turn
    does not fit into the free slots, none slips past it.

    Admission. A request is admitted by priority, then age, then by lot, where its KV fits into the gang's free
    memory, on the gang whose slots are spoken for least, then with the most free memory, then by name. None slips past
    one that the gang could hold but for its present requests. A gang takes no more requests than `crowd` times
    its slots, counting those of the same or a higher priority only: more would make all of them late and leave
    nothing to a gang that comes up later.

    No starvation. Of every `share` turns in a row that a gang grants, one at least goes to the turn that has waited
    longest. So a turn is granted at the latest as the `share * (r + 1)`-th of its gang after it was announced, when r
    turns were waiting there before it. Likewise for admission: while a request waits, a gang that could hold it admits
    at most `(share - 1) * (a + 1)` younger requests, where a is the number of older ones that it admits meanwhile. (A
    request that has to run alone is not counted.) The rule on crowding does not hold the oldest back.

    Loss. When a gang goes down its requests go back to the queue with the turn of their last checkpoint and keep
    their age. One that fails `same` times with the same reason is set aside. So is one that fails, or whose gang is
    lost while it runs, `fruitless` times without getting further than ever before. From half as many such losses for
    which nobody is blamed it runs alone: it may be what kills the gangs, and so it harms no other and no other harms
    it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from models.errors import InputError
from parallel.cluster.jobs import (
    Admit,
    Assignment,
    Figures,
    GangSize,
    Grant,
    Job,
    Standing,
    View,
)
from parallel.cluster.ledger import (
    ENDED,
    GangBook,
    Ready,
    RequestBook,
    check_fit,
    lot,
    next_admission,
    next_turn,
    reserve,
)

__all__ = ["Scheduler"]


class Scheduler:
    """Holds requests, gangs and window slots.

    Events may come late: what a gang says of a request that it does not hold any more is ignored. A gang that comes
    back may have its old name, if nothing that it said before it went down is passed on after that.

    Times are in seconds on any clock that does not go backwards.

    Args:
        seed: of the lots.
        gangs: sizes that a gang may ever have; a request that fits none of them is refused.
        share: a turn, or a request, is passed over at most `share - 1` times for each that has waited longer.
        crowd: how many requests a gang may hold, as a multiple of those whose turns fit into its slots.
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
        self._requests: dict[str, RequestBook] = {}
        self._queue: dict[str, RequestBook] = {}
        self._gangs: dict[str, GangBook] = {}
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
        one = RequestBook(
            job=job,
            submitted=now,
            number=len(self._requests),
            lot=lot(self._seed, job.request),
            checkpoint=job.resume_turn,
            furthest=job.resume_turn,
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
            self._end(one, Standing.CANCELLED)

    def turn_ready(self, request: str, gang: str, turn: int, now: float) -> None:
        """The gang has announced a turn. The first one after admission says with which turn the request goes on.

        Raises:
            ValueError: it is not the turn that comes next.
        """
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is None:
            return
        expected = one.expected
        if expected is not None and turn < expected:
            return  # said before
        if turn >= len(one.job.turns) or turn < 0 or (expected is not None and turn > expected) or one.ready:
            raise ValueError(f"request {request}: turn {turn} was announced, {expected} comes next")
        if one.done is None:
            one.done = turn
        self._announcements += 1
        one.ready = Ready(turn=turn, since=now, number=self._announcements, lot=lot(self._seed, request, turn))

    def turn_done(self, request: str, gang: str, turn: int, now: float) -> None:
        """All ticks of a turn are done; its slots are free.

        Raises:
            ValueError: a turn before it is not done, or it was not granted.
        """
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is None or (one.done is not None and turn < one.done):
            return
        if not one.granted or one.granted[0] != turn:
            raise ValueError(f"request {request}: turn {turn} is said to be done, granted are {one.granted}")
        one.granted.pop(0)
        one.done = turn + 1
        if one.done > one.furthest:
            one.furthest, one.fruitless, one.suspicions = one.done, 0, 0

    def checkpointed(self, request: str, gang: str, turn: int, now: float) -> None:
        """There is a whole checkpoint, from which the request would go on with this turn."""
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is not None:
            one.checkpoint = turn

    def request_done(self, request: str, gang: str, now: float) -> None:
        """The video is complete and handed out."""
        self._tell_time(now)
        one = self._resident(request, gang)
        if one is not None:
            self._end(one, Standing.DONE)

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
        book = self._gangs.setdefault(gang, GangBook(gang))
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
            while (one := next_turn(gang, self._share)) is not None:
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
            standings={standing: sum(view.standing is standing for view in views) for standing in Standing},
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

    def _up(self) -> list[GangBook]:
        return [gang for gang in self._gangs.values() if gang.up]

    def _resident(self, request: str, gang: str) -> RequestBook | None:
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
            one.standing, one.gang, one.served = Standing.PAUSED, gang.name, min(equals, default=0)
            gang.residents[one.job.request] = one
            return Admit(request=one.job.request, gang=gang.name, resume_turn=one.checkpoint)
        return None

    def _grant(self, gang: GangBook, one: RequestBook) -> Grant:
        ready, one.ready = one.ready, None
        assert ready is not None
        one.granted.append(ready.turn)
        one.served += 1
        gang.turns_granted += 1
        plan = one.job.turns[ready.turn]
        return Grant(request=one.job.request, gang=gang.name, turn=ready.turn, chunk=plan.chunk, slots=plan.slots)

    def _lost(self, one: RequestBook, reason: str, *, guilty: bool, suspect: bool) -> None:
        """A request came off its gang before its end."""
        one.reason = reason
        one.failures[reason] += guilty
        one.fruitless += guilty or suspect
        one.suspicions += suspect
        if one.failures[reason] >= self._same or one.fruitless >= self._fruitless:
            self._end(one, Standing.ASIDE)
            return
        one.alone = one.suspicions >= max(1, self._fruitless // 2)
        one.restarts += 1
        one.leave(Standing.QUEUED)
        self._queue[one.job.request] = one
        self._admissions_due = True

    def _end(self, one: RequestBook, standing: Standing) -> None:
        self._queue.pop(one.job.request, None)
        for gang in self._gangs.values():
            gang.residents.pop(one.job.request, None)
        one.leave(standing)
        self._admissions_due = True
