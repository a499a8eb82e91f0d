"""The work of one video, pass by pass, and what the passes take: what the simulation replays.

The passes are asked of a real `VideoRun` on latents of one cell, with the decisions given as flags; so nothing about
them is written a second time here. Flags come from a record, or from a model of how far a chunk moves from step to
step, with the real policy deciding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from benchmarks.common import search
from engine.record import NOT_ACTIVE
from engine.reuse.policy import ChunkPolicy, Decision, Observation, Policy, ReuseMemory
from engine.schedule import Schedule, Tick
from engine.video import Reuse, VideoRun, VideoShape, Work
from models.errors import InputError
from models.protocols import Pass, Sampling

Seconds = Callable[[Pass, int | None], tuple[float, ...]]
"""What a pass takes on each stage; with the chunk's own step, or None for a pass over a finished chunk. It may depend
on the pass by its name alone."""
_JITTER, _HALVINGS = 0.2, 40


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """One video as a plan, and what each pass takes.

    It looks like a `VideoRun` to `WorkOrder`, and gives out what it holds: no tensor is computed.
    """

    schedule: Schedule
    seconds: Seconds
    renews: bool  # the KV of a finished chunk is renewed
    whole_window: bool  # all chunks of a tick are decided at once
    prefix: tuple[Work, ...]  # passes over the chunks that are given
    clean: Mapping[int, tuple[Work, ...]]  # by tick: passes that renew the KV of the chunk that retires
    decided: Mapping[tuple[int, int], tuple[Observation, Decision]]  # by (tick, chunk)
    steps: Mapping[tuple[int, int], tuple[Work, ...]]  # by (tick, chunk): passes of a step; none if it is reused
    _known: dict[tuple[str, int | None], tuple[float, ...]] = field(default_factory=dict)

    def cost(self, work: Work) -> tuple[float, ...]:
        """Seconds of a pass on each stage."""
        key = work.item.what.name, work.item.step
        if key not in self._known:
            self._known[key] = self.seconds(work.item.what, work.item.step)
        return self._known[key]

    def timed(self, seconds: Seconds) -> VideoPlan:
        """The same work with other times."""
        return replace(self, seconds=seconds, _known={})

    def prefix_work(self) -> list[Work]:
        """Passes over the chunks that are given."""
        return list(self.prefix)

    def begin(self, tick: Tick) -> list[Work]:
        """The clean passes of a tick."""
        return list(self.clean[tick.index])

    def decide(self, tick: Tick, chunks: Sequence[int]) -> list[tuple[Observation, Decision]]:
        """What was decided for some of a tick's chunks."""
        return [self.decided[tick.index, chunk] for chunk in chunks]

    def open(self, tick: Tick, chunk: int, step: int) -> list[Work]:
        """The passes of a step."""
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
        groups = [self.prefix, *self.clean.values(), *self.steps.values()]
        return [one for group in groups for one in group]

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
        """What stands in the flags."""
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
    prefix = tuple(run.prefix_work())
    for tick in schedule:
        clean[tick.index] = tuple(run.begin(tick))
        for seen, decision in run.decide(tick):
            decided[tick.index, seen.chunk] = seen, decision
            if decision is Decision.COMPUTE:
                work = steps[tick.index, seen.chunk] = tuple(run.open(tick, seen.chunk, seen.step))
                run.close(seen.chunk, seen.step, [one.item.what for one in work], [one.x for one in work])
        run.seal(tick)
        if tick.finishing is not None:
            run.finish(tick.finishing)
    return VideoPlan(
        schedule=schedule,
        seconds=seconds,
        renews=run.renews,
        whole_window=run.whole_window,
        prefix=prefix,
        clean=clean,
        decided=decided,
        steps=steps,
    )


def _run(schedule: Schedule, sampling: Sampling, policy: _FlagPolicy) -> VideoRun:
    """A real run with one cell in each latent frame."""
    given = schedule.first * sampling.chunk_width
    shape = VideoShape(channels=1, chunks=schedule.chunks, prefix_frames=given, height=1, width=1)
    reuse = Reuse(policy=policy, memory=ReuseMemory("residual"), patches=lambda x: x, observe=False)
    prefix = torch.zeros(1, 1, given, 1, 1) if given else None
    cpu = torch.device("cpu")
    return VideoRun(
        0, shape, sampling, lambda _, size: torch.zeros(size), reuse, prefix=prefix, compressed=False, device=cpu
    )


def recorded_flags(flags: np.ndarray, schedule: Schedule, recorded: Schedule) -> np.ndarray:
    """Flags of a record, repeated or cut to another number of chunks; chunk by chunk and step by step."""
    if (recorded.num_steps, recorded.window) != (schedule.num_steps, schedule.window):
        has = f"the record has {recorded.num_steps} steps in a window of {recorded.window}"
        wanted = f"{schedule.num_steps} in {schedule.window}"
        raise InputError(f"{has}, not {wanted}: give --steps {recorded.num_steps}")
    made = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    count = recorded.chunks - recorded.first
    for tick in schedule:
        for chunk, step in tick.active:
            source = recorded.first + (chunk - schedule.first) % count
            made[tick.index, chunk] = flags[recorded.tick_of(source, step), source]
    return made


def modelled_flags(
    schedule: Schedule, sampling: Sampling, *, fraction: float, warmup: int, seed: int = 0
) -> np.ndarray:
    """Flags in which a given share of the chunk-steps is computed.

    A chunk moves from step to step by the step's size, give or take a fifth, and FlowCache's policy sums that up to a
    threshold, which is searched for. MAGI-1's steps grow towards the clean end, so the cleanest chunk reuses least. The
    variation, of a seed, keeps chunks from reusing in step. A warm-up that alone computes more is an `InputError`.
    """
    dice, seen = random.Random(seed), []
    for tick in schedule:
        for chunk, step in tick.active:
            last, moved = tick.index == schedule.ticks - 1, None
            if step:
                moved = abs(sampling.step_size(step - 1)) * dice.uniform(1 - _JITTER, 1 + _JITTER)
            one = Observation(
                chunk=chunk, step=step, tick=tick.index, last_tick=last, change=moved, scale=1.0 if step else None
            )
            seen.append(one)
    if not warmup / schedule.num_steps <= fraction <= 1:
        raise InputError(f"a computed share of {fraction:g} cannot be had with {warmup} warm-up steps of a chunk")

    def computed(threshold: float) -> float:
        return float(ChunkPolicy(threshold, warmup).decide(seen).count(Decision.COMPUTE))

    known = search(computed, fraction * len(seen), {0.0: math.inf, 1.0: -math.inf}, tries=_HALVINGS)
    threshold = list(known)[-1]  # the last one, within rounding where the share jumps
    flags = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    for one, decision in zip(seen, ChunkPolicy(threshold, warmup).decide(seen), strict=True):
        flags[one.tick, one.chunk] = decision.value
    return flags
