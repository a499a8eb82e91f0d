"""Videos on a pipeline of stages, in simulated time: when each stage works, and when each chunk is finished.

The order of work is `engine.order.WorkOrder`, which a virtual clock drives here as the leader of a gang drives it:
several videos first ready first. The passes of a video are asked once of a real `VideoRun` on latents of one cell, with
the decisions given as flags; so nothing about them is written a second time here. What a pass takes on each stage, and
what a link takes, is handed in.

Stages and links serve in order of arrival and nothing is lost or overtaken, so a pass's whole way through the pipeline
is known when the leader begins it; only the leader has to be stepped through. There is no randomness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch

from benchmarks.workload import Flags, Workload
from engine.order import WorkOrder
from engine.reuse.memory import ReuseMemory
from engine.reuse.policy import Decision, Observation, Policy
from engine.schedule import Schedule, Tick
from engine.video import Reuse, VideoRun, VideoShape, Work
from models.errors import InputError
from models.protocols import Pass, Sampling

Seconds = Callable[[Pass, int | None], tuple[float, ...]]
"""What a pass takes on each stage; with the chunk's own step, or None for a pass over a finished chunk."""


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """One video as a plan, and what each pass takes.

    It looks like a `VideoRun` to `WorkOrder`, and gives out what it holds: no tensor is computed.
    """

    schedule: Schedule
    seconds: Seconds
    renews: bool  # the KV of a finished chunk is renewed
    whole_window: bool  # all chunks of a tick are decided at once
    clean: Mapping[int, tuple[Work, ...]]  # by tick: passes that renew the KV of the chunk that retires
    decided: Mapping[tuple[int, int], tuple[Observation, Decision]]  # by (tick, chunk)
    steps: Mapping[tuple[int, int], tuple[Work, ...]]  # by (tick, chunk): passes of a step; none if it is reused

    def cost(self, work: Work) -> tuple[float, ...]:
        """Seconds of a pass on each stage."""
        return self.seconds(work.item.what, work.item.step)

    def prefix_work(self) -> list[Work]:
        """Passes over chunks that are given: there are none."""
        return []

    def begin(self, tick: Tick) -> list[Work]:
        return list(self.clean[tick.index])

    def decide(self, tick: Tick, chunks: Sequence[int]) -> list[tuple[Observation, Decision]]:
        return [self.decided[tick.index, chunk] for chunk in chunks]

    def open(self, tick: Tick, chunk: int, step: int, decision: Decision) -> list[Work]:
        return list(self.steps[tick.index, chunk])

    def close(self, chunk: int, step: int, passes: Sequence[Pass], velocities: Sequence[torch.Tensor]) -> None:
        """A step was taken."""

    def seal(self, tick: Tick) -> None:
        """All work of a tick was given out."""

    def finish(self, chunk: int) -> torch.Tensor:
        """A finished chunk: nothing."""
        return torch.empty(0)

    @property
    def work(self) -> list[Work]:
        """All passes; not in the order in which they are run."""
        return [one for group in (*self.clean.values(), *self.steps.values()) for one in group]

    @property
    def calls(self) -> int:
        """Passes, which is how often each stage is called."""
        return len(self.work)

    @property
    def returning(self) -> int:
        """Passes whose velocity goes back to the leader."""
        return sum(bool(one.item.what.weight) for one in self.work)

    @property
    def total(self) -> float:
        """Seconds of all passes on all stages."""
        return sum(sum(self.cost(one)) for one in self.work)


class _FlagPolicy(Policy):
    """Decides as flags [ticks, chunks] say; None computes everything."""

    def __init__(self, flags: np.ndarray | None, *, whole_window: bool) -> None:
        self.scope: Literal["chunk", "window"] = "window" if whole_window else "chunk"
        self._flags = flags

    def decide(self, observations: Sequence[Observation]) -> list[Decision]:
        if self._flags is None:
            return [Decision.COMPUTE] * len(observations)
        return [Decision(int(self._flags[one.tick, one.chunk])) for one in observations]


