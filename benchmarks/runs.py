"""A run of some videos on a layout: in one process, on the ranks of a gang, on the gangs of a Ray cluster.

Seconds are of denoising, from the submission of the first video to its last chunk, with everything loaded and warm;
every run starts its processes anew, and each has one thread. It knows neither tables nor what is wanted.

`python -m benchmarks.runs FOLDER` is the program of one rank of a gang; `on_ranks` starts it.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor, nn

from benchmarks.common import in_fresh_process, in_fresh_processes, nearest, search
from benchmarks.workload import POCKET, Flags, Made, TimedCall, Timing, Workload, build, digest, model_config
from engine.engine import Engine
from engine.executor import LocalRunner
from engine.files import atomic_write
from engine.machine import settle_heap
from engine.record import Recorder, RunRecord
from engine.request import Request
from engine.reuse.policy import ChunkPolicy, Decision, Observation, ReuseSettings
from engine.video import Work, WorkItem
from launch.plan import POCKET_FIGURES, reuse_preset
from models.attention import Attention
from models.errors import InputError
from models.magi.dit import MagiDiT
from models.magi.pipeline import MagiPipeline
from models.protocols import CELL_PIXELS
from parallel.comm.messages import HEADER_BYTES
from parallel.health.errors import Failure, GangError
from parallel.health.exit_codes import BAD_INPUT, FAILED, INTERRUPTED
from parallel.health.monitor import leave
from parallel.mesh import Layout, stage_range
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.spawn import run_ranks
from parallel.ranks.worker import StageModel

_JOB, _RESULT = "job.json", "result.json"
_WARMUP = 3  # first steps that are computed with reuse
_SHORT, _TRIES, _NEAR = 4, 6, 0.02  # chunks of the videos that a threshold is searched on; how often; how near


# What the ranks of a gang make, one workload after another on one model that is loaded once; and pings, see `on_ranks`.
_JOBS, _RESULTS = TypeAdapter(tuple[Layout, tuple[Workload, ...], int]), TypeAdapter(list[Made])


def alone(workloads: Sequence[Workload], *, split: Sequence[int] | None = None, copies: int = 1) -> list[list[Made]]:
    """Make videos, all of one model, in one process one after another; what came of each workload, for each copy.

    With `split`, take times for stages with that many layers each. Copies are processes that do the same at once.
    """
    return in_fresh_processes(copies, _alone, tuple(workloads), split)


def _alone(workloads: Sequence[Workload], split: Sequence[int] | None) -> list[Made]:
    settle_heap()  # as the command line does
    torch.set_num_threads(1)
    pipeline = build(workloads[0].model)
    make_alone(workloads[0].warm_up, pipeline)
    return [make_alone(workload, pipeline, split) for workload in workloads]


def make_alone(workload: Workload, pipeline: MagiPipeline, split: Sequence[int] | None = None) -> Made:
    """Make videos in this process, one after another."""
    timed = None if split is None else TimedRunner(pipeline.model, pipeline.attention, split)
    engine = Engine(pipeline, timed, reuse=workload.reuse, kv=workload.kv)
    recorders, seconds, latents, first = _recorders(workload), [], [], 0.0
    for number, request in enumerate(workload.requests):
        began = time.perf_counter()
        ((made, waited),) = _make(engine, [request], recorders[number : number + 1])
        seconds.append(time.perf_counter() - began)
        first = first or waited
        latents.append(tuple(digest(one) for one in made))
    engine.close()
    return Made(
        seconds=sum(seconds),
        latents=tuple(latents),
        first_chunk=first,
        videos=tuple(seconds),
        flags=_flags(recorders),
        timing=None if timed is None else timed.timing(sum(seconds)),
    )


def _make(
    engine: Engine, requests: Sequence[Request], recorders: Sequence[Recorder]
) -> list[tuple[list[Tensor], float]]:
    """Make videos, all in flight at once: of each the latents of its chunks, and the seconds until the first one."""
    made: dict[int, tuple[list[Tensor], list[float]]] = {}
    began = time.perf_counter()
    for request, recorder in itertools.zip_longest(requests, recorders):
        made[engine.submit(request, recorder=recorder, decode=False)] = ([], [])
    while engine.in_flight:
        for one in engine.step():
            latents, times = made[one.video]
            latents.append(one.chunk.latents)
            times.append(time.perf_counter() - began)
    return [(latents, times[0]) for latents, times in made.values()]


def _recorders(workload: Workload) -> list[Recorder]:
    """Of the videos that reuse; without reuse a record would make the leader look at distances."""
    return [Recorder() for _ in range(workload.videos)] if workload.reuses else []


def _flags(recorders: Sequence[Recorder]) -> tuple[Flags, ...]:
    return tuple(tuple(map(tuple, recorder.finish({}).flags.tolist())) for recorder in recorders)


def on_ranks(layout: Layout, workloads: Sequence[Workload], *, pings: int = 0, torchrun: bool = False) -> list[Made]:
    """Make videos on a gang of that layout, all of a workload in flight at once; what came of each workload.

    Args:
        layout: of the ranks.
        workloads: all of one model.
        pings: messages to and fro that a hop is measured with.
        torchrun: have torchrun start the ranks, in place of the command line's own launcher.

    Raises:
        GangError: a rank has failed.
    """
    with tempfile.TemporaryDirectory(prefix="gang-") as name:
        folder = Path(name)
        (folder / _JOB).write_bytes(_JOBS.dump_json((layout, tuple(workloads), pings)))
        program = ["-m", "benchmarks.runs", name]
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={layout.world_size}", *program]
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
            layers = stage_range(model_config(first.model), gang.mesh)
            pipeline = build(first.model, layers)
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
    return Made(
        seconds=seconds,
        latents=tuple(tuple(digest(one) for one in latents) for latents, _ in made),
        first_chunk=made[0][1],
        flags=_flags(recorders),
        ranks=tuple(asdict(one) for one in counters),
        hop=hop,
    )


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


class TimedRunner(LocalRunner):
    """Runs a whole model here, and takes times for every stage that its layers will be cut into.

    The clock is read where a stage would begin. What every stage does for itself before its first layer (embedding the
    condition and the text, changing its KV) counts for each of them, as each will do it. `split` says how many of the
    layers each stage will have.
    """

    def __init__(self, model: MagiDiT, attention: Attention, split: Sequence[int]) -> None:
        super().__init__(model, attention)
        self._marks: list[float] = []
        self._seconds: dict[tuple[str, int | None], list[np.ndarray]] = {}  # of each pass, by stage
        self._embed = self._total = 0.0
        self._hooks = [
            model.videodit_blocks.layers[str(start)].register_forward_pre_hook(self._mark)
            for start in (0, *accumulate(split[:-1]))
        ]

    def begin(self, work: Work) -> None:
        """Run an item."""
        self._marks.clear()
        item, stage, began = work.item, self._stage, time.perf_counter()
        patches = stage.embed(work.x)
        embedded = time.perf_counter()
        stage.change(item)
        hidden = stage.forward(item, patches)
        through = ended = time.perf_counter()
        if item.what.weight:
            self._results.append((item, stage.velocity(item, hidden)))
            ended = time.perf_counter()
        self._note(item, embedded - began, embedded, through, ended - through)
        self._total += ended - began

    def timing(self, seconds: float) -> Timing:
        """What was measured; `seconds` is what making the videos took in all."""
        for hook in self._hooks:
            hook.remove()
        calls = [
            TimedCall(name=name, step=step, count=len(taken), seconds=tuple(np.mean(taken, axis=0).tolist()))
            for (name, step), taken in self._seconds.items()
        ]
        passes = sum(call.count for call in calls)
        return Timing(calls=tuple(calls), embed=self._embed / passes, rest=(seconds - self._total) / passes)

    def _mark(self, module: nn.Module, arguments: tuple[object, ...]) -> None:
        self._marks.append(time.perf_counter())

    def _note(self, item: WorkItem, embed: float, began: float, through: float, read_out: float) -> None:
        shared = self._marks[0] - began
        spent = shared + np.diff([*self._marks, through])
        spent[0] += embed
        spent[-1] += read_out
        self._seconds.setdefault((item.what.name, item.step), []).append(spent)
        self._embed += embed


def reuse_for(workload: Workload, fraction: float) -> ReuseSettings:
    """Flowcache: magi-pocket's own, or with a threshold that computes about a share of the steps, if there is one."""
    if workload.model.name == POCKET:
        return reuse_preset("flowcache-slow", POCKET_FIGURES)
    if not _WARMUP / workload.steps < fraction < 1:
        raise InputError(f"--fraction {fraction:g} cannot be had with {_WARMUP} warm-up steps of {workload.steps}")
    reuse = ReuseSettings(
        policy="flowcache", warmup_steps=_WARMUP, reuse="extrapolate", clean_pass=False, copy_pass=False
    )
    return reuse.with_threshold(in_fresh_process(find_threshold, workload, reuse, fraction))


