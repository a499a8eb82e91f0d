"""What a workload must cost, from the schedule and the decisions alone: calls, bytes and flags of every rank; and what
it should take, simulated from what the passes of one process took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common import Cell, columns, markdown_table
from benchmarks.models import model_config
from benchmarks.runs import alone
from benchmarks.simulate.clock import Machine, Outcome, simulate
from benchmarks.simulate.plan import Seconds, VideoPlan, plan_video
from benchmarks.workload import Made, TimedCall, Timing, Workload
from engine.record import NOT_ACTIVE
from engine.reuse.flags import FlagLog
from engine.schedule import Schedule
from models.protocols import CELL_PIXELS, Pass
from parallel.comm.messages import HEADER_BYTES
from parallel.comm.ulysses import TokenSplit
from parallel.topology.mesh import Layout, Mesh

_FLOAT = 4  # bytes of a value
Decisions = Sequence[Sequence[int]]


def chunk_bytes(workload: Workload, layout: Layout) -> tuple[list[int], int]:
    """Bytes of a chunk's hidden states on each cp_rank of a stage, and of its velocity."""
    config, cells = model_config(workload.model), (workload.model.side // CELL_PIXELS) ** 2
    frames, model = config.runtime_config.chunk_width, config.model_config
    split = TokenSplit(frames * cells // model.patch_size**2, layout.cp)
    return [count * model.hidden_size * _FLOAT for count in split.counts], frames * cells * model.in_channels * _FLOAT


def _flags(schedule: Schedule, decisions: Decisions) -> np.ndarray:
    """The decisions of a record by tick."""
    flags = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    for chunk, steps in enumerate(decisions):
        for step, decision in enumerate(steps):
            flags[schedule.tick_of(schedule.first + chunk, step), schedule.first + chunk] = decision
    return flags


def plans_of(workload: Workload, seconds: Seconds, decisions: Sequence[Decisions]) -> list[VideoPlan]:
    """The plan of each video; without decisions every step is computed."""
    schedule, whole = workload.schedule, workload.reuse.new_policy().scope == "window"
    flags = [_flags(schedule, decisions[number]) if decisions else None for number in range(workload.videos)]
    return [plan_video(schedule, workload.sampling, seconds, one, whole_window=whole) for one in flags]


def flag_digest(schedule: Schedule, decisions: Decisions | None) -> str:
    """What every rank's log of flags must end with, as hexadecimal."""
    log = FlagLog(schedule)
    flags = None if decisions is None else _flags(schedule, decisions)
    log.add(0 if flags is None else int(flags[tick.index, chunk]) for tick in schedule for chunk, _ in tick.active)
    return log.digest.hex()


def predict(workload: Workload, timing: Timing, decisions: Sequence[Decisions], *, hop: float | None) -> Outcome:
    """What a pipeline will take, simulated from what one process took.

    Args:
        workload: the videos.
        timing: what passes take on each stage of the pipeline.
        decisions: of each video; empty for computing everything.
        hop: seconds of a message. None counts passes alone: no messages, no work on the leader besides its layers.
    """
    by_step, mean = {(call.name, call.step): call.seconds for call in timing.calls}, timing.means

    def seconds(what: Pass, step: int | None) -> tuple[float, ...]:
        return by_step.get((what.name, step), mean)

    machine = Machine(stages=len(mean), barrier=workload.barrier)
    if hop is not None:
        machine = Machine(stages=len(mean), barrier=workload.barrier, latency=hop, take=timing.rest)
    return simulate(plans_of(workload, seconds, decisions), machine)


def problems(layout: Layout, workload: Workload, made: Made, alone: Made) -> list[str]:
    """What is not as it must be: calls and bytes of every rank, flags, and latents.

    Args:
        layout: of the gang.
        workload: the videos.
        made: by the gang.
        alone: the same videos, or more, by one process.
    """
    decisions = alone.decisions[: workload.videos]
    plans = plans_of(workload, lambda what, step: (1.0,), decisions)
    calls, returning = sum(plan.calls for plan in plans), sum(plan.returning for plan in plans)
    digests = {
        str(n): flag_digest(workload.schedule, decisions[n] if decisions else None) for n in range(workload.videos)
    }
    hidden, velocity = chunk_bytes(workload, layout)
    found = []
    for counters in made.ranks:
        rank = f"rank {counters['rank']}"
        wanted = _item_bytes(hidden, Mesh(layout=layout, rank=counters["rank"]), calls, returning)
        if counters["items"] != calls:
            found.append(f"{rank}: {counters['items']} calls, not {calls}")
        if counters["item_bytes"] != wanted:
            found.append(f"{rank}: {counters['item_bytes']} bytes received with items, not {wanted}")
        if counters["digests"] != digests:
            found.append(f"{rank}: other flags than those of one process")
    velocities = returning * (HEADER_BYTES + velocity) if layout.pp > 1 else 0
    if made.ranks[0]["velocity_bytes"] != velocities:
        found.append(f"rank 0: {made.ranks[0]['velocity_bytes']} bytes of velocities, not {velocities}")
    if layout.cp == 1 and made.latents != alone.latents[: workload.videos]:
        found.append("latents are not those of one process")
    return found


def _item_bytes(hidden: Sequence[int], mesh: Mesh, calls: int, returning: int) -> int:
    """Bytes that a rank receives with items: its tokens, and on the tail those of its stage for reading out."""
    received = 0 if mesh.leads else calls * (HEADER_BYTES + hidden[mesh.cp_rank])
    if mesh.stage == mesh.last_stage and mesh.cp_rank == 0:
        received += returning * sum(HEADER_BYTES + size for size in hidden[1:])
    return received


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """What passes take on each stage, for each workload."""

    quiet: tuple[Timing, ...]  # in one process
    busy: tuple[Timing, ...]  # in as many processes as there are stages, at the same time; their mean


def take_timings(workloads: Sequence[Workload], split: Sequence[int]) -> Timings:
    """Take times of workloads in one process, and then in one for each stage at once."""
    (quiet,) = alone(workloads, split=split)
    copies = alone(workloads, split=split, copies=len(split))
    return Timings(quiet=_timings(quiet), busy=tuple(_mean(same) for same in zip(*map(_timings, copies), strict=True)))


def _timings(made: Sequence[Made]) -> tuple[Timing, ...]:
    return tuple(one.timing for one in made if one.timing is not None)


def _mean(timings: Sequence[Timing]) -> Timing:
    """Of the same passes in several processes."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    calls = []
    for same in zip(*(one.calls for one in timings), strict=True):
        seconds = tuple(mean(stage) for stage in zip(*(one.seconds for one in same), strict=True))
        calls.append(TimedCall(name=same[0].name, step=same[0].step, count=same[0].count, seconds=seconds))
    embed, rest = mean([one.embed for one in timings]), mean([one.rest for one in timings])
    return Timing(calls=tuple(calls), embed=embed, rest=rest)


def profile_table(workload: Workload, quiet: Timing, busy: Timing, made: Made, alone: Made) -> str:
    """Where the time of two stages goes: from what their passes allow, one cost after the other, to what was measured.

    What is left between the last prediction and the measurement is what ranks cost each other besides: threads that
    want the interpreter, and processes that the system moves about.

    Args:
        workload: the videos.
        quiet: times of the passes in one process with nothing else to do.
        busy: the same with all cores busy.
        made: by the gang.
        alone: the same videos, or more, by one process.
    """
    base = sum(alone.videos[: workload.videos])
    rows = []
    for name, timing, hop in (
        ("calls alone", quiet, None),
        ("calls with all cores busy", busy, None),
        ("and messages, and the leader's own work", busy, made.hop),
    ):
        outcome = predict(workload, timing, alone.decisions[: workload.videos], hop=hop)
        rows.append(_profile_row(name, base, outcome.seconds, outcome.utilisation, timing.means))
    stages = [one for one in made.ranks if one["cp_rank"] == 0]
    shares, calls = [one["busy"] / made.seconds for one in stages], [one["busy"] / one["items"] for one in stages]
    rows.append(_profile_row("measured", base, made.seconds, shares, calls))
    return markdown_table(*columns(rows))


def _profile_row(
    name: str, base: float, seconds: float, shares: Sequence[float], calls: Sequence[float]
) -> dict[str, Cell]:
    return {
        "": name,
        "s": f"{seconds:.2f}",
        "speed-up": f"{base / seconds:.2f}",
        "stages busy": " ".join(f"{share:.0%}" for share in shares),
        "ms of a call, by stage": " ".join(f"{1e3 * one:.2f}" for one in calls),
    }
