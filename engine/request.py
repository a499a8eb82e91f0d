"""One video, from what a person asks for to a run: checked, encoded once, and with the sizes that follow from it.

Requests check themselves; nothing else in the engine checks them again. It knows what a loaded model offers
(`Pipeline`), and not how or where the run is carried out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.kv.layout import KVPlan, KVSettings, plan_kv
from engine.reuse.policy import CONDITION, DISTANCES, ReuseSettings
from engine.schedule import Schedule, Timetable
from engine.video import Noise, Reuse, VideoRun, VideoShape, seeded_noise
from models.errors import InputError
from models.protocols import CELL_FRAMES, CELL_PIXELS, Adjustable, CaptionTable, PassCondition, Pipeline, Sampling

_SIZE_STEP = 2 * CELL_PIXELS  # a token is a patch of 2 x 2 cells


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One video to make; an InputError if a value cannot be used."""

    prompt: str  # what it shows
    script: tuple[tuple[int, str], ...] = ()
    """Prompts that take its place, each with the first chunk that is made of it, in order; the prefix not counted."""
    chunks: int  # length in chunks of 24 frames, the prefix not counted
    height: int  # pixels, a multiple of 16
    width: int  # pixels, a multiple of 16
    num_steps: int  # denoising steps of a chunk; must divide into the model's window
    seed: int  # of the noise
    prefix: Tensor | None = None
    """Frames that the video goes on from, uint8 [F, H, W, 3]: one for image to video, more for video to video."""
    end: Tensor | None = None  # frame that it ends with, [1, H, W, 3] likewise
    fps: int | None = None  # frames per second; None for those of the loaded model, likewise
    negative: str | None = None  # what it is not to show

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("the prompt is empty: say what the video shows")
        starts = [0, *(first for first, _ in self.script)]
        if sorted(set(starts)) != starts or not all(prompt.strip() for _, prompt in self.script):
            raise InputError("prompts of later chunks must not be empty, and each begins after the one before it")
        if self.chunks < 1:
            raise InputError(f"a video of {self.chunks} chunks has no frames: ask for 1 or more")
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels < _SIZE_STEP or pixels % _SIZE_STEP:
                raise InputError(f"the {name} of {pixels} pixels is not a multiple of {_SIZE_STEP}")
        if self.num_steps < 1:
            raise InputError(f"{self.num_steps} denoising steps make no video")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"the seed {self.seed} is not between 0 and 2^63 - 1")
        for frames in (self.prefix, self.end):
            if frames is not None:
                self._check_prefix(frames)

    def with_prompt(self, first: int, prompt: str) -> Request:
        """The same with another prompt from a chunk on; those of later chunks stay."""
        if not first:
            return replace(self, prompt=prompt)
        return replace(self, script=tuple(sorted({**dict(self.script), first: prompt}.items())))

    def _check_prefix(self, prefix: Tensor) -> None:
        if prefix.dtype != torch.uint8 or prefix.dim() != 4 or prefix.shape[-1] != 3:
            raise InputError(f"a prefix must be uint8 frames [F, H, W, 3], not {prefix.dtype} {tuple(prefix.shape)}")
        frames, height, width, _ = prefix.shape
        if not frames:
            raise InputError("a prefix must have at least one frame")
        if (height, width) != (self.height, self.width):
            raise InputError(f"the prefix is {width}x{height} pixels, the video {self.width}x{self.height}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A request as the model reads it."""

    captions: CaptionTable
    prefix: Tensor | None  # latents [1, C, P, h, w] to go on from
    noise: Callable[[int], Noise]  # where the chunks start, by the span of a long video
    beside: Tensor | None = None  # as of `SeenImage`
    ends: int = 0  # latent frames behind the end that are given; the noise has them

    @property
    def given(self) -> int:
        """Latent frames that are given."""
        return 0 if self.prefix is None else self.prefix.shape[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What every process that holds layers is given of a video."""

    video: int  # its number, carried by its work items
    schedule: Schedule  # says in what order flags come
    kv: KVPlan
    captions: CaptionTable
    grid: tuple[int, int, int]  # latent (T, h, w) of a chunk
    checkpoint: str | None = None  # folder of the checkpoint that the video goes on from
    hidden: bool = False  # hidden states come back from passes, and not velocities


def variant_of(pipeline: Pipeline, request: Request) -> Pipeline:
    """The loaded model as a request wants it; an InputError if it cannot be had."""
    if request.fps is None and request.negative is None:
        return pipeline
    if not isinstance(pipeline, Adjustable):
        raise InputError("this pipeline has one frame rate and one negative prompt: leave both out")
    return pipeline.variant(fps=request.fps, negative=request.negative)


def encode(pipeline: Pipeline, request: Request) -> Encoded:
    """Encode a request's prompts and prefix; an InputError if the model cannot take them."""
    sampling = pipeline.sampling(request.num_steps, clean_pass=True, copy_pass=False)
    seen = None if request.prefix is None else pipeline.see(request.prefix)
    prefix = None if request.prefix is None or seen else _encode_prefix(pipeline, sampling, request.prefix)
    captions = pipeline.captions(request.prompt)
    if seen is not None:
        captions = replace(captions, image=seen.tokens)
    if request.script:
        made = 0 if prefix is None else prefix.shape[2] // sampling.chunk_width  # whole chunks of the prefix
        later = tuple((made + first, pipeline.captions(prompt).text) for first, prompt in request.script)
        captions = replace(captions, later=later)
    beside, noise = None if seen is None else seen.beside, partial(seeded_noise, request.seed)
    end = None if request.end is None else pipeline.autoencoder.encode(request.end)
    return Encoded(
        captions=captions,
        prefix=prefix,
        noise=noise if end is None else lambda span: _ending(noise(span), end),
        beside=beside,
        ends=0 if end is None else end.shape[2],
    )


def _ending(noise: Noise, end: Tensor) -> Noise:
    """Noise with latents in place of the last frames."""

    def ending(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
        drawn = noise(chunk, shape, draw)
        if not draw:
            drawn[:, :, -end.shape[2] :] = end.to(drawn)
        return drawn

    return ending


def sampling_of(pipeline: Pipeline, request: Request, encoded: Encoded, reuse: ReuseSettings) -> Sampling:
    """How a request is denoised."""
    passes = {"clean_pass": reuse.clean_pass, "copy_pass": reuse.copy_pass}
    return pipeline.sampling(request.num_steps, given=encoded.given, ends=encoded.ends, **passes)


def timetable(sampling: Sampling, chunks: int, given: int) -> Timetable:
    """When the chunks that are asked for are made, after so many given latent frames.

    An InputError if the given ones leave no room, or there is one span alone and it is too short.
    """
    first, left, limit = given // sampling.chunk_width, sampling.prefix_chunks(given) + chunks, sampling.chunks_at_once
    if limit is not None and left - chunks >= limit:
        most = (limit - 1) * sampling.chunk_width
        raise InputError(f"{given} given latent frames are too many: this model goes on from {most} at most")
    spans = list[Schedule]()
    while left > first:
        held = left if limit is None else min(left, limit)
        if held < left and not sampling.overlap:
            frames = 1 + CELL_FRAMES * (held * sampling.chunk_width - 1)
            raise InputError(f"{chunks} chunks are too many: this way of sampling makes {frames} frames at most")
        spans.append(
            Schedule(
                first=first,
                chunks=held,
                num_steps=sampling.num_steps,
                window=sampling.window,
                stagger=sampling.stagger,
            )
        )
        first = sampling.overlap
        left += first - held
    return Timetable(spans=tuple(spans))


def prepare(
    pipeline: Pipeline,  # the model
    request: Request,  # what to make
    encoded: Encoded,  # the same as the model reads it
    *,
    number: int,  # of the video, carried by its work items
    reuse: ReuseSettings,  # which steps are reused
    kv: KVSettings,  # how much of the past is held
    observe: bool,  # take distances even if the policy does not look at them, for a record
    checkpoint: Path | None = None,  # folder of the checkpoint to go on from
    table: Timetable | None = None,  # when all of its chunks are made; None works it out
    span: int = 0,  # which of a long video
) -> tuple[VideoRun, Admission]:
    """A run of a request that has not begun, and what those who compute it are given.

    An InputError says if the model cannot make what is asked for.
    """
    sampling, model, given = sampling_of(pipeline, request, encoded, reuse), pipeline.model, encoded.given
    table = table or timetable(sampling, request.chunks, given)
    schedule, place = table.spans[span], table.places[span]
    shape = VideoShape(
        channels=model.latent_channels,
        prefix_frames=given,
        height=request.height // CELL_PIXELS,
        width=request.width // CELL_PIXELS,
    )
    how = _reuse(pipeline, sampling, reuse, shape, observe=observe)
    run = VideoRun(
        number,
        schedule,
        shape,
        sampling,
        encoded.noise(span),
        how,
        prefix=encoded.prefix,
        beside=encoded.beside,
        compressed=kv.budget is not None,
        retires_at_once=kv.selection.asks == "next",
        span=(place.tick, place.chunk),
        device=model.kv.device,
    )
    return run, Admission(
        video=number,
        schedule=schedule,
        kv=plan_kv(sampling, schedule, kv, model.token_count(*run.grid)),
        captions=encoded.captions,
        grid=run.grid,
        checkpoint=None if checkpoint is None else str(checkpoint),
        hidden=how.read_out is not None,
    )


def _reuse(
    pipeline: Pipeline, sampling: Sampling, settings: ReuseSettings, shape: VideoShape, *, observe: bool
) -> Reuse:
    """How a request reuses steps; an InputError if the model does not offer what the settings name."""
    model, known = pipeline.model, settings.distance == CONDITION
    if known and sampling.changes is None:
        raise InputError("this model has no distance of its own conditions: take one between patch embeddings")
    grid = sampling.chunk_width, shape.height, shape.width

    def read_out(hidden: Tensor, condition: PassCondition) -> Tensor:
        return model.velocity(hidden, grid, condition)

    of_layers = sampling.residual_of_layers and settings.reuse == "residual" and settings.policy != "none"
    if settings.policy == "teacache-cyclic" and not of_layers:
        raise InputError("teacache-cyclic decides for each pass, which needs the residual of a model's layers")
    return Reuse(
        policy=settings.new_policy(),
        memory=settings.new_memory(),
        patches=model.patches,
        observe=observe,
        dtype=torch.float32 if known else DISTANCES[settings.distance],
        changes=sampling.changes if known else None,
        read_out=torch.no_grad()(read_out) if of_layers else None,
    )


def open_quantum(encoded: Encoded, table: Timetable) -> int:
    """As of `Schedule`, for a request: a text may say how many chunks are left."""
    counters = encoded.captions.counters
    return table.open_quantum(0 if counters is None else len(counters) - 1)


@torch.no_grad()
def _encode_prefix(pipeline: Pipeline, sampling: Sampling, prefix: Tensor) -> Tensor:
    used, _ = sampling.prefix(len(prefix))
    latents = pipeline.autoencoder.encode(prefix[-used:])
    if not latents.shape[2]:
        raise InputError(f"a prefix of {len(prefix)} frames is too short: give one image or 4 frames and more")
    return latents.to(pipeline.model.kv.dtype)
