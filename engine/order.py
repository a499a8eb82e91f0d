"""The work of one video in the order (tick, chunk), given out as soon as it may begin.

A chunk's step may begin when the chunk's own latent is known, which is at once if its last step was reused, else when
the velocity has come back; the other chunks of the tick are not waited for. As the order never changes, every stage
sees the keys and values that one process would see.

A quantum, which is what happens between two chunk boundaries, may have to wait until its gate is open, and a snapshot
may be taken before it. Both change when work is begun, and never its order.

It knows neither ranks nor messages.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from engine.checkpoint.files import Checkpointer
from engine.reuse.policy import Decision, Observation
from engine.schedule import Tick
from engine.video import VideoRun, Work, WorkItem
from models.protocols import Pass

OnDecision = Callable[[Observation, Decision], None]


class AdmissionGate(Protocol):
    """Says when the quanta of one video may begin, counted through all its spans. It is called by the thread that works
    off the video."""

    def announce(self, quantum: int) -> None:
        """A quantum comes next: the last tick of the one before has begun, or the video has been submitted."""

    def open(self, quantum: int) -> bool:
        """Whether a quantum may begin; asked again and again until it may, so it must answer at once."""


@dataclass(slots=True)
class TickProgress:
    """What has come of a tick; it is done when all of its chunks have taken their step."""

    tick: Tick
    left: int  # chunks that have not
    items: int = 0  # passes through the layers that belong to it
    computed: int = 0  # chunk-steps that were computed
    seconds: float = 0.0  # since the tick before was done


@dataclass(slots=True)
class _OpenStep:
    tick: TickProgress
    step: int
    passes: list[Pass]
    velocities: list[Tensor] = field(default_factory=list)


class WorkOrder:
    """Walks through one video."""

    def __init__(
        self,
        run: VideoRun,  # the video
        *,
        barrier: bool,  # begin a tick only when all chunks of the one before have taken their step; for comparison
        on_decision: OnDecision,  # called with every decision, in order
        gate: AdmissionGate | None = None,  # lets quanta begin; None lets all
        checkpointer: Checkpointer | None = None,  # keeps how far the video is between quanta
        start: int = 0,  # the first quantum, to which the run was restored if it is not 0
        before: int = 0,  # quanta of earlier spans of the video, for those who count all
    ) -> None:
        self._run, self._barrier, self._on_decision = run, barrier, on_decision
        self._gate, self._checkpointer, self._start, self._quanta_before = gate, checkpointer, start, before
        self.held = False  # what comes next waits for the gate or for the last checkpoint, and not for a velocity
        self._steps: dict[int, _OpenStep] = {}  # whose velocity is still to come, by chunk
        self._ticks: list[TickProgress] = []
        self._done: list[TickProgress] = []
        self._finished: list[tuple[int, Tensor]] = []
        self._peeked: Work | None = None
        self._walk, self._over, self._before = self._issue(), False, time.perf_counter()
        if gate is not None:
            gate.announce(before + start)

    @property
    def over(self) -> bool:
        """All work was given out and all of its results have come back."""
        return self._over and not self._steps

    def ready(self) -> bool:
        """Whether `take` has something; decides what comes before it."""
        if self._peeked is None and not self._over:
            try:
                self._peeked = next(self._walk)
            except StopIteration:
                self._over = True
        return self._peeked is not None

    def take(self) -> Work:
        """The next work, which is ready."""
        work, self._peeked = self._peeked, None
        assert work is not None
        return work

    def returned(self, item: WorkItem, velocity: Tensor) -> None:
        """A velocity has come back; those of the passes of a step come in the order in which they were given out."""
        step = self._steps[item.chunk]
        step.velocities.append(velocity)
        if len(step.velocities) < len(step.passes):
            return
        del self._steps[item.chunk]
        self._run.close(item.chunk, step.step, step.passes, step.velocities)
        self._stepped(step.tick, item.chunk)

    def finished(self) -> list[tuple[int, Tensor]]:
        """Chunks that have finished since the last call, with their latents, in order."""
        taken, self._finished = self._finished, []
        return taken

    def ticks_done(self) -> list[TickProgress]:
        """Ticks that are done since the last call, in order."""
        taken, self._done = self._done, []
        return taken

    def _issue(self) -> Iterator[Work | None]:
        """Work in order; None where the next one has to wait."""
        schedule = self._run.schedule
        for quantum in range(self._start, schedule.quanta):
            yield from self._hold(self._quanta_before + quantum)
            if not quantum:
                yield from self._run.prefix_work()
            ticks = schedule.ticks_of_quantum(quantum)
            for tick in ticks:
                last = tick == ticks[-1] and quantum < schedule.quanta - 1
                yield from self._tick(schedule.tick(tick), quantum + 1 if last else None)

    def _hold(self, quantum: int) -> Iterator[None]:
        """Before a quantum: do what is due, and wait until it may begin."""
        if self._checkpointer is not None and self._checkpointer.due(quantum):
            yield from self._until(list(self._steps))
            while not self._checkpointer.reached(quantum):
                self.held = True
                yield None
        while self._gate is not None and not self._gate.open(quantum):
            self.held = True
            yield None
        self.held = False

    def _tick(self, tick: Tick, coming: int | None) -> Iterator[Work | None]:
        """A tick's work; `coming` is the quantum to announce when it has begun."""
        run, opened = self._run, TickProgress(tick=tick, left=len(tick.active))
        if self._barrier:
            yield from self._until(list(self._steps))
        elif run.renews:
            yield from self._until(list(tick.retiring))
        self._ticks.append(opened)
        clean = run.begin(tick)
        if coming is not None and self._gate is not None:
            self._gate.announce(self._quanta_before + coming)
        opened.items += len(clean)
        yield from clean
        groups = [list(tick.active)] if run.whole_window else [[one] for one in tick.active]
        for group in groups:
            chunks = [chunk for chunk, _ in group]
            yield from self._until(chunks)
            for seen, decision in run.decide(tick, chunks):
                self._on_decision(seen, decision)
                if decision.computes:
                    yield from self._open(opened, seen.chunk, seen.step, decision)
                else:
                    self._stepped(opened, seen.chunk)
        run.seal(tick)

    def _open(self, opened: TickProgress, chunk: int, step: int, decision: Decision) -> Iterator[Work]:
        work = self._run.open(opened.tick, chunk, step, decision)
        weighed = [one.item.what for one in work if one.item.what.weight]
        opened.items += len(work)
        opened.computed += decision is Decision.COMPUTE
        if weighed:
            self._steps[chunk] = _OpenStep(tick=opened, step=step, passes=weighed)
        yield from work
        if not weighed:  # no velocity will come back
            self._run.close(chunk, step, [], [])
            self._stepped(opened, chunk)

    def _until(self, chunks: list[int]) -> Iterator[None]:
        while any(chunk in self._steps for chunk in chunks):
            yield None

    def _stepped(self, opened: TickProgress, chunk: int) -> None:
        """A chunk has taken its step of a tick."""
        opened.left -= 1
        if chunk in opened.tick.finishing:
            self._finished.append((chunk, self._run.finish(chunk)))
        while self._ticks and not self._ticks[0].left:
            done, before = self._ticks.pop(0), self._before
            self._before = time.perf_counter()
            done.seconds = self._before - before
            self._done.append(done)
