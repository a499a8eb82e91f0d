"""Three-axis rotary positions with learned bands (specification 6.2).

The table is made for one chunk from its own index, so nothing grows with the length of the video. The released code
scales the time axis by (f - 1) and back; that is the identity up to one rounding, and is left out here.

Shapes: T H W latent frames and token grid, S = T*H*W tokens, n bands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RotaryBands(nn.Module):
    """Holds the bands, shared by the three axes: head size / 8 values, 10000^(-i/n) at the start."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        count = head_size // 8
        self.bands = nn.Parameter(10000.0 ** -(torch.arange(count, dtype=torch.float32) / count))

    def table(self, first_frame: int, grid: tuple[int, int, int]) -> Tensor:
        """Sines and cosines of the tokens of latent frames first_frame .. first_frame + T - 1.

        Returns:
            [2, S, 3n] fp32: sines, cosines; tokens in (T, H, W) order; angles are n of time, n of height, n of width.
        """
        bands = self.bands.float()
        frames, height, width = grid
        shrink = math.sqrt(height * width / 256)
        axes = [
            first_frame + torch.arange(frames, dtype=torch.float32, device=bands.device),
            _centred(height, shrink, bands.device),
            _centred(width, shrink, bands.device),
        ]
        angles = [axis[:, None] * bands for axis in axes]
        time = angles[0][:, None, None].expand(-1, height, width, -1)
        rows = angles[1][None, :, None].expand(frames, -1, width, -1)
        columns = angles[2][None, None].expand(frames, height, -1, -1)
        table = torch.cat([time, rows, columns], dim=-1).flatten(0, 2)
        return torch.stack([table.sin(), table.cos()])


def _centred(size: int, shrink: float, device: torch.device) -> Tensor:
    coordinate = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    return coordinate / (size - 1) * (size / shrink - 1) if size > 1 else coordinate


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 6n values of each head in halves (a, b); the rest passes through.

    Args:
        x: [B, S, H, d] fp32.
        table: [2, S, 3n].
    """
    sin, cos = table[0][:, None], table[1][:, None]
    half = sin.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
