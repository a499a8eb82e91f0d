"""Where the time of two stages goes: from what their calls allow, one cost after the other, to what was measured.

The first figures are simulated from what the calls of one process take, with nothing else to do; then from what they
take when all cores are busy with the same; then with messages and the lead's own work. What is left is what ranks cost
each other besides that: threads that want the interpreter, and processes that the system moves about.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.pipeline_job import Case, ChunkResult, Job, TimedCall, Timing, launch
from benchmarks.pipeline_plan import predict, sampling_of
from benchmarks.report import Cell, markdown_table
from engine.video import KVOp, WorkItem
from parallel.comm.messages import HEADER_BYTES, Header, Kind

_HEADERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """What calls take on each stage, for each case."""

    quiet: tuple[Timing, ...]  # in one process
    busy: tuple[Timing, ...]  # in as many processes as there are ranks, at the same time; their mean


def take_timings(job: Job, split: Sequence[int]) -> Timings:
    """Take times of a job's cases in one process, and then in one for each stage at once.

    Raises:
        GangError: a process has failed.
    """
    alone = replace(job, layout=None, split=tuple(split), trace=None, pings=0)
    (quiet,) = launch(alone)
    copies = launch(replace(alone, copies=len(split)))
    busy = [_mean([one[place].timing for one in copies]) for place in range(len(job.cases))]
    return Timings(quiet=tuple(_of(one) for one in quiet), busy=tuple(busy))


def _of(made: ChunkResult) -> Timing:
    assert made.timing is not None
    return made.timing


def _mean(timings: Sequence[Timing | None]) -> Timing:
    """Of the same passes in several processes."""
    whole = [one for one in timings if one is not None]
    calls = []
    for same in zip(*(one.calls for one in whole), strict=True):
        seconds = tuple(statistics.fmean(stage) for stage in zip(*(one.seconds for one in same), strict=True))
        calls.append(TimedCall(name=same[0].name, step=same[0].step, count=same[0].count, seconds=seconds))
    return Timing(
        calls=tuple(calls),
        embed=statistics.fmean(one.embed for one in whole),
        rest=statistics.fmean(one.rest for one in whole),
    )


def profile_table(job: Job, case: Case, timings: tuple[Timing, Timing], made: ChunkResult, alone: ChunkResult) -> str:
    """One case: speed-ups from the bound to what was measured, and stage calls in milliseconds.

    Args:
        job: of the gang.
        case: the videos.
        timings: quiet and busy.
        made: by the gang.
        alone: the same videos, or more, by one process.
    """
    quiet, busy = timings
    decisions = alone.decisions[: case.videos]
    base = sum(alone.videos[: case.videos])
    cells: list[tuple[Cell, ...]] = []
    for name, timing, hop in (
        ("calls alone", quiet, None),
        ("calls with all cores busy", busy, None),
        ("and messages, and the lead's own work", busy, made.hop),
    ):
        outcome = predict(job, case, timing, decisions, hop=hop)
        shares = " ".join(f"{share:.0%}" for share in outcome.utilisation)
        cells.append((name, f"{outcome.seconds:.2f}", f"{base / outcome.seconds:.2f}", shares, _milliseconds(timing)))
    stages = [[r for r in made.ranks if r["stage"] == stage] for stage in range(job.layout.pp if job.layout else 1)]
    shares = " ".join(f"{ranks[0]['busy'] / made.seconds:.0%}" for ranks in stages)
    calls = " ".join(f"{1e3 * ranks[0]['busy'] / ranks[0]['items']:.2f}" for ranks in stages)
    cells.append(("measured", f"{made.seconds:.2f}", f"{base / made.seconds:.2f}", shares, calls))
    return markdown_table(("", "s", "speed-up", "stages busy", "ms of a call, by stage"), cells)


def _milliseconds(timing: Timing) -> str:
    count = sum(call.count for call in timing.calls)
    sums = [sum(c.count * c.seconds[i] for c in timing.calls) for i in range(len(timing.calls[0].seconds))]
    return " ".join(f"{1e3 * one / count:.2f}" for one in sums)


def header_seconds(job: Job, case: Case) -> tuple[float, float, int]:
    """Seconds to write a header of an item and to read it, and the bytes of the item in it."""
    what = sampling_of(job, case).step_passes(0, oldest=False, text_needed=False)[0]
    item = WorkItem(
        request=0,
        tick=9,
        chunk=3,
        step=0,
        chunks_left=5,
        what=what,
        keys_from=0,
        before=(KVOp(kind="enter", chunk=3),),
    )
    header = Header(kind=Kind.ITEM, request=0, item=item, flags=(0, 1, 0))
    buffer = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    began = time.perf_counter()
    for number in range(_HEADERS):
        header.write(buffer, number)
    written = time.perf_counter()
    for _ in range(_HEADERS):
        Header.read(buffer)
    read = time.perf_counter()
    size = len(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
    return (written - began) / _HEADERS, (read - written) / _HEADERS, size
