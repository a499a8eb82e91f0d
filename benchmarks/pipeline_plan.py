"""What a case must cost, from the schedule and the decisions alone: calls, bytes, flags, and a plan in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.pipeline_job import Case, ChunkResult, Job, Timing
from benchmarks.pipeline_model import model_config
from benchmarks.simulate_plan import Seconds, plan_video
from benchmarks.simulation import Machine, Outcome, VideoPlan, simulate
from engine.record import NOT_ACTIVE
from engine.reuse.flags import FlagLog
from engine.schedule import Schedule
from models.magi.sampling import MagiSampling
from models.protocols import Pass
from parallel.comm.messages import HEADER_BYTES
from parallel.comm.ulysses import TokenSplit
from parallel.topology.mesh import Layout, Mesh

_FLOAT = 4
_PIXELS = 8
Decisions = Sequence[Sequence[int]]


def sampling_of(job: Job, case: Case) -> MagiSampling:
    """How a case is denoised."""
    cache = case.cache
    return MagiSampling(
        config=model_config(job.model),
        num_steps=job.steps,
        clean_pass=cache.clean_pass,
        copy_pass=cache.copy_pass,
    )


def schedule_of(job: Job) -> Schedule:
    """Of every video of a job."""
    window = model_config(job.model).runtime_config.window_size
    return Schedule(first=0, chunks=job.chunks, num_steps=job.steps, window=window)


def chunk_bytes(job: Job) -> tuple[list[int], int]:
    """Bytes of a chunk's hidden states on each cp_rank of a stage, and of its velocity."""
    config, cells = model_config(job.model), (job.model.side // _PIXELS) ** 2
    frames, model = config.runtime_config.chunk_width, config.model_config
    split = TokenSplit(frames * cells // model.patch_size**2, 1 if job.layout is None else job.layout.cp)
    return [count * model.hidden_size * _FLOAT for count in split.counts], frames * cells * model.in_channels * _FLOAT


def flags_of(schedule: Schedule, decisions: Decisions) -> np.ndarray:
    """The decisions of a record by tick."""
    flags = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    for chunk, steps in enumerate(decisions):
        for step, decision in enumerate(steps):
            flags[schedule.tick_of(schedule.first + chunk, step), schedule.first + chunk] = decision
    return flags


def plan_of(job: Job, case: Case, seconds: Seconds, decisions: Decisions | None) -> VideoPlan:
    """The plan of one video of a case; without decisions every step is computed."""
    schedule = schedule_of(job)
    flags = None if decisions is None else flags_of(schedule, decisions)
    return plan_video(
        schedule, sampling_of(job, case), seconds, flags, whole_window=case.cache.new_policy().scope == "window"
    )


def flag_digest(job: Job, decisions: Decisions | None) -> str:
    """What every rank's log of flags must end with, as hexadecimal."""
    schedule = schedule_of(job)
    log = FlagLog(schedule)
    flags = None if decisions is None else flags_of(schedule, decisions)
    log.add(0 if flags is None else int(flags[tick.index, chunk]) for tick in schedule for chunk, _ in tick.active)
    return log.digest.hex()


def predict(job: Job, case: Case, timing: Timing, decisions: Sequence[Decisions], *, hop: float | None) -> Outcome:
    """What a pipeline will take, simulated from what one process took.

    Args:
        job: the size of the videos.
        case: the videos.
        timing: what calls take on each stage of the pipeline.
        decisions: of each video; empty for computing everything.
        hop: seconds of a message. None counts calls alone: no messages, no work on the head besides its layers.
    """
    by_step = {(call.name, call.step): call.seconds for call in timing.calls}
    count = sum(call.count for call in timing.calls)
    mean = tuple(
        sum(call.count * call.seconds[stage] for call in timing.calls) / count
        for stage in range(len(timing.calls[0].seconds))
    )

    def seconds(what: Pass, step: int | None) -> tuple[float, ...]:
        return by_step.get((what.name, step), mean)

    plans = [plan_of(job, case, seconds, decisions[number] if decisions else None) for number in range(case.videos)]
    machine = Machine(stages=len(mean), barrier=case.barrier)
    if hop is not None:
        machine = Machine(stages=len(mean), barrier=case.barrier, latency=hop, take=timing.rest)
    return simulate(plans, machine)


def problems(job: Job, case: Case, made: ChunkResult, alone: ChunkResult) -> list[str]:
    """What is not as it must be: calls and bytes of every rank, flags, and latents.

    Args:
        job: what the gang was asked for.
        case: the videos.
        made: by the gang.
        alone: the same videos, or more, by one process.
    """
    assert job.layout is not None
    decisions = alone.decisions[: case.videos]
    plans = [
        plan_of(job, case, lambda what, step: (1.0,), decisions[number] if decisions else None)
        for number in range(case.videos)
    ]
    calls, returning = sum(plan.calls for plan in plans), sum(plan.returning for plan in plans)
    digests = {str(n): flag_digest(job, decisions[n] if decisions else None) for n in range(case.videos)}
    found = []
    for report in made.ranks:
        rank = f"rank {report['rank']}"
        wanted = _item_bytes(job, job.layout, report["rank"], calls, returning)
        if report["items"] != calls:
            found.append(f"{rank}: {report['items']} calls, not {calls}")
        if report["item_bytes"] != wanted:
            found.append(f"{rank}: {report['item_bytes']} bytes received with items, not {wanted}")
        if report["digests"] != digests:
            found.append(f"{rank}: other flags than those of one process")
    velocities = returning * (HEADER_BYTES + chunk_bytes(job)[1]) if job.layout.pp > 1 else 0
    if made.ranks[0]["velocity_bytes"] != velocities:
        found.append(f"rank 0: {made.ranks[0]['velocity_bytes']} bytes of velocities, not {velocities}")
    if job.layout.cp == 1 and made.latents != alone.latents[: case.videos]:
        found.append("latents are not those of one process")
    return found


def _item_bytes(job: Job, layout: Layout, rank: int, calls: int, returning: int) -> int:
    """Bytes that a rank receives with items: its tokens, and on the tail those of the other slots for reading out."""
    mesh, hidden = Mesh(layout=layout, rank=rank), chunk_bytes(job)[0]
    received = 0 if mesh.leads else calls * (HEADER_BYTES + hidden[mesh.cp_rank])
    if mesh.stage == mesh.last_stage and mesh.cp_rank == 0:
        received += returning * sum(HEADER_BYTES + size for size in hidden[1:])
    return received
