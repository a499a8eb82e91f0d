"""From a request to a run: what is encoded once, and the sizes that follow from it.

It knows what a loaded model offers (`Pipeline`), and not how or where the run is carried out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv.size import KVPlan, KVSettings, plan_kv
from engine.noise import NoiseSource, SeededNoise
from engine.request import Prefix, Request
from engine.reuse.settings import ReuseSettings
from engine.video import Reuse, VideoRun, VideoShape
from models.errors import InputError
from models.protocols import CELL_PIXELS, CaptionTable, Pipeline, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A request as the model reads it."""

    captions: CaptionTable
    prefix: Tensor | None  # latents [1, C, P, h, w] to go on from
    noise: NoiseSource  # where the chunks start


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that has not begun, its texts, and the KV buffers that it needs."""

    run: VideoRun
    captions: CaptionTable
    kv: KVPlan


def encode(pipeline: Pipeline, request: Request) -> Encoded:
    """Encode a request's prompt and prefix.

    Raises:
        InputError: the model cannot take them.
    """
    prefix = None if request.prefix is None else _encode_prefix(pipeline, request.prefix)
    return Encoded(captions=pipeline.captions(request.prompt), prefix=prefix, noise=SeededNoise(request.seed))


def prepare(
    pipeline: Pipeline,
    request: Request,
    encoded: Encoded,
    *,
    number: int,
    reuse: ReuseSettings,
    kv: KVSettings,
    observe: bool,
) -> Prepared:
    """A run of a request.

    Args:
        pipeline: the model.
        request: what to make.
        encoded: the same as the model reads it.
        number: of the request, carried by its work items.
        reuse: which steps are reused.
        kv: how much of the past is held.
        observe: take distances even if the policy does not look at them, for a record.

    Raises:
        InputError: the model cannot make what is asked for.
    """
    sampling = pipeline.sampling(request.num_steps, clean_pass=reuse.clean_pass, copy_pass=reuse.copy_pass)
    model = pipeline.model
    run = VideoRun(
        number,
        _shape(pipeline, request, sampling, encoded.prefix),
        sampling,
        encoded.noise,
        Reuse(policy=reuse.new_policy(), memory=reuse.new_memory(), patches=model.patches, observe=observe),
        prefix=encoded.prefix,
        compressed=kv.budget is not None,
        device=model.kv.device,
    )
    plan = plan_kv(sampling, run.schedule, kv, chunk_tokens=model.token_count(*run.grid))
    return Prepared(run=run, captions=encoded.captions, kv=plan)


def _shape(pipeline: Pipeline, request: Request, sampling: Sampling, prefix: Tensor | None) -> VideoShape:
    given = 0 if prefix is None else prefix.shape[2]
    return VideoShape(
        channels=pipeline.model.latent_channels,
        chunks=math.ceil((request.chunks * sampling.chunk_width + given) / sampling.chunk_width),
        prefix_frames=given,
        height=request.height // CELL_PIXELS,
        width=request.width // CELL_PIXELS,
    )


@torch.no_grad()
def _encode_prefix(pipeline: Pipeline, prefix: Prefix) -> Tensor:
    latents = pipeline.autoencoder.encode(prefix.frames)
    if not latents.shape[2]:
        count = len(prefix.frames)
        raise InputError(f"a prefix of {count} frames is too short: give one image or 4 frames and more")
    return latents.to(pipeline.model.kv.dtype)
