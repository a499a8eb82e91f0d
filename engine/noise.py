"""The noise that chunks start from: drawn when a chunk enters, from the seed and the chunk's number alone.

So a chunk's noise does not depend on the length of the video, on the other chunks or on the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Where a chunk's noise comes from."""

    def chunk(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of a shape, fp32 on the CPU."""


class SeededNoise:
    """Noise of a seed. The two numbers are hashed into one, so that seed 0 chunk 1 and seed 1 chunk 0 differ."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def chunk(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """The noise of one chunk."""
        mixed = (self._seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xC2B2AE3D27D4EB4F) & (2**63 - 1)
        return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))


class GivenNoise:
    """Noise that is given for the whole video, [1, C, T, h, w]: for comparison with published figures."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise

    def chunk(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """The noise of one chunk: its slice of what was given."""
        width = shape[2]
        part = self._noise[:, :, index * width : (index + 1) * width]
        if part.shape != shape:
            raise ValueError(f"the given noise has shape {tuple(part.shape)} at chunk {index}, {shape} is needed")
        return part.float().clone()
