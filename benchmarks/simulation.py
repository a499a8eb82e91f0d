"""Videos on a pipeline of stages, in simulated time: when each stage works, and when each chunk is finished.

The order of work is that of `engine.order` and `parallel.ranks.leader`: items in the order (tick, chunk, pass), the
next one begun as soon as its chunk's own velocity is back, several videos first ready first, reused steps without any
item. What a call takes on each stage, and what a link takes, is handed in.

Stages and links serve in order of arrival and nothing is lost or overtaken, so a call's whole way through the pipeline
is known when the head begins it; only the head has to be stepped through. Plain Python, no torch, no randomness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from benchmarks.simulate_data import Call, Machine, Outcome, Span, VideoPlan
from engine.schedule import Tick


@dataclass(frozen=True, slots=True)
class _Item:
    call: Call
    tick: int
    chunk: int


class _Order:
    """Walks through one video as `engine.order.WorkOrder` does."""

    def __init__(self, plan: VideoPlan, *, barrier: bool) -> None:
        self._plan, self._barrier = plan, barrier
        self._open: dict[int, tuple[int, bool]] = {}
        """By chunk: velocities of its step that are still to come, and whether the step is its last."""
        self._walk = self._issue()
        self._peeked: _Item | None = None
        self._exhausted = False
        self.decisions = 0
        self.finished: list[int] = []
        """Chunks that are finished and were not noted yet."""
        self.ready_since: float | None = None

    @property
    def over(self) -> bool:
        return self._exhausted and not self._open

    def ready(self) -> bool:
        if self._peeked is None and not self._exhausted:
            try:
                self._peeked = next(self._walk)
            except StopIteration:
                self._exhausted = True
        return self._peeked is not None

    def take(self) -> _Item:
        item, self._peeked, self.ready_since = self._peeked, None, None
        assert item is not None
        return item

    def returned(self, chunk: int) -> None:
        left, last = self._open[chunk]
        if left > 1:
            self._open[chunk] = left - 1, last
            return
        del self._open[chunk]
        if last:
            self.finished.append(chunk)

    def _issue(self) -> Iterator[_Item | None]:
        for call in self._plan.prefix:
            yield _Item(call, -1, -1)
        for planned in self._plan.ticks:
            tick = planned.tick
            if self._barrier:
                yield from self._until(list(self._open))
            elif tick.retiring is not None and self._plan.renews:
                yield from self._until([tick.retiring])
            for call in planned.clean:
                yield _Item(call, tick.index, -1 if tick.retiring is None else tick.retiring)
            groups = [planned.steps] if self._plan.whole_window else [(step,) for step in planned.steps]
            for group in groups:
                yield from self._until([chunk for chunk, _ in group])
                self.decisions += len(group)
                for chunk, calls in group:
                    yield from self._step(tick, chunk, calls)

    def _step(self, tick: Tick, chunk: int, calls: tuple[Call, ...]) -> Iterator[_Item]:
        last = chunk == tick.finishing
        if returning := sum(call.returns for call in calls):
            self._open[chunk] = returning, last
        for call in calls:
            yield _Item(call, tick.index, chunk)
        if not returning and last:
            self.finished.append(chunk)

    def _until(self, chunks: list[int]) -> Iterator[None]:
        while any(chunk in self._open for chunk in chunks):
            yield None


@dataclass(slots=True)
class _Pipeline:
    """Stages and links behind each other; each is free again at some time."""

    machine: Machine
    busy: list[float]
    free: list[float]
    links: list[float]
    spans: list[Span] | None
    calls: int = 0

    def send(self, now: float, item: _Item, video: int) -> tuple[float, float | None]:
        """Begin an item on the head; when the head is free again, and when the velocity is back, if it comes back."""
        machine, end = self.machine, now
        self.calls += 1
        for stage, seconds in enumerate(item.call.seconds):
            if stage:
                end = self._carry(stage - 1, end, machine.hidden_bytes)
            start = max(end, self.free[stage])
            end = self.free[stage] = start + seconds
            self.busy[stage] += seconds
            if self.spans is not None:
                self.spans.append(
                    Span(
                        stage=stage,
                        start=start,
                        end=end,
                        video=video,
                        tick=item.tick,
                        chunk=item.chunk,
                        name=item.call.name,
                    )
                )
        if not item.call.returns:
            return self.free[0], None
        if machine.stages > 1:
            end = self._carry(machine.stages - 1, end, machine.velocity_bytes)
        return self.free[0], end

    def _carry(self, link: int, ready: float, size: float) -> float:
        """When a message that is ready now has arrived; a link carries one after the other."""
        self.links[link] = max(ready, self.links[link]) + size / self.machine.bandwidth
        return self.links[link] + self.machine.latency


@dataclass(slots=True)
class _Head:
    """The head's loop, as `parallel.ranks.leader.Leader.pump` has it."""

    pipeline: _Pipeline
    plans: Iterator[tuple[int, VideoPlan]]
    concurrency: int
    now: float = 0.0
    running: dict[int, _Order] = field(default_factory=dict)
    returning: deque[tuple[float, int, int]] = field(default_factory=deque)
    finished: dict[int, list[float]] = field(default_factory=dict)

    def admit(self) -> None:
        room = self.concurrency - len(self.running)
        for video, plan in islice(self.plans, room):
            self.running[video] = _Order(plan, barrier=self.pipeline.machine.barrier)
            self.finished[video] = []

    def pump(self) -> None:
        while self.returning and self.returning[0][0] <= self.now:
            self._take()
        video = self._first_ready()
        if video is not None:
            item = self.running[video].take()
            self.now, back = self.pipeline.send(self.now, item, video)
            if back is not None:
                self.returning.append((back, video, item.chunk))
        elif self.returning:
            self.now = max(self.now, self.returning[0][0])
            self._take()

    def _take(self) -> None:
        _, video, chunk = self.returning.popleft()
        self.now += self.pipeline.machine.take
        self.running[video].returned(chunk)
        self._note(video)

    def _note(self, video: int) -> None:
        order = self.running[video]
        self.finished[video] += [self.now] * len(order.finished)
        order.finished.clear()

    def _first_ready(self) -> int | None:
        first, since = None, float("inf")
        for video, order in list(self.running.items()):
            decided = order.decisions
            ready = order.ready()
            self.now += (order.decisions - decided) * self.pipeline.machine.decide
            self._note(video)
            if not ready:
                if order.over:
                    del self.running[video]
                    self.admit()
                continue
            if order.ready_since is None:
                order.ready_since = self.now
            if order.ready_since < since:
                first, since = video, order.ready_since
        return first


