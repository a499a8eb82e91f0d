"""Where videos are made: one interface for this process, for the ranks that it leads, and for a Ray cluster.

Each backend is given jobs and yields events, which are those of the cluster's controller; so there is one loop. This
file has the first two, and how ranks are started; `ray.py` has the third, since importing Ray takes a second.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from engine.checkpoint.files import CheckpointConfig
from engine.engine import Engine
from engine.progress import Progress
from engine.record import Recorder
from launch.declare import arguments
from launch.ending import CommandFailed, check_signals
from launch.options import Options
from launch.plan import ModelPlan, Plan, layout_of, plan_model
from models.errors import InputError
from models.magi.pipeline import load_pipeline, load_stage
from parallel.cluster.messages import Admitted, ChunkMade, Event, GangReady, Progressed, VideoDone, VideoFailed
from parallel.health.errors import GangError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.spawn import run_ranks, worker_ranks
from parallel.ranks.worker import StageModel
from parallel.topology.split import stage_range
from parallel.trace.counters import RankCounters
from parallel.trace.tracer import Tracer


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A video to make."""

    video: str  # its name in events
    plan: Plan
    recorder: Recorder | None = None  # of its run; not on a Ray cluster
    checkpoint: CheckpointConfig | None = None  # where and how often to note how far it is; on a Ray cluster
    stored: int = 0  # chunks that the caller has already; on a Ray cluster
    priority: int = 0  # higher goes first; on a Ray cluster


class Backend(Protocol):
    """Makes videos."""

    def submit(self, job: Job) -> None:
        """Queue a video; `InputError` if it can never be made here."""

    def cancel(self, video: str) -> None:
        """Make no more of a video; there are no more events of it."""

    def run(self) -> Iterator[Event]:
        """Make what was submitted, and yield what happens; `InputError` if the model cannot make it.

        The first event of a backend that is ready is `GangReady`. A chunk counts as stored when the next event is asked
        for.
        """


def make_videos(backend: Backend, jobs: Iterable[Job], handle: Callable[[Event], None]) -> None:
    """The loop of every command: submit the jobs, and handle what happens until all have ended; errors as in `run`."""
    for job in jobs:
        try:
            backend.submit(job)
        except InputError as error:
            handle(VideoFailed(video=job.video, message=str(error)))
    for event in backend.run():
        check_signals()
        handle(event)


class EngineBackend:
    """An engine's videos, `concurrency` of them at a time; the engine computes here or leads the ranks of a gang.

    The `tracer` takes marks of steps that are reused; it is None on a process without a trace.
    """

    def __init__(self, engine: Engine, concurrency: int, tracer: Tracer | None = None) -> None:
        self._engine, self._concurrency = engine, concurrency
        self.tracer = tracer
        self.counters: Sequence[RankCounters] = ()  # of all ranks, once they are done
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._news: deque[Progressed] = deque()
        self._last: dict[str, Progress] = {}

    def submit(self, job: Job) -> None:
        """Queue a video."""
        self._waiting.append(job)

    def cancel(self, video: str) -> None:
        """Make no more of a video."""
        self._waiting = deque(job for job in self._waiting if job.video != video)
        for number in [number for number, job in self._running.items() if job.video == video]:
            del self._running[number]
            self._engine.cancel(number)

    def run(self) -> Iterator[Event]:
        """Make what was submitted; as `Backend.run`. Videos whose events nobody reads any more are cancelled."""
        yield GangReady()
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._concurrency:
                    yield self._begin(self._waiting.popleft())
                yield from self._step()
        except (GeneratorExit, InputError):
            self._waiting.clear()
            for job in list(self._running.values()):
                self.cancel(job.video)
            raise

    def _begin(self, job: Job) -> Admitted:
        on_progress = partial(self._progressed, job.video)
        number = self._engine.submit(job.plan.request, on_progress=on_progress, recorder=job.recorder)
        self._running[number] = job
        return Admitted(video=job.video, number=number, first=0)

    def _step(self) -> Iterator[Event]:
        made = self._engine.step()
        while self._news:
            yield self._news.popleft()
        for result in made:
            if result.video in self._running and result.chunk.frames is not None:  # else it was cancelled just now
                chunk, video = result.chunk, self._running[result.video].video
                frames, latents = result.chunk.frames.numpy(), chunk.latents.numpy()
                yield ChunkMade(video=video, index=chunk.index, frames=frames, latents=latents)
        for number in [number for number in self._running if not self._engine.running(number)]:
            job = self._running.pop(number)
            last = self._last.pop(job.video)
            yield VideoDone(video=job.video, computed=last.computed_fraction, kv_bytes=last.kv_bytes)

    def _progressed(self, video: str, progress: Progress) -> None:
        self._last[video] = progress
        self._news.append(Progressed(video=video, progress=progress))


