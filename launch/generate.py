"""Where videos are made, in this process, on the ranks that it leads or on a Ray cluster; and `flowcache generate`.

Each backend is given orders and yields events, which are those of the cluster's controller; so there is one loop. That
controller is opened in `launch/cluster.py`, since importing Ray takes a second. How a video is denoised is the engine's
business.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from engine.engine import Engine
from engine.executor import NotFinite
from engine.files import atomic_write, remove_stale_parts, write_errors
from engine.progress import Progress
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from launch.ending import CommandFailed, check_signals, unwinding_signals
from launch.model.resolve import ModelPlan, layout_of, plan_model
from launch.option_fields import arguments
from launch.options import TRACE_FILE, Options, together
from launch.output.display import Display, rank_line, summary_text
from launch.plan import Plan, plan_videos
from models.attention import backend_name
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import Event, VideoOrder
from parallel.health.exit_codes import NO_OUTPUT
from parallel.health.failure import GangError
from parallel.mesh import Layout, Mesh
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.spawn import run_ranks, worker_ranks
from parallel.trace import RankCounters, Tracer

if TYPE_CHECKING:
    from launch.output.sinks import VideoSinks


class Backend(Protocol):
    """Makes videos."""

    def submit(self, order: VideoOrder) -> None:
        """Queue a video; `InputError` if it can never be made here."""

    def cancel(self, video: str) -> None:
        """Make no more of a video; there are no more events of it."""

    def run(self) -> Generator[Event, None, None]:
        """Make what was submitted, and yield what happens, `GangReady` first; `InputError` if the model cannot make it.

        A chunk counts as stored when the next event is asked for, or when `stored` says so if the order is `confirmed`.
        """

    def stored(self, video: str, count: int) -> None:
        """So many chunks of a video, from its first one on, are in safe hands. May be called by any thread."""


def make_videos(backend: Backend, orders: Iterable[VideoOrder], handle: Callable[[Event], None]) -> None:
    """The loop of every command: submit videos, and handle what happens until all have ended; errors as in `run`."""
    for order in orders:
        try:
            backend.submit(order)
        except InputError as error:
            handle(messages.VideoFailed(video=order.video, message=str(error)))
    with closing(backend.run()) as events:  # after an error, what is under way ends at once
        for event in events:
            check_signals()
            handle(event)


class EngineBackend:
    """A `Backend`: an engine's videos, `concurrency` at a time; the engine computes here or leads the ranks of a gang.

    Size and priority of an order are for a cluster. The `tracer` takes marks of steps that are reused; it is None on a
    process without a trace.
    """

    def __init__(self, engine: Engine, concurrency: int, tracer: Tracer | None = None) -> None:
        self._engine, self._concurrency, self.tracer = engine, concurrency, tracer
        self.counters: Sequence[RankCounters] = ()  # of all ranks, once they are done
        self.recorders: dict[str, Recorder | None] = {}  # for videos that are submitted and recorded
        self._waiting: deque[VideoOrder] = deque()
        self._running: dict[int, str] = {}
        self._stored: dict[str, int] = {}  # chunks that are in safe hands
        self._first: dict[str, int] = {}  # that the caller wants
        self._news: deque[messages.Progressed] = deque()
        self._last: dict[str, Progress] = {}

    def submit(self, order: VideoOrder) -> None:
        self._waiting.append(order)

    def cancel(self, video: str) -> None:
        self._waiting = deque(order for order in self._waiting if order.video != video)
        for number in [number for number, running in self._running.items() if running == video]:
            del self._running[number]
            self._engine.cancel(number)
        self._forget(video)

    def stored(self, video: str, count: int) -> None:
        if video in self._stored:
            self._stored[video] = max(count, self._stored[video])
        self._engine.wake()

    def run(self) -> Generator[Event, None, None]:
        """Make what was submitted; as `Backend.run`. Videos whose events nobody reads any more are cancelled."""
        yield messages.GangReady()
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._concurrency:
                    yield self._begin(self._waiting.popleft())
                yield from self._step()
        except (GeneratorExit, InputError):
            self._waiting.clear()
            self.recorders.clear()
            for video in list(self._running.values()):
                self.cancel(video)
            raise

    def _begin(self, order: VideoOrder) -> messages.Admitted:
        video, on_progress = order.video, partial(self._progressed, order.video)
        found = self._engine.reader.read(order.request, order.checkpoint, stored=order.stored)
        self._stored[video], self._first[video] = order.stored, order.stored
        stored = (lambda: self._stored[video]) if order.confirmed else None
        recorder = self.recorders.pop(video, None)
        number = self._engine.submit(found, on_progress=on_progress, recorder=recorder, stored=stored)
        self._running[number] = video
        return messages.Admitted(video=video, number=number, first=found.first, damage=found.damage)

    def _step(self) -> Iterator[Event]:
        try:
            made = self._engine.step()
        except NotFinite as error:
            video = self._running[error.video]
            self.cancel(video)
            yield messages.VideoFailed(video=video, message=str(error))
            return
        while self._news:
            yield self._news.popleft()
        for result in made:
            if result.video in self._running and result.chunk.frames is not None:  # else it was cancelled just now
                chunk, video = result.chunk, self._running[result.video]
                if chunk.index < self._first[video]:  # the caller has it
                    continue
                frames, latents = result.chunk.frames.numpy(), chunk.latents.numpy()
                yield messages.ChunkMade(video=video, index=chunk.index, frames=frames, latents=latents)
        for number in [number for number in self._running if not self._engine.running(number)]:
            video = self._running.pop(number)
            last = self._last[video]
            self._forget(video)
            computed, kv, on_host = last.computed_fraction, last.kv_bytes, last.kv_host_bytes
            yield messages.VideoDone(video=video, computed=computed, kv_bytes=kv, kv_host_bytes=on_host)

    def _forget(self, video: str) -> None:
        for table in (self._stored, self._first, self._last):
            table.pop(video, None)

    def _progressed(self, video: str, progress: Progress) -> None:
        self._last[video] = progress
        self._news.append(messages.Progressed(video=video, progress=progress))


# ---- this process, and ranks


@contextmanager
def this_process(model: ModelPlan, concurrency: int) -> Iterator[EngineBackend]:
    """Load a model and make videos with it here; an `InputError` says what is missing or damaged."""
    pipeline = model.source.lead(Mesh(layout=Layout(), rank=0), model.device)
    engine = Engine(pipeline, reuse=model.reuse, kv=model.kv, identity=model.source.identity)
    try:
        yield EngineBackend(engine, concurrency)
    finally:
        engine.close()


@contextmanager
def led_ranks(gang: Gang, model: ModelPlan, concurrency: int) -> Iterator[EngineBackend]:
    """Load the first stage's layers and make videos with the ranks of a gang; on the leader. Errors as in `Gang`."""
    with gang.loading():
        pipeline = model.source.lead(gang.mesh, str(gang.device))
    with gang.lead(pipeline, model.reuse, model.kv, identity=model.source.identity) as (engine, counters):
        backend = EngineBackend(engine, concurrency, gang.tracer)
        yield backend
    backend.counters = counters


