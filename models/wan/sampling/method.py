"""How a model of this family is sampled, of its configuration; figures only, so that planning needs no weights."""

from typing import Any

import torch

from models.wan.config import WanConfig
from models.wan.sampling.forcing import BlockSampling, WindowSampling
from models.wan.sampling.self_forcing import SelfForcingSampling


def sampling_of(
    config: WanConfig, num_steps: int, *, clean_pass: bool, given: int = 0, ends: int = 0
) -> BlockSampling | WindowSampling | SelfForcingSampling:
    """Groups of latent frames as chunks, whole windows, of which so many latent frames are given, and so many
    behind the end, or Self-Forcing's chunks.

    An InputError if the steps cannot be sampled.
    """
    runtime = config.runtime
    if runtime.method == "self-forcing":
        return SelfForcingSampling(
            steps=tuple(1000 - 1000 * step // num_steps for step in range(num_steps)),
            shift=runtime.shift,
            chunk_width=runtime.chunk_width,
            held=runtime.window_frames,
            clean_pass=clean_pass,
        )
    image = runtime.method == "image to video"
    common: dict[str, Any] = {
        "steps": num_steps,
        "shift": runtime.shift,
        "guidance": runtime.guidance,
        "fps": None if image else runtime.fps,  # such a model takes none
        "block": runtime.chunk_width,
        "ar_step": runtime.stagger,
        "frames": runtime.window_frames,
        "noise_condition": runtime.noise_condition,
        "overlap_frames": runtime.overlap_frames,
        "dtype": torch.float32 if image else config.dtype,
    }
    if runtime.sampling != "groups":
        return WindowSampling(**common, given=given, ends=ends, aliased=not image)
    return BlockSampling(**common, clean_pass=clean_pass)