def plan_video(
    schedule: Schedule,
    sampling: Sampling,
    seconds: Seconds,
    flags: np.ndarray | None = None,
    *,
    whole_window: bool = False,
) -> VideoPlan:
    """The plan of one video, whose passes the sampling names.

    Flags are [ticks, chunks] of the schedule, 0 where a step is computed; None computes all. With `whole_window` the
    reuse policy decides for all chunks of a tick at once.
    """
    if flags is not None and flags.shape != (schedule.ticks, schedule.chunks):
        wanted = f"{schedule.ticks} ticks of {schedule.chunks} chunks"
        raise InputError(f"reuse flags of {flags.shape[0]} ticks and {flags.shape[1]} chunks do not fit {wanted}")
    run = _run(schedule, sampling, _FlagPolicy(flags, whole_window=whole_window))
    clean, steps, decided = {}, {}, {}
    for tick in schedule:
        clean[tick.index] = tuple(run.begin(tick))
        for seen, decision in run.decide(tick):
            decided[tick.index, seen.chunk] = seen, decision
            if decision.computes:
                work = steps[tick.index, seen.chunk] = tuple(run.open(tick, seen.chunk, seen.step, decision))
                run.close(seen.chunk, seen.step, [one.item.what for one in work], [one.x for one in work])
        run.seal(tick)
        for chunk in tick.finishing:
            run.finish(chunk)
    return VideoPlan(
        schedule=schedule,
        seconds=seconds,
        renews=run.renews,
        whole_window=run.whole_window,
        clean=clean,
        decided=decided,
        steps=steps,
    )


def _run(schedule: Schedule, sampling: Sampling, policy: Policy) -> VideoRun:
    """A real run with one cell in each latent frame."""
    shape = VideoShape(channels=1, prefix_frames=0, height=1, width=1)
    reuse = Reuse(policy=policy, memory=ReuseMemory("residual"), patches=lambda x: x, observe=False)
    noise, cpu = (lambda chunk, size, draw: torch.zeros(size)), torch.device("cpu")
    return VideoRun(0, schedule, shape, sampling, noise, reuse, prefix=None, compressed=False, device=cpu)


def plans_of(workload: Workload, seconds: Seconds, flags: Sequence[Flags]) -> list[VideoPlan]:
    """The plan of each video; without flags every step is computed."""
    schedule, whole = workload.schedule, workload.reuse.new_policy().scope == "window"
    tables = [np.array(flags[number], dtype=np.uint8) if flags else None for number in range(workload.videos)]
    return [plan_video(schedule, workload.sampling, seconds, one, whole_window=whole) for one in tables]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What carries the work out, apart from what the passes themselves take."""

    stages: int  # of the pipeline
    latency: float = 0.0  # seconds of a message that carries nothing
    bandwidth: float = float("inf")  # bytes per second of a link, in one direction
    hidden_bytes: float = 0.0  # of a pass on its way to the next stage, on one link
    velocity_bytes: float = 0.0  # of a result on its way to the leader
    decide: float = 0.0  # seconds that the leader takes to decide one chunk's step
    take: float = 0.0  # seconds that the leader takes for a velocity that is back
    barrier: bool = False  # begin a tick only when the one before is done; for comparison


class Span(NamedTuple):
    """A pass on a stage."""

    stage: int
    start: float
    end: float
    video: int
    tick: int
    chunk: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was simulated."""

    seconds: float  # from the first pass to the last result
    busy: tuple[float, ...]  # of each stage, seconds in passes
    chunks: tuple[tuple[float, ...], ...]  # of each video, when each of its chunks was finished
    spans: Sequence[Span]  # what each stage did when

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Of each stage, the share of the time that it works."""
        return tuple(one / self.seconds if self.seconds else 0.0 for one in self.busy)

    @property
    def first_chunk(self) -> float:
        """Seconds until the first chunk of the first video is finished."""
        return self.chunks[0][0]


class _Pipeline:
    """Stages and links behind each other; each is free again at some time."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.busy, self.free, self._links = ([0.0] * machine.stages for _ in range(3))
        self.spans: list[Span] = []

    def send(self, now: float, work: Work, seconds: Sequence[float], video: int) -> tuple[float, float | None]:
        """Begin a pass on the leader; when that is free again, and when the velocity is back, if it comes back."""
        machine, item, end = self.machine, work.item, now
        for stage, spent in enumerate(seconds):
            if stage:
                end = self._carry(stage - 1, end, machine.hidden_bytes)
            start = max(end, self.free[stage])
            end = self.free[stage] = start + spent
            self.busy[stage] += spent
            self.spans.append(Span(stage, start, end, video, item.tick, item.chunk, item.what.name))
        if not item.what.weight:
            return self.free[0], None
        if machine.stages > 1:
            end = self._carry(machine.stages - 1, end, machine.velocity_bytes)
        return self.free[0], end

    def _carry(self, link: int, ready: float, size: float) -> float:
        """When a message that is ready now has arrived; a link carries one after the other."""
        self._links[link] = max(ready, self._links[link]) + size / self.machine.bandwidth
        return self._links[link] + self.machine.latency


