"""How a model of this family is sampled, of its configuration; figures only, so that planning needs no weights."""

from __future__ import annotations

from models.protocols import Sampling
from models.wan.config import WanConfig
from models.wan.sampling.forcing import BlockSampling
from models.wan.sampling.self_forcing import SelfForcingSampling


def sampling_of(
    config: WanConfig, num_steps: int, *, clean_pass: bool, changes: tuple[float, ...] | None = None
) -> Sampling:
    """Groups of latent frames as chunks, or Self-Forcing's chunks. `changes`: as of `Sampling`, if they are known.

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
    return BlockSampling(
        steps=num_steps,
        shift=runtime.shift,
        guidance=runtime.guidance,
        fps=runtime.fps,
        block=runtime.chunk_width,
        ar_step=runtime.stagger,
        frames=runtime.window_frames,
        noise_condition=runtime.noise_condition,
        overlap_frames=runtime.overlap_frames,
        clean_pass=clean_pass,
        changes=changes,
        dtype=config.dtype,
    )
