"""The DiT of MAGI-1: embeddings, a range of layers, and the output (specification part 6).

The parts are called one by one, since a stage of a pipeline runs only some of them. Nothing here knows ranks, requests
or caches; what a chunk attends to is a `KVView`.

Shapes: B batch, R chunks, T h w latent frames and cells of them all, S tokens = T * h/2 * w/2, D hidden, C condition.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, attention_backend
from models.magi.config import ModelConfig
from models.magi.layers import LayerNorm1p, RotaryBands, TransformerLayer
from models.protocols import KVView

NULL_TEXT_ROWS = 50
"""How many rows of the learned null caption stand for "no text" (specification 2.4)."""
_FREQUENCIES = 128


@cache
def _frequencies(device: torch.device) -> Tensor:
    """Of the sinusoid of times. A GPU's exp differs from a CPU's, so they are taken on the CPU, and copied once."""
    steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000) * steps / _FREQUENCIES).to(device)


class _TimestepEmbedder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dtype = config.dtype
        size = config.cond_size
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        """[..] -> [.., C] fp32. The sinusoid is rounded to the model's dtype before the fp32 MLP (6.1, step 3)."""
        angles = t.float()[..., None] * _frequencies(t.device) * 1000
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)
        return _linear_fp32(self.mlp[2], F.silu(_linear_fp32(self.mlp[0], wave)))


class _CaptionEmbedder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = int(config.hidden_size * config.xattn_cond_hidden_ratio)
        self.null_caption_embedding = nn.Parameter(torch.zeros(config.caption_max_length, config.caption_channels))
        self.y_proj_xattn = nn.Sequential(nn.Linear(config.caption_channels, width), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(nn.Linear(config.caption_channels, config.cond_size))


class _Blocks(nn.Module):
    """`videodit_blocks`. Layers keep their absolute numbers, so a stage's parameter names are the checkpoint's."""

    def __init__(self, config: ModelConfig, layers: range, *, final: bool, fp8: bool, precise: bool) -> None:
        super().__init__()
        last = config.num_layers - 1
        self.layers = nn.ModuleDict(
            {str(i): TransformerLayer(config, fp8=fp8 and i not in (0, last), precise=precise) for i in layers}
        )
        if final:
            self.final_layernorm = LayerNorm1p(config.hidden_size, config.layernorm_epsilon)


class _FinalLinear(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        values = config.patch_size**2 * config.t_patch_size * config.out_channels
        self.linear = nn.Linear(config.hidden_size, values, bias=False)


class MagiDiT(nn.Module):
    """All of the model or one stage of it.

    Args:
        config: shapes.
        layers: which layers are held; all by default. A stage with layer 0 embeds, one with the last reads out.
        fp8: a quantised checkpoint (all layers but the first and the last).
        precise: fp32 output projections, as released; False computes them in the model's dtype.
        attention: name of the attention backend, used for the text here and by KV views.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        fp8: bool = False,
        precise: bool = True,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = range(config.num_layers) if layers is None else layers
        embeds, reads_out = 0 in self.layers, config.num_layers - 1 in self.layers
        self.attention: Attention = attention_backend(attention)
        if embeds:
            size = (config.t_patch_size, config.patch_size, config.patch_size)
            self.x_embedder = nn.Conv3d(config.in_channels, config.hidden_size, size, size, bias=False)
        self.t_embedder = _TimestepEmbedder(config)
        self.y_embedder = _CaptionEmbedder(config)
        self.rope = RotaryBands(config.kv_channels)
        self.videodit_blocks = _Blocks(config, self.layers, final=reads_out, fp8=fp8, precise=precise)
        if reads_out:
            self.final_linear = _FinalLinear(config)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.rope.bands.device

    def null_text(self) -> Tensor:
        """The rows that stand for no text, [50, caption channels] or fewer (2.4)."""
        return self.y_embedder.null_caption_embedding[:NULL_TEXT_ROWS]

    def token_grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Token grid (T, H, W) of a latent (T, h, w)."""
        frames, height, width = latent
        return frames, height // self.config.patch_size, width // self.config.patch_size

    def embed_patches(self, x: Tensor) -> Tensor:
        """Patch embedding of latents [B, channels, T, h, w] -> tokens [B, S, D] (6.1, steps 1 and 2).

        The released code runs a convolution here, which GPUs may round to TF32; a matrix product they do not.
        """
        x = x * self.config.x_rescale_factor
        if self.config.half_channel_vae:
            x = torch.cat([x, x], dim=1)
        b, c, frames, height, width = x.shape
        p = self.config.patch_size
        x = x.float().reshape(b, c, frames, height // p, p, width // p, p).permute(0, 2, 3, 5, 1, 4, 6)
        tokens = F.linear(x.reshape(b, -1, c * p * p), self.x_embedder.weight.float().flatten(1))
        return tokens.to(self.config.dtype)

    def embed_condition(self, t: Tensor, *, distill: float | None, null: bool) -> Tensor:
        """Condition of chunks (6.1, steps 3 to 5).

        Args:
            t: [B, R] times, 0 noise and 1 clean.
            distill: the step-size constant of a distilled model, None for a base model.
            null: take the null row that was trained with dropped captions; the caption itself is not used here.

        Returns:
            [B, R, C] in the model's dtype.
        """
        embedded = self.t_embedder(t)
        if distill is not None:
            embedded = embedded + self.t_embedder(torch.full_like(t, distill))
        row = self.y_embedder.null_caption_embedding[-1 if null else -2]
        text = _linear_fp32(self.y_embedder.y_proj_adaln[0], row)
        return (embedded + text).to(self.config.dtype)

    def embed_text(self, y: Tensor) -> Tensor:
        """Caption tokens that count, [B, N, caption channels] -> [B, N, D] (6.1, step 6)."""
        return F.silu(_linear_fp32(self.y_embedder.y_proj_xattn[0], y)).to(self.config.dtype)

    def run_layers(
        self,
        h_BSD: Tensor,
        cond_BRC: Tensor,
        text_BND: Tensor,
        rope: Tensor,
        view: KVView,
        *,
        cross: Attention | None = None,
    ) -> Tensor:
        """Run the layers that are held; arguments as in `TransformerLayer.forward`."""
        for name, layer in self.videodit_blocks.layers.items():
            h_BSD = layer(h_BSD, cond_BRC, text_BND, rope, view, int(name), cross or self.attention)
        return h_BSD

    def read_velocity(self, h_BSD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Velocity [B, channels, T, h, w] fp32 of the last hidden states (6.4). `grid` is the token grid (T, H, W)."""
        normed = self.videodit_blocks.final_layernorm(h_BSD.float())
        x = F.linear(normed.float(), self.final_linear.linear.weight.float())
        (frames, height, width), p = grid, self.config.patch_size
        x = x.reshape(-1, frames, height, width, p, p, self.config.out_channels)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, self.config.out_channels, frames, height * p, width * p)
        return x[:, : self.config.latent_channels] / self.config.x_rescale_factor


def _linear_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in fp32, whatever its parameters are stored in (6.1)."""
    assert isinstance(layer, nn.Linear)
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