def simulate(
    videos: Sequence[VideoPlan], machine: Machine, *, concurrency: int | None = None, spans: bool = False
) -> Outcome:
    """Make videos.

    Args:
        videos: what there is to do; all is known from the start.
        machine: what carries it out.
        concurrency: videos in flight; all by default. The next begins when one is over.
        spans: remember what each stage did when.

    Raises:
        ValueError: a call has times for another number of stages than the machine has.
    """
    for plan in videos:
        for call in {call for tick in plan.ticks for _, calls in tick.steps for call in calls}:
            if len(call.seconds) != machine.stages:
                raise ValueError(f"a call has times for {len(call.seconds)} stages, the machine has {machine.stages}")
    pipeline = _Pipeline(
        machine=machine,
        busy=[0.0] * machine.stages,
        free=[0.0] * machine.stages,
        links=[0.0] * machine.stages,
        spans=[] if spans else None,
    )
    head = _Head(pipeline, iter(enumerate(videos)), concurrency or len(videos))
    head.admit()
    while head.running:
        head.pump()
    return Outcome(
        seconds=max(head.now, *pipeline.free),
        busy=tuple(pipeline.busy),
        chunks=tuple(tuple(head.finished[video]) for video in range(len(videos))),
        calls=pipeline.calls,
        spans=tuple(pipeline.spans or ()),
    )
