"""What ranks are asked to make and what they report back, as plain data that travels in JSON files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from engine.reuse.settings import ReuseSettings
from parallel.health.errors import FAILED, Failure, GangError
from parallel.ranks.spawn import run_ranks
from parallel.topology.mesh import Layout

_JOB, _RESULT = "job.json", "result.{}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model."""

    name: str = "random"  # `random` or `magi-pocket`
    layers: int = 8  # of a random model
    width: int = 384  # of a random model
    side: int = 64  # pixels of a frame's side
    weights: str | None = None  # folder of magi-pocket's weights, in place of those that ship


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Videos to make."""

    videos: int  # how many, with seeds 0, 1, ...; all in flight at once on a gang, one after another in one process
    cache: ReuseSettings  # which steps are reused
    barrier: bool = False  # wait for all chunks of a tick before the next

    @property
    def reuses(self) -> bool:
        """Whether steps may be reused."""
        return self.cache.policy != "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the ranks of one start do."""

    model: ModelSpec  # loaded once
    layout: Layout | None  # of the gang; None for one process without a gang
    cases: tuple[Case, ...]  # one after another, after a short video that warms up
    chunks: int  # of every video
    steps: int  # of every chunk
    decode: bool = False  # make frames; latents alone otherwise
    trace: str | None = None  # a file to write what each rank did when to; only on a gang
    pings: int = 0  # messages to and fro that a hop is measured with; only on a gang
    split: tuple[int, ...] | None = None  # layers of each stage to take times for; only without a gang
    copies: int = 1  # processes that do the same at once; only without a gang
    threads: int = 1  # of each process


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedCall:
    """Mean times of the passes of one name and step."""

    name: str  # of the pass
    step: int | None  # of the chunk; None for a pass over a finished chunk
    count: int  # how many there were
    seconds: tuple[float, ...]  # on each stage of the split


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time of one process goes."""

    calls: tuple[TimedCall, ...]  # what passes take, stage by stage, embedding and reading out counted in
    embed: float  # seconds of one patch embedding
    rest: float  # seconds per pass outside of calls: decisions and distances, steps, bookkeeping


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """What came of a case."""

    seconds: float  # from the first video's submission to the last chunk
    videos: tuple[float, ...] = ()  # seconds of each video, where one was made after another
    first_chunk: float  # seconds until the first chunk of the first video
    latents: tuple[str, ...]  # a digest for each video
    decisions: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Of each video, [chunks][steps] as in a record; nothing where no step may be reused."""
    ranks: tuple[dict[str, Any], ...] = ()  # the reports of all ranks, as plain values
    hop: float = 0.0  # seconds of a message with hidden states from one rank to another, if it was measured
    timing: Timing | None = None  # if wanted


_JOBS, _MADE = TypeAdapter(Job), TypeAdapter(list[ChunkResult])


def launch(job: Job, *, torchrun: bool = False) -> list[list[ChunkResult]]:
    """Start ranks or processes for a job, and wait.

    Args:
        job: what they do.
        torchrun: have torchrun start them, in place of the command line's own launcher.

    Returns:
        For each copy, what came of each case.

    Raises:
        GangError: a rank has failed.
    """
    layout = job.layout or Layout(pp=job.copies)
    with tempfile.TemporaryDirectory(prefix="pipeline-") as name:
        folder = Path(name)
        (folder / _JOB).write_bytes(_JOBS.dump_json(job))
        program = ["-m", "benchmarks.pipeline_rank", name]
        if torchrun:
            _torchrun(program, layout, job.threads)
        else:
            run_ranks([sys.executable, *program], layout, threads=job.threads)
        count = 1 if job.layout is not None else job.copies
        return [_MADE.validate_json((folder / _RESULT.format(rank)).read_bytes()) for rank in range(count)]


def _torchrun(program: list[str], layout: Layout, threads: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={layout.world_size}", *program]
    ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False)
    if ended.returncode:
        message = f"torchrun ended with status {ended.returncode}"
        raise GangError(Failure(message=message, status=FAILED, reporter=-1))


def read_job(folder: Path) -> Job:
    """The job that `launch` left."""
    return _JOBS.validate_json((folder / _JOB).read_bytes())


def write_results(folder: Path, rank: int, made: Iterable[ChunkResult]) -> None:
    """Leave what came of the cases."""
    path = folder / _RESULT.format(rank)
    part = path.with_suffix(".part")
    part.write_bytes(_MADE.dump_json(list(made)))
    os.replace(part, path)


def warm_up(job: Job) -> Job:
    """A short job on the same model, before those that count."""
    return replace(job, chunks=1, cases=(Case(videos=1, cache=ReuseSettings()),))
