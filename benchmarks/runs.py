"""A run of some videos, in one process or on the ranks of a gang; `benchmarks.cluster` has those of a Ray cluster.

Seconds are of denoising, from the submission of the first video to its last chunk, with everything loaded and warm;
every run starts its processes anew, and each has one thread. It knows neither tables nor what is wanted.

`python -m benchmarks.runs FOLDER` is the program of one rank of a gang; `on_ranks` starts it.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.common import in_fresh_process, torchrun_command
from benchmarks.workload import POCKET, Flags, Made, ModelSpec, Workload, build, digest, model_config, pocket_reuse
from engine.engine import Engine
from engine.executor import LocalRunner
from engine.files import atomic_write
from engine.machine import settle_heap
from engine.record import Recorder
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from models.magi.pipeline import MagiPipeline
from models.protocols import CELL_PIXELS
from parallel.comm.messages import HEADER_BYTES
from parallel.health.exit_codes import BAD_INPUT, FAILED, INTERRUPTED
from parallel.health.failure import Failure, GangError
from parallel.health.monitor import leave
from parallel.mesh import Layout
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.spawn import run_ranks
from parallel.ranks.worker import StageModel
from parallel.split import stage_range

_JOB, _RESULT = "job.json", "result.json"

# What the ranks of a gang make, one workload after another on one model that is loaded once; and pings, see `on_ranks`.
_JOBS, _RESULTS = TypeAdapter(tuple[Layout, tuple[Workload, ...], int]), TypeAdapter(list[Made])


def alone(workloads: Sequence[Workload]) -> list[Made]:
    """Make videos, all of one model, in one process one after another; what came of each workload."""
    return in_fresh_process(_alone, tuple(workloads))


def _alone(workloads: Sequence[Workload]) -> list[Made]:
    pipeline = pipeline_here(workloads[0])
    return [make_alone(workload, pipeline) for workload in workloads]


def pipeline_here(workload: Workload) -> MagiPipeline:
    """Load a workload's model in a process that is there for it, and make a short video."""
    settle_heap()  # as the command line does
    torch.set_num_threads(1)
    pipeline = build(workload.model)
    make_alone(workload.warm_up, pipeline)
    return pipeline


def make_alone(workload: Workload, pipeline: MagiPipeline, runner: LocalRunner | None = None) -> Made:
    """Make videos in this process, one after another."""
    engine = Engine(pipeline, runner, reuse=workload.reuse, kv=workload.kv)
    recorders, seconds, latents = _recorders(workload), [], []
    for number, request in enumerate(workload.requests):
        began = time.perf_counter()
        latents += _make(engine, [request], recorders[number : number + 1])
        seconds.append(time.perf_counter() - began)
    engine.close()
    return Made(seconds=sum(seconds), latents=_digests(latents), videos=tuple(seconds), flags=_flags(recorders))


def _make(engine: Engine, requests: Sequence[Request], recorders: Sequence[Recorder]) -> list[list[Tensor]]:
    """Make videos, all in flight at once: of each the latents of its chunks."""
    made: dict[int, list[Tensor]] = {}
    for request, recorder in itertools.zip_longest(requests, recorders):
        made[engine.submit(request, recorder=recorder, decode=False)] = []
    while engine.in_flight:
        for one in engine.step():
            made[one.video].append(one.chunk.latents)
    return list(made.values())


