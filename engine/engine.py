"""One process makes videos, one request at a time: the order of work, carried out.

The engine puts a request's state, its KV buffers and an executor together. It knows no model in particular and no
other process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.cache import CacheSettings, Decision
from engine.executor import Admission, Executor, LocalExecutor
from engine.kv import Compression, KVBuffer, KVLayout, KVSettings
from engine.noise import NoiseSource, SeededNoise
from engine.record import RunTrace
from engine.request import Prefix, Request
from engine.run import Reuse, VideoRun, VideoShape, Work, clean_capacity
from engine.schedule import Schedule, Tick
from models.attention import Attention
from models.errors import InputError
from models.family import CaptionTable, Sampling, VideoModel

__all__ = ["Autoencoder", "Chunk", "Engine", "Pipeline", "Progress", "allocate_kv"]

_NO_CACHE, _OWN_RANGE = CacheSettings(), KVSettings()
OnProgress = Callable[["Progress"], None]


class Autoencoder(Protocol):
    """Frames to latents and back."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] -> latents [1, C, t, h, w]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [1, C, t, h, w] -> uint8 [F, H, W, 3]."""


class Pipeline(Protocol):
    """A loaded model with all that turns a request into latents and latents into frames."""

    @property
    def model(self) -> VideoModel:
        """The weights."""

    @property
    def autoencoder(self) -> Autoencoder:
        """Frames to latents and back."""

    @property
    def attention(self) -> Attention:
        """What KV views attend with."""

    @property
    def patch_pixels(self) -> int:
        """Pixels of a latent cell's side."""

    def sampling(self, num_steps: int, *, clean_forward: bool, nearly_clean_mix: bool) -> Sampling:
        """How to denoise with that many steps, with or without the passes that reuse may leave out."""

    def captions(self, prompt: str) -> CaptionTable:
        """Encode a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A finished chunk.

    Attributes:
        index: 0 for the first that is handed out.
        latents: [1, C, t, h, w] fp32.
        frames: uint8 [F, H, W, 3].
    """

    index: int
    latents: Tensor
    frames: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Counts of a run so far: passes through the layers, computed chunk-steps, and all chunk-steps."""

    items: int = 0
    computed: int = 0
    steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a video is, after a tick.

    Attributes:
        tick: ticks done.
        ticks: of the whole video.
        chunks_done: finished chunks.
        chunks: of the whole video.
        step: steps done of the oldest chunk.
        num_steps: steps of a chunk.
        items_done: passes through the layers so far.
        computed_fraction: computed chunk-steps as a share of all so far.
        kv_fill: share of the KV buffer's rows in use.
        kv_bytes: size of the KV buffers.
    """

    tick: int
    ticks: int
    chunks_done: int
    chunks: int
    step: int
    num_steps: int
    items_done: int
    computed_fraction: float
    kv_fill: float
    kv_bytes: int

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
        cache: CacheSettings = _NO_CACHE,
        kv: KVSettings = _OWN_RANGE,
        executor: Executor | None = None,
    ) -> None:
        self._pipeline, self._cache, self._kv = pipeline, cache, kv
        self._executor = executor or LocalExecutor(pipeline.model)
        self._requests = 0

    def generate(
        self, request: Request, on_progress: OnProgress | None = None, trace: RunTrace | None = None
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
        prefix = None if request.prefix is None else self._encode_prefix(request.prefix)
        captions = pipeline.captions(request.prompt)
        latents = self.generate_latents(request, captions, prefix, SeededNoise(request.seed), on_progress, trace)
        for index, latent in enumerate(latents):
            yield Chunk(index=index, latents=latent, frames=pipeline.autoencoder.decode(latent))

    def generate_latents(
        self,
        request: Request,
        captions: CaptionTable,
        prefix: Tensor | None,
        noise: NoiseSource,
        on_progress: OnProgress | None = None,
        trace: RunTrace | None = None,
    ) -> Iterator[Tensor]:
        """Make a video's latents [1, C, t, h, w] from what is encoded already; arguments as in `generate`."""
        model, cache = self._pipeline.model, self._cache
        sampling = self._pipeline.sampling(
            request.num_steps, clean_forward=cache.clean_forward, nearly_clean_mix=cache.nearly_clean_mix
        )
        number = self._requests
        self._requests += 1
        run = VideoRun(
            number,
            self._shape(request, sampling, prefix),
            sampling,
            noise,
            Reuse(
                policy=cache.new_policy(),
                memory=cache.new_memory(),
                patches=model.patches,
                observe=trace is not None,
            ),
            prefix=prefix,
            compressed=self._kv.budget is not None,
            device=model.kv.device,
        )
        kv = allocate_kv(run, sampling, self._pipeline, self._kv)
        self._executor.admit(number, Admission(kv=kv, captions=captions, grid=run.grid))
        try:
            yield from self._ticks(run, kv, on_progress, trace)
        finally:
            self._executor.release(number)

    def _shape(self, request: Request, sampling: Sampling, prefix: Tensor | None) -> VideoShape:
        given = 0 if prefix is None else prefix.shape[2]
        return VideoShape(
            channels=self._pipeline.model.latent_channels,
            chunks=math.ceil((request.chunks * sampling.chunk_width + given) / sampling.chunk_width),
            prefix_frames=given,
            height=request.height // self._pipeline.patch_pixels,
            width=request.width // self._pipeline.patch_pixels,
        )

    def _ticks(
        self, run: VideoRun, kv: KVBuffer, on_progress: OnProgress | None, trace: RunTrace | None
    ) -> Iterator[Tensor]:
        schedule = run.schedule
        if trace is not None:
            trace.begin(schedule)
        totals = Totals(items=self._run_all(run.prefix_work()))
        done = 0
        for tick in schedule:
            began, before = time.perf_counter(), totals
            totals = self._tick(run, tick, totals, trace)
            finished = run.end(tick)
            done += finished is not None
            fill = kv.layout.used_rows / kv.layout.capacity
            if trace is not None:
                seconds = time.perf_counter() - began
                trace.ticked(tick.index, seconds=seconds, items=totals.items - before.items, fill=fill)
                if tick.retiring is not None:
                    trace.retired(tick.retiring, kv.kept_shares(tick.retiring + 1).numpy())
            if on_progress is not None:
                on_progress(Progress.of(schedule, tick, done, totals, kv_fill=fill, kv_bytes=kv.nbytes))
            if finished is not None and finished.shape[2]:
                yield finished

    def _tick(self, run: VideoRun, tick: Tick, totals: Totals, trace: RunTrace | None) -> Totals:
        items = self._run_all(run.begin(tick))
        computed = 0
        decided = run.decide(tick)
        for seen, decision in decided:
            if trace is not None:
                trace.decided(seen, decision)
            if decision is not Decision.COMPUTE:
                continue
            work = run.open(tick, seen.chunk, seen.step)
            velocities = [self._executor.run(one) for one in work]
            run.close(seen.chunk, seen.step, [one.item.what for one in work], velocities)
            items += len(work)
            computed += 1
        return Totals(
            items=totals.items + items, computed=totals.computed + computed, steps=totals.steps + len(decided)
        )

    def _run_all(self, work: list[Work]) -> int:
        for one in work:
            self._executor.run(one)
        return len(work)

    @torch.no_grad()
    def _encode_prefix(self, prefix: Prefix) -> Tensor:
        latents = self._pipeline.autoencoder.encode(prefix.frames)
        if not latents.shape[2]:
            count = len(prefix.frames)
            raise InputError(f"a prefix of {count} frames is too short: give one image or 4 frames and more")
        return latents.to(self._pipeline.model.kv.dtype)


def allocate_kv(run: VideoRun, sampling: Sampling, pipeline: Pipeline, settings: KVSettings) -> KVBuffer:
    """The KV buffers of a run, whole."""
    model, budget = pipeline.model, settings.budget
    tokens = model.token_count(*run.grid)
    layout = KVLayout(
        chunk_tokens=tokens,
        clean_tokens=clean_capacity(run.schedule, sampling, budget) * tokens,
        window=sampling.window,
        chunks=run.schedule.chunks,
    )
    compression = None
    if budget is not None:
        compression = Compression(
            settings=settings.selection,
            query_heads=model.kv.query_heads,
            frame_tokens=tokens // sampling.chunk_width,
        )
    return KVBuffer(layout, model.kv, branches=sampling.branches, attention=pipeline.attention, compression=compression)
