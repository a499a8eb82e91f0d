"""MAGI-1 as the engine sees it: a `VideoModel` over the DiT.

It turns the engine's words (a chunk's first frame, a pass's condition) into calls of the DiT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.magi.dit import MagiDiT
from models.protocols import KVGeometry, KVView, PassCondition


class MagiModel:
    """All or some layers of a DiT. A model without the first layer cannot embed, one without the last not read out."""

    def __init__(self, dit: MagiDiT) -> None:
        self.dit = dit

    @property
    def kv(self) -> KVGeometry:
        """Shape of the KV of the layers that are held."""
        return self.dit.config.kv_geometry(self.dit.layers, self.dit.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that are held."""
        return sum(parameter.nbytes for parameter in self.dit.parameters())

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.dit.config.latent_channels

    def token_count(self, frames: int, height: int, width: int) -> int:
        """Tokens of a latent of that size."""
        t, h, w = self.dit.token_grid((frames, height, width))
        return t * h * w

    def patches(self, x: Tensor) -> Tensor:
        """Patch embedding [1, S, D] of a latent [1, C, T, h, w]."""
        return self.dit.embed_patches(x)

    def layers(
        self,
        hidden: Tensor,
        condition: PassCondition,
        caption: Tensor,
        first_frame: int,
        grid: tuple[int, int, int],
        view: KVView,
        tokens: slice = slice(None),
    ) -> Tensor:
        """Run the layers that are held over one chunk's tokens, or over a slice of them."""
        dit = self.dit
        t = torch.full((1, 1), condition.t, dtype=torch.float32, device=dit.device)
        embedded = dit.embed_condition(t, distill=condition.distill, null=condition.drop)
        text = dit.embed_text(caption[None])
        rope = dit.rope.table(first_frame, dit.token_grid(grid))[:, tokens]
        return dit.run_layers(hidden, embedded, text, rope, view)

    def velocity(self, hidden: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Velocity [1, C, T, h, w] fp32 of the last hidden states."""
        return self.dit.read_velocity(hidden, self.dit.token_grid(grid))
