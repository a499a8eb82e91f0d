"""What a video takes of a gang: its turns, and the memory of its keys and values. Figures alone; nothing is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.cache import CacheSettings
from engine.kv import KVSettings
from engine.request import Request
from engine.run import clean_capacity
from engine.schedule import Schedule
from models.magi.config import MagiConfig
from models.magi.sampling import MagiSampling
from parallel.cluster.jobs import TurnPlan, plan_turns
from parallel.mesh import Layout
from parallel.stages import stage_sizes

__all__ = ["VideoSize", "video_size"]

_CELL, _FRAMES_OF_LATENT = 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSize:
    """What a video takes.

    Attributes:
        turns: in order.
        window: chunks that are denoised at once.
        chunks: that are handed out.
        kv_bytes: of keys and values on the rank that holds most of them.
    """

    turns: tuple[TurnPlan, ...]
    window: int
    chunks: int
    kv_bytes: int


def video_size(
    config: MagiConfig,
    request: Request,
    *,
    cache: CacheSettings,
    kv: KVSettings,
    layout: Layout,
    split: str | None = None,
) -> VideoSize:
    """What a video of a MAGI-1 model takes.

    Args:
        config: of the model.
        request: the video.
        cache: which steps are reused.
        kv: how much of the past is held.
        layout: of the gang.
        split: layers of each stage; None balances them.

    Raises:
        InputError: the model cannot make it, or does not fit the layout.
    """
    model = config.model_config
    sampling = MagiSampling(
        config=config,
        num_steps=request.num_steps,
        clean_forward=cache.clean_forward,
        nearly_clean_mix=cache.nearly_clean_mix,
    )
    width = sampling.chunk_width
    frames = 0 if request.prefix is None else len(request.prefix.frames)
    given = 1 if frames == 1 else frames // _FRAMES_OF_LATENT
    chunks = math.ceil((request.chunks * width + given) / width)
    schedule = Schedule(first=given // width, chunks=chunks, num_steps=request.num_steps, window=sampling.window)
    side = _CELL * model.patch_size
    tokens = width * (request.height // side) * (request.width // side) // model.t_patch_size
    rows = tokens * (clean_capacity(schedule, sampling, kv.budget) + sampling.window) * sampling.branches
    per_row = 2 * model.num_query_groups * model.kv_channels * model.dtype.itemsize / layout.cp
    layers = max(stage_sizes(config, layout.pp, split))
    return VideoSize(
        turns=plan_turns(chunks=chunks, window=sampling.window, first=schedule.first),
        window=sampling.window,
        chunks=chunks - schedule.first,
        kv_bytes=math.ceil(rows * per_row * layers),
    )
