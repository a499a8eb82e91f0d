"""From a family's sampling and reuse flags to a plan of calls: which passes each chunk's step is made of.

The passes are those that `engine.video.VideoRun` asks for; what each of them takes is handed in. It also makes flags
where there is no record, from a model of how far a chunk moves from step to step, with the real policy deciding.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from benchmarks.simulate_data import lay_out
from benchmarks.simulation import Call, VideoPlan
from engine.record import NOT_ACTIVE
from engine.reuse.policy import ChunkPolicy, Decision, Observation
from engine.schedule import Schedule, Tick
from models.errors import InputError
from models.protocols import Pass, Sampling

Seconds = Callable[[Pass, int | None], tuple[float, ...]]
"""What a pass takes on each stage; with the chunk's own step, or None for a pass over a finished chunk."""
_JITTER = 0.2
_SEARCHES = 40


def plan_video(
    schedule: Schedule,
    sampling: Sampling,
    seconds: Seconds,
    flags: np.ndarray | None = None,
    *,
    whole_window: bool = False,
) -> VideoPlan:
    """The plan of one video.

    Args:
        schedule: of the video.
        sampling: names the passes.
        seconds: what each of them takes.
        flags: [ticks, chunks], 0 where a step is computed; None computes all.
        whole_window: the reuse policy decides for all chunks of a tick at once.

    Raises:
        InputError: the flags are of another schedule.
    """
    if flags is not None and flags.shape != (schedule.ticks, schedule.chunks):
        wanted = f"{schedule.ticks} ticks of {schedule.chunks} chunks"
        raise InputError(f"reuse flags of {flags.shape[0]} ticks and {flags.shape[1]} chunks do not fit {wanted}")
    made: dict[tuple[Pass, int | None], Call] = {}

    def call(what: Pass, step: int | None) -> Call:
        if (what, step) not in made:
            made[what, step] = Call(seconds=seconds(what, step), returns=bool(what.weight), name=what.name)
        return made[what, step]

    def text_needed(tick: Tick) -> bool:
        return any(sampling.weighs_text(step) for _, step in tick.active)

    def steps(tick: Tick, chunk: int, step: int) -> list[Call]:
        if flags is not None and flags[tick.index, chunk] != Decision.COMPUTE.value:
            return []
        oldest = chunk == tick.active[0][0]
        passes = sampling.step_passes(step, oldest=oldest, text_needed=text_needed(tick))
        return [call(what, step) for what in passes]

    def clean(tick: Tick) -> list[Call]:
        passes = sampling.clean_passes(tick.step_in_quantum, prefix=False, text_needed=text_needed(tick))
        return [call(what, None) for what in passes]

    prefix = [
        call(what, None)
        for _ in range(schedule.first)
        for what in sampling.clean_passes(0, prefix=True, text_needed=False)
    ]
    return lay_out(schedule, steps, clean, renews=sampling.clean_pass, whole_window=whole_window, prefix=prefix)


def recorded_flags(flags: np.ndarray, schedule: Schedule, recorded: Schedule) -> np.ndarray:
    """Flags of a record, repeated or cut to another number of chunks; chunk by chunk and step by step.

    Raises:
        InputError: the record has another number of steps or another window.
    """
    if (recorded.num_steps, recorded.window) != (schedule.num_steps, schedule.window):
        raise InputError(
            f"the record has {recorded.num_steps} steps in a window of {recorded.window}, not {schedule.num_steps} in "
            f"{schedule.window}: give --steps {recorded.num_steps}"
        )
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
    threshold, which is searched for. MAGI-1's steps grow towards the clean end, so the cleanest chunk reuses least.

    Args:
        schedule: of the video.
        sampling: for the sizes of the steps.
        fraction: of chunk-steps to compute.
        warmup: first steps of a chunk that are computed.
        seed: of the variation, which keeps chunks from reusing in step.

    Raises:
        InputError: the warm-up alone computes more than that.
    """
    dice = random.Random(seed)
    moved = {
        (chunk, step): abs(sampling.step_size(step - 1)) * dice.uniform(1 - _JITTER, 1 + _JITTER)
        for tick in schedule
        for chunk, step in tick.active
        if step
    }
    total = (schedule.chunks - schedule.first) * schedule.num_steps
    if not warmup / schedule.num_steps <= fraction <= 1:
        raise InputError(f"a computed share of {fraction:g} cannot be had with {warmup} warm-up steps of a chunk")
    low, high = 0.0, 1.0
    flags = _decide(schedule, moved, high, warmup)
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        flags = _decide(schedule, moved, middle, warmup)
        if (flags == 0).sum() > fraction * total:
            low = middle
        else:
            high = middle
    return flags


def _decide(schedule: Schedule, moved: dict[tuple[int, int], float], threshold: float, warmup: int) -> np.ndarray:
    policy = ChunkPolicy(threshold, warmup)
    flags = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    for tick in schedule:
        last = tick.index == schedule.ticks - 1
        seen = [
            Observation(
                chunk=chunk,
                step=step,
                tick=tick.index,
                last_tick=last,
                change=moved.get((chunk, step)),
                scale=1.0 if step else None,
            )
            for chunk, step in tick.active
        ]
        for one, decision in zip(seen, policy.decide(seen), strict=True):
            flags[tick.index, one.chunk] = decision.value
    return flags