@contextmanager
def this_process(model: ModelPlan, concurrency: int) -> Iterator[EngineBackend]:
    """Load a model and make videos with it here; an `InputError` says what is missing or damaged."""
    engine = Engine(load_pipeline(model.config, model.weights, model.loading), reuse=model.reuse, kv=model.kv)
    try:
        yield EngineBackend(engine, concurrency)
    finally:
        engine.close()


@contextmanager
def led_ranks(gang: Gang, model: ModelPlan, options: Options, concurrency: int) -> Iterator[EngineBackend]:
    """Load the first stage's layers and make videos with the ranks of a gang; on the leader.

    Raises:
        InputError: something is missing or damaged.
        GangError: a rank has failed.
    """
    layers = stage_range(model.config, gang.mesh, options.split)
    with gang.loading():
        loading = replace(model.loading, layers=layers, device=str(gang.device))
        pipeline = load_pipeline(model.config, model.weights, loading)
    with gang.lead(pipeline, model.reuse, model.kv) as (engine, counters):
        backend = EngineBackend(engine, concurrency, gang.tracer)
        yield backend
    backend.counters = counters


def serve_stage(gang: Gang, options: Options) -> None:
    """Hold a stage's layers for the leader, on every other rank; errors as in `led_ranks`."""
    plan = plan_model(options)
    layers = stage_range(plan.config, gang.mesh, options.split)
    with gang.loading():
        model = load_stage(plan.config, plan.weights, replace(plan.loading, layers=layers, device=str(gang.device)))
    gang.serve(StageModel(model=model, attention=model.attention))


def start_ranks(given: Sequence[str], options: Options) -> None:
    """Run this command line once for each rank, on this machine, and wait for all; `CommandFailed` if one fails."""
    command = [sys.executable, "-m", "launch", *given]
    try:
        run_ranks(command, layout_of(options), threads=options.threads)
    except GangError as error:
        raise CommandFailed(str(error), status=error.failure.status, shown_here=True) from None


@contextmanager
def started_ranks(options: Options) -> Iterator[Gang]:
    """Start all ranks but the leader on this machine, and join them as the leader; `CommandFailed` if one fails."""
    # A rank that does not lead serves whatever is asked for; it needs a prompt on its command line all the same.
    served = replace(options, prompts=["-"], out=None, record=None, trace=None)
    command = [sys.executable, "-m", "launch", "generate", *arguments(served)]
    with (
        worker_ranks(command, layout_of(options), threads=options.threads) as env,
        join_ranks(env, options, trace=False) as gang,
    ):
        yield gang


@contextmanager
def join_ranks(env: RankEnv, options: Options, *, trace: bool) -> Iterator[Gang]:
    """Join the other ranks; with `trace`, remember what each does when.

    Raises:
        InputError: another number of ranks was started.
        CommandFailed: a rank has failed.
    """
    try:
        with open_gang(env, layout_of(options), trace=trace) as gang:
            yield gang
    except GangError as error:
        mine = not env.launcher_speaks and error.failure.reporter == env.rank
        raise CommandFailed(str(error), status=error.failure.status, shown_here=mine) from None
