"""What a person asks for: one video, and the noise that its chunks start from.

Requests check themselves; nothing else in the engine checks them again. Noise is drawn when a chunk enters, from the
seed and the chunk's number alone, so it does not depend on the length of the video, on other chunks or on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import InputError
from models.protocols import CELL_PIXELS

Noise = Callable[[int, tuple[int, ...]], Tensor]
"""Standard normal noise of a chunk, given its number and shape [1, C, T, h, w]; fp32 on the CPU."""
SIZE_STEP = 2 * CELL_PIXELS  # a token is a patch of 2 x 2 cells


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Frames that the video goes on from: one for image to video, more for video to video."""

    frames: Tensor  # uint8 [F, H, W, 3], at the size of the request

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.dim() != 4 or self.frames.shape[-1] != 3:
            shape = tuple(self.frames.shape)
            raise InputError(f"a prefix must be uint8 frames [F, H, W, 3], not {self.frames.dtype} {shape}")
        if not len(self.frames):
            raise InputError("a prefix must have at least one frame")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One video to make; an InputError if a value cannot be used."""

    prompt: str  # what it shows
    chunks: int  # length in chunks of 24 frames, the prefix not counted
    height: int  # pixels, a multiple of 16
    width: int  # pixels, a multiple of 16
    num_steps: int  # denoising steps of a chunk; must divide into the model's window
    seed: int  # of the noise
    prefix: Prefix | None = None  # frames to go on from

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("the prompt is empty: say what the video shows")
        if self.chunks < 1:
            raise InputError(f"a video of {self.chunks} chunks has no frames: ask for 1 or more")
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels < SIZE_STEP or pixels % SIZE_STEP:
                raise InputError(f"the {name} of {pixels} pixels is not a multiple of {SIZE_STEP}")
        if self.num_steps < 1:
            raise InputError(f"{self.num_steps} denoising steps make no video")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"the seed {self.seed} is not between 0 and 2^63 - 1")
        if self.prefix is not None and tuple(self.prefix.frames.shape[1:3]) != (self.height, self.width):
            height, width = self.prefix.frames.shape[1:3]
            raise InputError(f"the prefix is {width}x{height} pixels, the video {self.width}x{self.height}")


def seeded_noise(seed: int) -> Noise:
    """Noise of a seed. The two numbers are hashed into one, so that seed 0 chunk 1 and seed 1 chunk 0 differ."""

    def noise(chunk: int, shape: tuple[int, ...]) -> Tensor:
        mixed = (seed * 0x9E3779B97F4A7C15 + (chunk + 1) * 0xC2B2AE3D27D4EB4F) & (2**63 - 1)
        return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))

    return noise


def given_noise(whole: Tensor) -> Noise:
    """Noise that is given for the whole video, [1, C, T, h, w]: for comparison with published figures."""

    def noise(chunk: int, shape: tuple[int, ...]) -> Tensor:
        part = whole[:, :, chunk * shape[2] : (chunk + 1) * shape[2]]
        if part.shape != shape:
            raise ValueError(f"the given noise has shape {tuple(part.shape)} at chunk {chunk}, {shape} is needed")
        return part.float().clone()

    return noise