class _Video:
    """One video: the engine's order of its work, and when its chunks were finished."""

    def __init__(self, plan: VideoPlan, *, barrier: bool) -> None:
        self.plan = plan
        self.decisions = 0
        self.ready_since: float | None = None
        self.finished: list[float] = []
        # A plan has all that the order asks of a `VideoRun`.
        self.order = WorkOrder(cast(VideoRun, plan), barrier=barrier, on_decision=self._decided)

    def _decided(self, seen: Observation, decision: Decision) -> None:
        self.decisions += 1

    def note(self, now: float) -> None:
        """Note the chunks that have finished."""
        self.finished += [now] * len(self.order.finished())
        self.order.ticks_done()


class _Leader:
    """The leader's loop: take results in, begin the work that has been ready longest, or wait for a result."""

    def __init__(self, pipeline: _Pipeline, plans: Sequence[VideoPlan]) -> None:
        self.now = 0.0
        self.videos = [_Video(plan, barrier=pipeline.machine.barrier) for plan in plans]
        self._pipeline, self._running = pipeline, dict(enumerate(self.videos))
        self._returning: deque[tuple[float, int, Work]] = deque()

    def run(self) -> None:
        while self._running:
            while self._returning and self._returning[0][0] <= self.now:
                self._take()
            number = self._first_ready()
            if number is not None:
                video = self._running[number]
                work, video.ready_since = video.order.take(), None
                self.now, back = self._pipeline.send(self.now, work, video.plan.cost(work), number)
                if back is not None:
                    self._returning.append((back, number, work))
            elif self._returning:
                self.now = max(self.now, self._returning[0][0])
                self._take()

    def _take(self) -> None:
        _, number, work = self._returning.popleft()
        self.now += self._pipeline.machine.take
        video = self._running[number]
        video.order.returned(work.item, work.x)
        video.note(self.now)

    def _first_ready(self) -> int | None:
        first, since = None, float("inf")
        for number, video in list(self._running.items()):
            decided = video.decisions
            ready = video.order.ready()
            self.now += (video.decisions - decided) * self._pipeline.machine.decide
            video.note(self.now)
            if not ready:
                if video.order.over:
                    del self._running[number]
                continue
            if video.ready_since is None:
                video.ready_since = self.now
            if video.ready_since < since:
                first, since = number, video.ready_since
        return first


def simulate(videos: Sequence[VideoPlan], machine: Machine) -> Outcome:
    """Make videos, which are all known and begun at the start.

    A `ValueError` says that a pass has times for another number of stages than the machine has.
    """
    for plan in videos:
        for count in {len(plan.cost(work)) for work in plan.work}:
            if count != machine.stages:
                raise ValueError(f"a call has times for {count} stages, the machine has {machine.stages}")
    pipeline = _Pipeline(machine)
    leader = _Leader(pipeline, videos)
    leader.run()
    return Outcome(
        seconds=max(leader.now, *pipeline.free),
        busy=tuple(pipeline.busy),
        chunks=tuple(tuple(video.finished) for video in leader.videos),
        spans=pipeline.spans,
    )