def serve_stage(gang: Gang, model: ModelPlan) -> None:
    """Hold a stage's layers for the leader, on every other rank; errors as in `led_ranks`."""
    with gang.loading():
        stage = model.source.stage(gang.mesh, str(gang.device))
    gang.serve(stage)


def needs_ranks(options: Options) -> bool:
    """Whether only ranks can do what is asked for: a trace is of ranks, if of one."""
    return layout_of(options).world_size > 1 or options.trace is not None


def start_ranks(given: Sequence[str], options: Options) -> None:
    """Run this command line once for each rank, on this machine, and wait for all; `CommandFailed` if one fails."""
    command = [sys.executable, "-m", "launch", *given]
    try:
        with unwinding_signals():
            run_ranks(command, layout_of(options), threads=options.threads)
    except GangError as error:
        status = error.failure.status  # of lost output rank 0 alone knows, and has said so
        raise CommandFailed(str(error), status=status, shown_here=status != NO_OUTPUT) from None


@contextmanager
def started_ranks(options: Options) -> Iterator[Gang]:
    """Start all ranks but the leader on this machine, and join them as the leader; `CommandFailed` if one fails."""
    # A rank that does not lead serves whatever is asked for; it needs a prompt on its command line all the same.
    served = replace(options, prompts=["-"], out=None, record=None, trace=None)
    command = [sys.executable, "-m", "launch", "generate", *arguments(served)]
    with (
        worker_ranks(command, layout_of(options), threads=options.threads) as env,
        join_ranks(env, options) as gang,
    ):
        yield gang


@contextmanager
def join_ranks(
    env: RankEnv, options: Options, *, trace: bool = False, device: torch.device | None = None
) -> Iterator[Gang]:
    """Join the other ranks, with a `trace` of what each does when; `CommandFailed` if one fails, or a video does."""
    try:
        opened = open_gang(env, layout_of(options), trace=trace, device=device, interface=options.interface)
        with unwinding_signals(), opened as gang:
            try:
                yield gang
            except CommandFailed as ended:
                raise GangError(gang.monitor.fail(str(ended), status=ended.status)) from None
    except GangError as error:
        mine = not env.launcher_speaks and error.failure.reporter == env.rank
        raise CommandFailed(str(error), status=error.failure.status, shown_here=mine) from None


