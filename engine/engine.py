"""One process makes videos, one request at a time: the order of work, carried out.

The engine puts a request's state, its KV buffers and an executor together. It knows no model in particular and no
other process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from engine.executor import Admission, Executor, LocalExecutor
from engine.kv.buffer import KVBuffer
from engine.kv.size import KVSettings
from engine.noise import NoiseSource
from engine.prepare import Encoded, encode, prepare
from engine.record import Recorder
from engine.request import Request
from engine.reuse.policy import Decision
from engine.reuse.settings import ReuseSettings
from engine.schedule import Schedule, Tick
from engine.video import VideoRun, Work
from models.protocols import CaptionTable, Pipeline

_NO_CACHE, _OWN_RANGE = ReuseSettings(), KVSettings()
OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A finished chunk."""

    index: int  # 0 for the first that is handed out
    latents: Tensor  # [1, C, t, h, w] fp32
    frames: Tensor  # uint8 [F, H, W, 3]


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Counts of a run so far: passes through the layers, computed chunk-steps, and all chunk-steps."""

    items: int = 0
    computed: int = 0
    steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a video is, after a tick."""

    tick: int  # ticks done
    ticks: int  # of the whole video
    chunks_done: int  # finished chunks
    chunks: int  # of the whole video
    step: int  # steps done of the oldest chunk
    num_steps: int  # steps of a chunk
    items_done: int  # passes through the layers so far
    computed_fraction: float  # computed chunk-steps as a share of all so far
    kv_fill: float  # share of the KV buffer's rows in use
    kv_bytes: int  # size of the KV buffers

    @classmethod
    def of(
        cls, schedule: Schedule, tick: Tick, done: int, totals: Totals, *, kv_fill: float, kv_bytes: int
    ) -> Progress:
        """Progress after a tick."""
        return cls(
            tick=tick.index + 1,
            ticks=schedule.ticks,
            chunks_done=done,
            chunks=schedule.chunks - schedule.first,
            step=tick.active[0][1] + 1,
            num_steps=schedule.num_steps,
            items_done=totals.items,
            computed_fraction=totals.computed / max(1, totals.steps),
            kv_fill=kv_fill,
            kv_bytes=kv_bytes,
        )


class Engine:
    """Makes videos with one loaded model.

    Args:
        pipeline: the model.
        cache: which steps are reused.
        kv: how much of the past is held.
        executor: where work is run; by default on the pipeline's model, here.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        cache: ReuseSettings = _NO_CACHE,
        kv: KVSettings = _OWN_RANGE,
        executor: Executor | None = None,
    ) -> None:
        self._pipeline, self._cache, self._kv = pipeline, cache, kv
        self._executor = executor or LocalExecutor(pipeline.model)
        self._requests = 0

    def generate(
        self, request: Request, on_progress: OnProgress | None = None, trace: Recorder | None = None
    ) -> Iterator[Chunk]:
        """Make a video, chunk by chunk.

        Args:
            request: what to make.
            on_progress: called after every tick.
            trace: told what happens, for a record.

        Yields:
            Chunks in order, as soon as each is finished.

        Raises:
            InputError: the model cannot make what is asked for.
        """
        pipeline = self._pipeline
        read = encode(pipeline, request)
        latents = self.generate_latents(request, read.captions, read.prefix, read.noise, on_progress, trace)
        for index, latent in enumerate(latents):
            yield Chunk(index=index, latents=latent, frames=pipeline.autoencoder.decode(latent))

    def generate_latents(
        self,
        request: Request,
        captions: CaptionTable,
        prefix: Tensor | None,
        noise: NoiseSource,
        on_progress: OnProgress | None = None,
        trace: Recorder | None = None,
    ) -> Iterator[Tensor]:
        """Make a video's latents [1, C, t, h, w] from what is encoded already; arguments as in `generate`."""
        number = self._requests
        self._requests += 1
        prepared = prepare(
            self._pipeline,
            request,
            Encoded(captions=captions, prefix=prefix, noise=noise),
            number=number,
            cache=self._cache,
            kv=self._kv,
            observe=trace is not None,
        )
        run, kv = prepared.run, prepared.kv.allocate(self._pipeline.model.kv, self._pipeline.attention)
        self._executor.admit(number, Admission(kv=kv, captions=prepared.captions, grid=run.grid))
        try:
            yield from self._ticks(run, kv, on_progress, trace)
        finally:
            self._executor.release(number)

    def _ticks(
        self, run: VideoRun, kv: KVBuffer, on_progress: OnProgress | None, trace: Recorder | None
    ) -> Iterator[Tensor]:
        schedule = run.schedule
        if trace is not None:
            trace.begin(schedule)
        totals = Totals(items=self._run_all(run.prefix_work(), kv, None))
        done = 0
        for tick in schedule:
            began, before = time.perf_counter(), totals
            totals = self._tick(run, kv, tick, totals, trace)
            run.seal(tick)
            finished = None if tick.finishing is None else run.finish(tick.finishing)
            done += finished is not None
            fill = kv.layout.used_rows / kv.layout.capacity
            if trace is not None:
                seconds = time.perf_counter() - began
                trace.ticked(tick.index, seconds=seconds, items=totals.items - before.items, fill=fill)
            if on_progress is not None:
                on_progress(Progress.of(schedule, tick, done, totals, kv_fill=fill, kv_bytes=kv.nbytes))
            if finished is not None and finished.shape[2]:
                yield finished

    def _tick(self, run: VideoRun, kv: KVBuffer, tick: Tick, totals: Totals, trace: Recorder | None) -> Totals:
        items = self._run_all(run.begin(tick), kv, trace)
        computed = 0
        decided = run.decide(tick)
        for seen, decision in decided:
            if trace is not None:
                trace.decided(seen, decision)
            if decision is not Decision.COMPUTE:
                continue
            work = run.open(tick, seen.chunk, seen.step)
            velocities = [self._run_one(one, kv, trace) for one in work]
            run.close(seen.chunk, seen.step, [one.item.what for one in work], velocities)
            items += len(work)
            computed += 1
        return Totals(
            items=totals.items + items, computed=totals.computed + computed, steps=totals.steps + len(decided)
        )

    def _run_all(self, work: list[Work], kv: KVBuffer, trace: Recorder | None) -> int:
        for one in work:
            self._run_one(one, kv, trace)
        return len(work)

    def _run_one(self, work: Work, kv: KVBuffer, trace: Recorder | None) -> Tensor:
        """Run an item; chunks that retire do so with the first item after it, which may be some ticks later."""
        velocity = self._executor.run(work)
        retired = [op.chunk for op in work.item.before if op.kind == "retire"]
        if trace is not None and retired:
            shares = kv.kept_shares(retired[-1] + 1).numpy()
            for chunk in retired:
                trace.retired(chunk, shares[: chunk + 1])
        return velocity
