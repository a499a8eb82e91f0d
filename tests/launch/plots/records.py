"""Records of runs that did not happen: a real schedule and real decisions on made-up distances."""

from __future__ import annotations

import numpy as np

from engine.record import Recorder, RunRecord
from engine.reuse.policy import ChunkPolicy, Decision, Observation
from engine.schedule import Schedule, Timetable

SETTINGS = {"prompt": "a red circle moving right", "model": "magi-pocket", "kv_bytes": 12_345_678}


def made_up_record(
    chunks: int = 6,
    *,
    first: int = 0,
    num_steps: int = 16,
    threshold: float = 0.06,
    extrapolate_from: float = 1.0,
    budget: int = 2,
    settings: dict[str, object] = SETTINGS,
) -> RunRecord:
    """A run whose distances rise as the paper's do; of the past, the newest chunks are kept the most."""
    schedule = Schedule(first=first, chunks=chunks, num_steps=num_steps, window=4)
    policy, trace = ChunkPolicy(threshold, 3, extrapolate_from), Recorder()
    trace.begin(Timetable(spans=(schedule,)))
    for tick in schedule:
        seen = [
            Observation(
                chunk=chunk,
                step=step,
                tick=tick.index,
                final=tick.index == schedule.ticks - 1,
                change=(1 + chunk % 3) * 0.006 * np.exp(2.6 * (step / num_steps) ** 2) if step else None,
                scale=1.0 if step else None,
            )
            for chunk, step in tick.active
        ]
        decisions = policy.decide(seen)
        for one, decision in zip(seen, decisions, strict=True):
            trace.decided(one, decision)
        computed = decisions.count(Decision.COMPUTE)
        held = min(tick.active[0][0], budget) + len(tick.active)
        trace.ticked(tick.index, seconds=0.01 * computed, items=computed, fill=held / (budget + 4))
        for gone in tick.retiring:
            trace.retired(gone, _shares(gone + 1, budget))
    return trace.finish(settings)


def _shares(chunks: int, budget: int) -> np.ndarray:
    """At most `budget` in all: half of what is left for each chunk, newest first."""
    if chunks <= budget:
        return np.ones(chunks)
    shares = np.minimum(1.0, budget * 0.5 ** np.arange(1, chunks + 1))
    return np.where(shares < 0.01, 0.0, shares)[::-1]