def _digests(latents: Iterable[Iterable[Tensor]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(digest(chunk) for chunk in video) for video in latents)


def _recorders(workload: Workload) -> list[Recorder]:
    """Of the videos that reuse; without reuse a record would make the leader look at distances."""
    return [Recorder() for _ in range(workload.videos)] if workload.reuses else []


def _flags(recorders: Sequence[Recorder]) -> tuple[Flags, ...]:
    return tuple(tuple(map(tuple, recorder.finish({}).flags.tolist())) for recorder in recorders)


def on_ranks(layout: Layout, workloads: Sequence[Workload], *, pings: int = 0, torchrun: bool = False) -> list[Made]:
    """Make videos on a gang of that layout, all of a workload in flight at once; what came of each workload.

    The workloads are all of one model. `pings` messages to and fro measure a hop. With `torchrun`, that starts the
    ranks, in place of the command line's own launcher. A `GangError` says that a rank has failed.
    """
    with tempfile.TemporaryDirectory(prefix="gang-") as name:
        folder = Path(name)
        (folder / _JOB).write_bytes(_JOBS.dump_json((layout, tuple(workloads), pings)))
        program = ["-m", "benchmarks.runs", name]
        if torchrun:
            command = [*torchrun_command(layout.world_size), *program]
            status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
            if status:
                raise GangError(Failure(message=f"torchrun ended with status {status}", status=FAILED, reporter=-1))
        else:
            run_ranks([sys.executable, *program], layout, threads=1)
        return _RESULTS.validate_json((folder / _RESULT).read_bytes())


def _serve(folder: Path, env: RankEnv) -> None:
    """Do this rank's part of the job in a folder."""
    layout, workloads, pings = _JOBS.validate_json((folder / _JOB).read_bytes())
    first = workloads[0]
    with open_gang(env, layout) as gang:
        with gang.loading():
            pipeline = build(first.model, stage_range(model_config(first.model), gang.mesh))
        _make_on_gang(gang, first.warm_up, pipeline)
        hop = _hop(gang, pings, first, pipeline) if pings and layout.pp > 1 else 0.0
        made = [_make_on_gang(gang, workload, pipeline, hop) for workload in workloads]
        if gang.mesh.leads:
            with atomic_write(folder / _RESULT) as file:
                file.write(_RESULTS.dump_json([one for one in made if one is not None]))


def _make_on_gang(gang: Gang, workload: Workload, pipeline: MagiPipeline, hop: float = 0.0) -> Made | None:
    """Make videos with all ranks; what came of them is on the leader."""
    if not gang.mesh.leads:
        gang.serve(StageModel(model=pipeline.model, attention=pipeline.attention))
        return None
    recorders = _recorders(workload)
    with gang.lead(pipeline, workload.reuse, workload.kv, barrier=workload.barrier) as (engine, counters):
        began = time.perf_counter()
        made = _make(engine, workload.requests, recorders)
        seconds = time.perf_counter() - began
    return Made(seconds=seconds, latents=_digests(made), flags=_flags(recorders), ranks=tuple(counters), hop=hop)


def _hop(gang: Gang, pings: int, workload: Workload, pipeline: MagiPipeline) -> float:
    """Seconds of a header and hidden states from the leader to the last stage: half of the median way to and fro."""
    mesh, side = gang.mesh, workload.model.side // CELL_PIXELS
    tail = mesh.rank_of(mesh.last_stage, 0)
    if mesh.rank not in (0, tail):
        return 0.0
    tokens = pipeline.model.token_count(workload.sampling.chunk_width, side, side)
    header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    hidden = torch.zeros(tokens, pipeline.config.model_config.hidden_size)
    found = []
    for _ in range(pings):
        began = time.perf_counter()
        for way in (0, 1):
            for tensor in (header, hidden):
                if (mesh.rank == 0) == (way == 0):
                    dist.send(tensor, tail - mesh.rank)
                else:
                    dist.recv(tensor, tail - mesh.rank)
        found.append((time.perf_counter() - began) / 2)
    return statistics.median(found)


def reuse_for(spec: ModelSpec) -> ReuseSettings:
    """Flowcache: magi-pocket's own, or with a threshold that computes about half of the steps of random weights."""
    if spec.name == POCKET:
        return pocket_reuse("flowcache-slow")
    passes = ReuseSettings(clean_pass=False, copy_pass=False, reuse="extrapolate")
    return replace(passes, policy="flowcache", warmup_steps=3, threshold=spec.threshold)


def main(folder: Path) -> None:
    """Be one rank of the gang that `on_ranks` has started."""
    try:
        env = RankEnv.from_environment()
        if env is None:
            raise InputError("another benchmark starts this program: it is of no use alone")
        settle_heap()  # as the command line does
        torch.set_num_threads(1)
        _serve(folder, env)
    except InputError as error:
        sys.stderr.write(f"runs: error: {error}\n")
        leave(BAD_INPUT)
    except GangError as error:
        leave(error.failure.status)
    except KeyboardInterrupt:
        leave(INTERRUPTED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
