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

from engine.cache import CacheSettings
from parallel.failure import FAILED, Failure, GangError
from parallel.local import run_ranks
from parallel.mesh import Layout

__all__ = ["Case", "Job", "Made", "ModelSpec", "TimedCall", "Timing", "launch", "read_job", "warm_up", "write_results"]

_JOB, _RESULT = "job.json", "result.{}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model.

    Attributes:
        name: `random` or `magi-pocket`.
        layers: of a random model.
        width: of a random model.
        side: pixels of a frame's side.
        weights: folder of magi-pocket's weights, in place of those that ship.
    """

    name: str = "random"
    layers: int = 8
    width: int = 384
    side: int = 64
    weights: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Videos to make.

    Attributes:
        videos: how many, with seeds 0, 1, ...; all in flight at once on a gang, one after another in one process.
        cache: which steps are reused.
        barrier: wait for all chunks of a tick before the next.
    """

    videos: int
    cache: CacheSettings
    barrier: bool = False

    @property
    def reuses(self) -> bool:
        """Whether steps may be reused."""
        return self.cache.policy != "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the ranks of one start do.

    Attributes:
        model: loaded once.
        layout: of the gang; None for one process without a gang.
        cases: one after another, after a short video that warms up.
        chunks: of every video.
        steps: of every chunk.
        decode: make frames; latents alone otherwise.
        trace: a file to write what each rank did when to; only on a gang.
        pings: messages to and fro that a hop is measured with; only on a gang.
        split: layers of each stage to take times for; only without a gang.
        copies: processes that do the same at once; only without a gang.
        threads: of each process.
    """

    model: ModelSpec
    layout: Layout | None
    cases: tuple[Case, ...]
    chunks: int
    steps: int
    decode: bool = False
    trace: str | None = None
    pings: int = 0
    split: tuple[int, ...] | None = None
    copies: int = 1
    threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedCall:
    """Mean times of the passes of one name and step.

    Attributes:
        name: of the pass.
        step: of the chunk; None for a pass over a finished chunk.
        count: how many there were.
        seconds: on each stage of the split.
    """

    name: str
    step: int | None
    count: int
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time of one process goes.

    Attributes:
        calls: what passes take, stage by stage, embedding and reading out counted in.
        embed: seconds of one patch embedding.
        rest: seconds per pass outside of calls: decisions and distances, steps, bookkeeping.
    """

    calls: tuple[TimedCall, ...]
    embed: float
    rest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of a case.

    Attributes:
        seconds: from the first video's submission to the last chunk.
        videos: seconds of each video, where one was made after another.
        first_chunk: seconds until the first chunk of the first video.
        latents: a digest for each video.
        decisions: of each video, [chunks][steps] as in a record; nothing where no step may be reused.
        ranks: the reports of all ranks, as plain values.
        hop: seconds of a message with hidden states from one rank to another, if it was measured.
        timing: if wanted.
    """

    seconds: float
    videos: tuple[float, ...] = ()
    first_chunk: float
    latents: tuple[str, ...]
    decisions: tuple[tuple[tuple[int, ...], ...], ...] = ()
    ranks: tuple[dict[str, Any], ...] = ()
    hop: float = 0.0
    timing: Timing | None = None


_JOBS, _MADE = TypeAdapter(Job), TypeAdapter(list[Made])


def launch(job: Job, *, torchrun: bool = False) -> list[list[Made]]:
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


def write_results(folder: Path, rank: int, made: Iterable[Made]) -> None:
    """Leave what came of the cases."""
    path = folder / _RESULT.format(rank)
    part = path.with_suffix(".part")
    part.write_bytes(_MADE.dump_json(list(made)))
    os.replace(part, path)


def warm_up(job: Job) -> Job:
    """A short job on the same model, before those that count."""
    return replace(job, chunks=1, cases=(Case(videos=1, cache=CacheSettings()),))