def find_threshold(workload: Workload, reuse: ReuseSettings, fraction: float) -> float:
    """A threshold with which about a share of the chunk-steps is computed, on a short video.

    Where to begin is said by the distances of a video without reuse; with reuse they are different.
    """
    torch.set_num_threads(1)
    pipeline = build(workload.model)
    short = replace(workload, chunks=min(workload.chunks, _SHORT))
    none = ReuseSettings(clean_pass=reuse.clean_pass, copy_pass=reuse.copy_pass)
    changes = _record(replace(short, reuse=none), pipeline).changes
    most = float(np.nansum(changes, axis=1).max())
    estimated = {0.0: math.inf, most: -math.inf}
    start = list(search(lambda one: _computed(changes, one, reuse.warmup_steps), fraction, estimated, tries=40))[-1]

    def measure(threshold: float) -> float:
        return _record(replace(short, reuse=reuse.with_threshold(threshold)), pipeline).computed_fraction

    bounds = {start / 4: math.inf, start * 4: -math.inf}
    return nearest(search(measure, fraction, bounds, tries=_TRIES, near=_NEAR, geometric=True), fraction)


def _record(workload: Workload, pipeline: MagiPipeline) -> RunRecord:
    """Make a video and record it."""
    recorder = Recorder()
    _make(Engine(pipeline, reuse=workload.reuse), workload.requests[:1], [recorder])
    return recorder.finish({})


def _computed(changes: np.ndarray, threshold: float, warmup: int) -> float:
    """Share of the chunk-steps that a policy would compute, on distances [chunks, steps]."""
    seen = [
        Observation(chunk=chunk, step=step, tick=step, last_tick=False, change=change if step else None, scale=1.0)
        for chunk, row in enumerate(changes.tolist())
        for step, change in enumerate(row)
    ]
    return ChunkPolicy(threshold, warmup).decide(seen).count(Decision.COMPUTE) / changes.size


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