# ---- the command


def generate(options: Options, arguments: Sequence[str]) -> str | None:
    """Make the videos, with progress on standard error: here, as a rank, with ranks that are started, or on Ray.

    The `arguments` are those of the command line, for ranks that are started with it. Gives what was made and what it
    cost; None if another process says so.

    Raises:
        InputError: something given cannot be used, or the disk or the GPU is full. There is no file then, unless it is
            the record alone that could not be written.
        CommandFailed: a rank has failed.
    """
    env = RankEnv.from_environment()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        if options.launcher == "ray":
            if env is not None:
                raise InputError("--launcher ray starts the ranks itself: leave torchrun out, or --launcher")
            return _make_on_ray(options)
        if env is not None:
            return _as_rank(options, env)
        if needs_ranks(options):
            plans = plan_videos(options)  # what can be checked is said before ranks are started
            try:
                start_ranks(arguments, options)
            finally:
                remove_stale_parts(plans[0].out.parent)  # of a rank that was killed
            return None
        return _make_here(options)
    except torch.OutOfMemoryError:
        name = options.config or options.model or "the model"
        raise InputError(
            f"{name} does not fit into the GPU's memory: ask for a smaller --height and --width, for a quantised "
            "model, or for more ranks"
        ) from None


def _make_here(options: Options) -> str:
    plans = plan_videos(options)
    text = _make(this_process(plans[0].model, together(options, len(plans))), plans)
    if options.record is not None:
        with write_errors(options.record):
            (options.record / TRACE_FILE).unlink(missing_ok=True)  # of an earlier run, on ranks
    return text


def _make_on_ray(options: Options) -> str:
    from launch.cluster import on_ray

    if options.record is not None or options.trace is not None:
        raise InputError("--record and --trace do not work with --launcher ray: leave it out, or use torchrun")
    plans = plan_videos(options)
    return _make(on_ray(plans), plans)


def _as_rank(options: Options, env: RankEnv) -> str | None:
    """Make the videos as one of the ranks; the leader returns the text."""
    with join_ranks(env, options, trace=options.trace is not None or options.record is not None) as gang:
        if not gang.mesh.leads:
            serve_stage(gang, plan_model(options))
            return None
        plans = plan_videos(options)
        text = _make(led_ranks(gang, plans[0].model, together(options, len(plans))), plans)
        _write_trace(gang, options)
        return text


def _write_trace(gang: Gang, options: Options) -> None:
    """Write the trace of all ranks to wherever it is wanted."""
    if options.record is None:
        if options.trace is not None:
            gang.write_trace(options.trace)
        return
    with write_errors(options.record):
        options.record.mkdir(parents=True, exist_ok=True)
    gang.write_trace(path := options.record / TRACE_FILE)
    if options.trace is not None:
        with atomic_write(options.trace) as copy:
            copy.write(path.read_bytes())


def _make(backend: AbstractContextManager[Backend], plans: Sequence[Plan]) -> str:
    """Open a backend and make the videos with it; says what was made and what it cost."""
    began, options, model = time.monotonic(), plans[0].options, plans[0].model
    ranks = layout_of(options).world_size
    on = f" on {ranks} ranks (pp {options.pp} x cp {options.cp})" if ranks > 1 else ""
    with Display() as display:
        display.phase(f"loading {model.name}{on}, {model.device}, attention by {backend_name(options.attention)}")
        with backend as opened, unwinding_signals():
            made = make_with(opened, plans, display, began)
    counters = opened.counters if isinstance(opened, EngineBackend) else ()
    return summary_text(made.summaries, making=made.making, ranks=rank_line(options, counters) if counters else None)


def make_with(backend: Backend, plans: Sequence[Plan], display: Display, began: float) -> VideoSinks:
    """Make the videos with an open backend: their files, and records if they are wanted.

    Loading began at `began`, by the monotonic clock.
    """
    from launch.output.sinks import VideoSinks  # files alone need PyAV

    tracer = backend.tracer if isinstance(backend, EngineBackend) else None
    recorders = [_recorder(plan, index, tracer) for index, plan in enumerate(plans)]
    if isinstance(backend, EngineBackend):
        backend.recorders = {str(index): recorder for index, recorder in enumerate(recorders)}
    with VideoSinks(plans, recorders, display, began, backend.stored) as sinks:
        make_videos(backend, sinks.orders(), sinks.handle)
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
