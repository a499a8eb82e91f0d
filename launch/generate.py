"""`flowcache generate`: from options to video files, with records of the runs if they are wanted.

It chooses where videos are made (`launch/backends/`) and hands their events to the files and the display; how a video
is denoised is the engine's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from engine.files import atomic_write, write_errors
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from launch.backends import (
    Backend,
    EngineBackend,
    Job,
    join_ranks,
    led_ranks,
    make_videos,
    serve_stage,
    start_ranks,
    this_process,
)
from launch.options import Launcher, Options, together
from launch.output.display import Display
from launch.output.sinks import VideoSinks, rank_line, summary_text
from launch.plan import Plan, layout_of, plan_videos
from models.errors import InputError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang
from parallel.trace.tracer import Tracer

TRACE_FILE = "trace.json"
"""In a record's folder."""


def generate(options: Options, arguments: Sequence[str]) -> str | None:
    """Make the videos, with progress on standard error: here, as a rank, with ranks that are started, or on Ray.

    The `arguments` are those of the command line, for ranks that are started with it.

    Returns:
        What was made and what it cost; None if another process says so.

    Raises:
        InputError: something given cannot be used, or the disk or the GPU is full. There is no file then, unless it is
            the record alone that could not be written.
        CommandFailed: a rank has failed.
    """
    env = RankEnv.from_environment()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _memory_errors(options):
        if options.launcher is Launcher.RAY:
            if env is not None:
                raise InputError("--launcher ray starts the ranks itself: leave torchrun out, or --launcher")
            return _make_on_ray(options)
        if env is not None:
            return _as_rank(options, env)
        if needs_ranks(options):
            plan_videos(options)  # what can be checked is said before ranks are started
            start_ranks(arguments, options)
            return None
        return _make_here(options)


def needs_ranks(options: Options) -> bool:
    """Whether only ranks can do what is asked for: a trace is of ranks, if of one."""
    return layout_of(options).world_size > 1 or options.trace is not None


def _make_here(options: Options) -> str:
    """Make the videos in this process."""
    plans = plan_videos(options)
    text = _make(this_process(plans[0].model, together(options, len(plans))), plans)
    if options.record is not None:
        with write_errors(options.record):
            (options.record / TRACE_FILE).unlink(missing_ok=True)  # of an earlier run, on ranks
    return text


def _make_on_ray(options: Options) -> str:
    """Make the videos on one gang of a Ray cluster."""
    from launch.backends.ray import on_ray

    if options.record is not None or options.trace is not None:
        raise InputError("--record and --trace do not work with --launcher ray: leave it out, or use torchrun")
    plans = plan_videos(options)
    return _make(on_ray(plans), plans)


def _as_rank(options: Options, env: RankEnv) -> str | None:
    """Make the videos as one of the ranks; the leader returns the text."""
    traced = options.trace is not None or options.record is not None
    with join_ranks(env, options, trace=traced) as gang:
        if not gang.mesh.leads:
            serve_stage(gang, options)
            return None
        plans = plan_videos(options)
        text = _make(led_ranks(gang, plans[0].model, options, together(options, len(plans))), plans)
        _write_trace(gang, options)
        return text


def _write_trace(gang: Gang, options: Options) -> None:
    """Write the trace of all ranks to wherever it is wanted."""
    files = [] if options.trace is None else [options.trace]
    if options.record is not None:
        with write_errors(options.record):
            options.record.mkdir(parents=True, exist_ok=True)
        files.insert(0, options.record / TRACE_FILE)
    for path in files[:1]:
        gang.write_trace(path)
    for path in files[1:]:
        with atomic_write(path) as copy:
            copy.write(files[0].read_bytes())


def _make(backend: AbstractContextManager[Backend], plans: Sequence[Plan]) -> str:
    """Open a backend and make the videos with it; says what was made and what it cost."""
    began, options, ranks = time.monotonic(), plans[0].options, layout_of(plans[0].options).world_size
    on = f" on {ranks} ranks (pp {options.pp} x cp {options.cp})" if ranks > 1 else ""
    with Display() as display:
        display.phase(f"loading {plans[0].model.name}{on}")
        with backend as opened:
            made = make_with(opened, plans, display, began)
    counters = opened.counters if isinstance(opened, EngineBackend) else ()
    line = rank_line(options, counters) if counters else None
    return summary_text([replace(one, ranks=line) for one in made.summaries], making=made.making)


def make_with(backend: Backend, plans: Sequence[Plan], display: Display, began: float) -> VideoSinks:
    """Make the videos with an open backend: their files, and records if they are wanted.

    Loading began at `began`, by the monotonic clock.
    """
    tracer = backend.tracer if isinstance(backend, EngineBackend) else None
    recorders = [_recorder(plan, index, tracer) for index, plan in enumerate(plans)]
    numbered = enumerate(zip(plans, recorders, strict=True))
    jobs = [Job(video=str(index), plan=plan, recorder=recorder) for index, (plan, recorder) in numbered]
    with VideoSinks(plans, recorders, display, began) as sinks:
        make_videos(backend, jobs, sinks.handle)
    return sinks


def _recorder(plan: Plan, index: int, tracer: Tracer | None) -> Recorder | None:
    if tracer is not None and tracer.wanted and plan.model.reuse.policy != "none":
        return _MarkingRecorder(tracer, index)
    return None if plan.record is None else Recorder()


class _MarkingRecorder(Recorder):
    """A recorder that also marks the steps that are reused in the trace."""

    def __init__(self, tracer: Tracer, video: int) -> None:
        super().__init__()
        self._tracer, self._video = tracer, video

    def decided(self, seen: Observation, decision: Decision) -> None:
        super().decided(seen, decision)
        if decision is not Decision.COMPUTE:
            self._tracer.mark("reuse", request=self._video, tick=seen.tick, chunk=seen.chunk, step=seen.step)


@contextmanager
def _memory_errors(options: Options) -> Iterator[None]:
    """Say in a line that a GPU is too small."""
    try:
        yield
    except torch.OutOfMemoryError:
        name = options.config or options.model or "the model"
        raise InputError(
            f"{name} does not fit into the GPU's memory: ask for a smaller --height and --width, for a quantised "
            "model, or for more ranks"
        ) from None
