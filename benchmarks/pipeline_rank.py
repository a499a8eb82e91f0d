"""What each process of the pipeline benchmark does: `python -m benchmarks.pipeline_rank FOLDER`, started once per rank.

With a layout, the ranks are a gang, and the lead makes the videos of each case in turn. Without one, every process
makes them alone, one after another, with the engine of one process; that is what a gang is compared with.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.pipeline_job import Case, ChunkResult, Job, read_job, warm_up, write_results
from benchmarks.pipeline_model import BenchPipeline, build, model_config, requests
from benchmarks.pipeline_timing import TimedExecutor
from engine.engine import Engine
from engine.heap import settle_heap
from engine.record import Recorder
from models.errors import InputError
from models.protocols import CELL_PIXELS
from parallel.comm.messages import HEADER_BYTES
from parallel.health.errors import BAD_INPUT, INTERRUPTED, GangError
from parallel.health.monitor import leave
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.topology.split import stage_range


def make_alone(job: Job, pipeline: BenchPipeline, case: Case) -> ChunkResult:
    """Make a case's videos in this process, one after another."""
    timed = None if job.split is None else TimedExecutor(pipeline.model, job.split)
    engine = Engine(pipeline, case.cache, executor=timed)
    videos, latents, traces, first = [], [], _traces(case), 0.0
    for number, request in enumerate(requests(job, case.videos)):
        began = time.perf_counter()
        made = []
        for chunk in engine.generate(request, trace=traces.get(number)):
            first = first or time.perf_counter() - began
            made.append(chunk.latents)
        videos.append(time.perf_counter() - began)
        latents.append(_digest(made))
    return ChunkResult(
        seconds=sum(videos),
        videos=tuple(videos),
        first_chunk=first,
        latents=tuple(latents),
        decisions=_decisions(traces),
        timing=None if timed is None else timed.timing(sum(videos)),
    )


def _make_on_gang(gang: Gang, job: Job, pipeline: BenchPipeline, case: Case, hop: float = 0.0) -> ChunkResult | None:
    """Make a case's videos with all ranks, all in flight at once; nothing to show for it but on the lead."""
    if not gang.mesh.leads:
        gang.serve(pipeline.stage)
        return None
    traces = _traces(case)
    made: list[list[Tensor]] = [[] for _ in range(case.videos)]
    first = 0.0
    with gang.lead(pipeline, case.cache, barrier=case.barrier) as (engine, reports):
        began = time.perf_counter()
        for one in engine.generate_many(requests(job, case.videos), case.videos, None, traces):
            first = first or time.perf_counter() - began
            made[one.video].append(one.chunk.latents)
        seconds = time.perf_counter() - began
    return ChunkResult(
        seconds=seconds,
        first_chunk=first,
        latents=tuple(_digest(latents) for latents in made),
        decisions=_decisions(traces),
        ranks=tuple(asdict(report) for report in reports.ranks),
        hop=hop,
    )


def _traces(case: Case) -> dict[int, Recorder]:
    """Records of the videos that reuse; without reuse a record would make the lead look at distances."""
    return {number: Recorder() for number in range(case.videos)} if case.reuses else {}


def _decisions(traces: dict[int, Recorder]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    tables = [trace.finish({}).decisions.tolist() for trace in traces.values()]
    return tuple(tuple(tuple(steps) for steps in table) for table in tables)


def _digest(latents: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for one in latents:
        digest.update(one.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _alone(folder: Path, job: Job, rank: int) -> None:
    pipeline, first = build(job.model, decode=job.decode), warm_up(job)
    make_alone(first, pipeline, first.cases[0])
    write_results(folder, rank, [make_alone(job, pipeline, case) for case in job.cases])


def _gang(folder: Path, job: Job, env: RankEnv) -> None:
    assert job.layout is not None
    with open_gang(env, job.layout, trace=job.trace is not None) as gang:
        layers = stage_range(model_config(job.model), gang.mesh)
        with gang.loading():
            pipeline = build(job.model, layers, decode=job.decode and gang.mesh.leads)
        first = warm_up(job)
        _make_on_gang(gang, first, pipeline, first.cases[0])
        hop = _hop(gang, job, pipeline) if job.pings and job.layout.pp > 1 else 0.0
        made = [_make_on_gang(gang, job, pipeline, case, hop) for case in job.cases]
        if gang.mesh.leads:
            write_results(folder, 0, [one for one in made if one is not None])
            if job.trace is not None:
                gang.write_trace(Path(job.trace))


def _hop(gang: Gang, job: Job, pipeline: BenchPipeline) -> float:
    """Seconds of a header and hidden states from the lead to the last stage: half of the median way to and fro."""
    mesh, side = gang.mesh, job.model.side // CELL_PIXELS
    tail = mesh.rank_of(mesh.last_stage, 0)
    if mesh.rank not in (0, tail):
        return 0.0
    tokens = pipeline.model.token_count(pipeline.sampling(job.steps).chunk_width, side, side)
    header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    hidden = torch.zeros(tokens, pipeline.config.model_config.hidden_size)
    found = []
    for _ in range(job.pings):
        began = time.perf_counter()
        for way in (0, 1):
            for tensor in (header, hidden):
                if (mesh.rank == 0) == (way == 0):
                    dist.send(tensor, tail - mesh.rank)
                else:
                    dist.recv(tensor, tail - mesh.rank)
        found.append((time.perf_counter() - began) / 2)
    return statistics.median(found)


def main(folder: Path) -> None:
    """Do this process's part of the job in a folder."""
    env = RankEnv.from_environment()
    if env is None:
        raise InputError("benchmarks.pipeline starts this program: it is of no use alone")
    settle_heap()  # as the command line does
    job = read_job(folder)
    torch.set_num_threads(job.threads)
    try:
        if job.layout is None:
            _alone(folder, job, env.rank)
        else:
            _gang(folder, job, env)
    except GangError as error:
        leave(error.failure.status)
    except KeyboardInterrupt:
        leave(INTERRUPTED)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except InputError as error:
        sys.stderr.write(f"pipeline_rank: error: {error}\n")
        leave(BAD_INPUT)
