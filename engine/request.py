"""What a person asks for: one video. Requests check themselves; nothing else in the engine checks them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import InputError
from models.protocols import CELL_PIXELS

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
    """One video to make.

    Raises:
        InputError: a value cannot be used.
    """

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
