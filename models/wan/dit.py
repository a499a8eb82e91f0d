"""The causal Wan backbone, a `VideoModel`: SkyReels-V2 and Self-Forcing (specification parts 1 and 4).

It runs one chunk, which is a group of latent frames or a whole window; what the chunk attends to is behind `KVView`, so
that attention within a window is one chunk, and block-causal attention is chunks in order. A stage of a pipeline holds
some of the layers. Nothing here knows ranks, requests or caches.

Shapes: T h w latent frames and cells, S tokens = T * h/2 * w/2, D hidden, F times of a chunk, N text tokens.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, attention_backend
from models.checkpoint import WHOLE, Loading
from models.linear import linear_in
from models.protocols import Caption, KVGeometry, KVView, Modulation, PassCondition, Positions, TextKV
from models.wan.config import WanConfig
from models.wan.layers import Block, modulated, per_token, rotary_table

_TRAINED_FPS = (16, 24)  # rows of the table of frames per second; whatever is not 16 counts as 24


class _Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        shapes = config.shapes
        self.eps, self.island = shapes.eps, config.island_dtype
        self.modulation = nn.Parameter(torch.zeros(1, 2, shapes.dim))
        self.head = nn.Linear(shapes.dim, math.prod(shapes.patch_size) * shapes.out_dim)

    def forward(self, x_BSD: Tensor, e_FD: Tensor, frames: Tensor) -> Tensor:
        parts = (self.modulation.to(self.island) + e_FD[:, None]).unbind(dim=1)
        shift, scale = (per_token(part, frames) for part in parts)
        return linear_in(self.head, modulated(x_BSD, scale, shift, self.eps, self.island), self.island)


class WanDiT(nn.Module):
    """All of the model or one stage of it, a `VideoModel`. A stage with layer 0 embeds, and it and one with the last
    read out."""

    def __init__(self, config: WanConfig, loading: Loading = WHOLE) -> None:
        super().__init__()
        self.config, shapes = config, config.shapes
        self.held = range(shapes.num_layers) if loading.layers is None else loading.layers
        self.attention: Attention = attention_backend(loading.attention)  # of the text, and of KV views
        dim = shapes.dim
        if 0 in self.held:
            self.patch_embedding = nn.Conv3d(shapes.in_dim, dim, shapes.patch_size, shapes.patch_size)
        gelu = nn.GELU(approximate="tanh")
        self.text_embedding = nn.Sequential(nn.Linear(shapes.text_dim, dim), gelu, nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(shapes.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if shapes.inject_sample_info:
            self.fps_embedding = nn.Embedding(len(_TRAINED_FPS), dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        if shapes.sees_image:
            width = shapes.clip_dim
            embedder = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), nn.LayerNorm(dim)
            )
            self.img_emb = nn.ModuleDict({"proj": embedder})
        # Layers keep their absolute numbers, so a stage's parameter names are the checkpoint's.
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in self.held})
        if {0, shapes.num_layers - 1} & set(self.held):  # the first stage reads out where what layers added is reused
            self.head = _Head(config)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def kv(self) -> KVGeometry:
        return self.config.kv_geometry(self.held, self.device)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def latent_channels(self) -> int:
        return self.config.shapes.out_dim

    def token_count(self, frames: int, height: int, width: int) -> int:
        return math.prod(self.token_grid((frames, height, width)))

    def token_grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Token grid (T, H, W) of a latent (T, h, w)."""
        t, h, w = self.config.shapes.patch_size
        return latent[0] // t, latent[1] // h, latent[2] // w

    def patches(self, x: Tensor) -> Tensor:
        """Patch embedding of latents [1, in_dim, T, h, w] -> tokens [1, S, D]; a model that sees an image takes its
        channels behind the latent's."""
        _, p, q = self.config.shapes.patch_size
        b, c, frames, height, width = x.shape
        cells = x.reshape(b, c, frames, height // p, p, width // q, q).permute(0, 2, 3, 5, 1, 4, 6)
        convolution = self.patch_embedding
        tokens = cells.reshape(b, -1, c * p * q).to(self.config.dtype)
        return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)

    def embed_condition(self, condition: PassCondition) -> tuple[Tensor, Tensor]:
        """Embeddings of a condition for the head and for the layers: e [F, D] and e0 [F, 6, D], in the islands' dtype.

        F is 1 if all the chunk's times are the same; each is computed all the same, as a product's last bits depend on
        how many rows it has.
        """
        times = condition.times
        island, first, last = self.config.island_dtype, self.time_embedding[0], self.time_embedding[2]
        half = self.config.shapes.freq_dim // 2
        t = torch.tensor(times, dtype=torch.float64, device=self.device)
        bands = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=self.device) / half)
        angles = t[:, None] * bands
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.config.dtype)
        e = linear_in(last, F.silu(linear_in(first, wave, island)), island)
        e0 = linear_in(self.time_projection[1], F.silu(e), island)
        if self.config.shapes.inject_sample_info:
            row = self.fps_embedding.weight[0 if condition.fps == _TRAINED_FPS[0] else 1]
            hidden = F.silu(linear_in(self.fps_projection[0], row, island))
            e0 = e0 + linear_in(self.fps_projection[2], hidden, island)
        if len(set(times)) == 1:
            e, e0 = e[:1], e0[:1]
        return e, e0.unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor) -> Tensor:
        """Rows of the text encoder [N, text_dim], those of padding among them -> [1, N, D]."""
        return self.text_embedding(text[None].to(self.config.dtype))

    def text(self, caption: Caption) -> TextKV:
        """Keys and values of a text, and of an image; as `VideoModel.text`."""
        text = self.embed_text(caption.text)
        image = None if caption.image is None else self.img_emb["proj"](caption.image[None].to(self.config.dtype))
        return {number: block.cross_attn.see(text, image) for number, block in self._blocks()}

    def modulation(self, condition: PassCondition) -> Modulation:
        """What the times do to a pass, the same to all layers; as `VideoModel.modulation`."""
        _, e0 = self.embed_condition(condition)
        return dict.fromkeys(self.held, (e0,))

    def positions(self, first_frame: int, grid: tuple[int, int, int], tokens: slice = slice(None)) -> Positions:
        """Rotations [S, d / 2] of a chunk's tokens and the chunk's frame [S] of each; as `VideoModel.positions`."""
        cells = self.token_grid(grid)
        kind = torch.float32 if self.config.precision.rotary == "complex64" else torch.float64
        rope = rotary_table(first_frame, cells, self.config.shapes.head_size, kind, self.device)
        return rope[tokens], self._frames(cells)[tokens]

    def layers(
        self, hidden: Tensor, modulation: Modulation, text: TextKV, positions: Positions, view: KVView
    ) -> Tensor:
        for hidden in self.each_layer(hidden, modulation, text, positions, view):  # noqa: B007, B020
            pass
        return hidden

    def each_layer(
        self, hidden: Tensor, modulation: Modulation, text: TextKV, positions: Positions, view: KVView
    ) -> Iterator[Tensor]:
        """The hidden states after each layer that is held."""
        rope, frames = positions
        for number, block in self._blocks():
            (e0,) = modulation[number]
            hidden = block(hidden, e0, frames, text[number], rope, view, number, self.attention)
            yield hidden

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        for name, block in self.blocks.items():
            yield int(name), cast(Block, block)

    def velocity(self, hidden: Tensor, grid: tuple[int, int, int], condition: PassCondition) -> Tensor:
        """Velocity [1, C, T, h, w] fp32 of the last hidden states of a whole chunk."""
        e, _ = self.embed_condition(condition)
        (frames, height, width), (_, p, q) = self.token_grid(grid), self.config.shapes.patch_size
        x = self.head(hidden, e, self._frames((frames, height, width)))
        x = x.reshape(-1, frames, height, width, p, q, self.config.shapes.out_dim)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), -1, frames, height * p, width * q).float()

    def _frames(self, cells: tuple[int, int, int]) -> Tensor:
        """The latent frame of each token, [S]."""
        return torch.arange(cells[0], device=self.device).repeat_interleave(cells[1] * cells[2])
