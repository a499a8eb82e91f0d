"""A layer of the causal Wan backbone, and its rotary positions (specification 1.3 and 1.4).

What a layer attends to is behind `KVView`: it hands over keys and values, then asks with queries.

Shapes: B batch, S tokens, D hidden, F times of a chunk (one, or one for each latent frame), N text tokens, H heads,
d head size. Dtypes: hidden states and big products are in the model's; `island` is that of norms, modulation and the
residual within a layer.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.protocols import KVView
from models.wan.config import WanConfig

_BASE = 10000.0


class RMSNorm(nn.Module):
    """Over all heads together. `rounds`: to the input's dtype before the product with the weight."""

    def __init__(self, size: int, eps: float, *, rounds: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.rounds = eps, rounds

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; fp32 unless it `rounds`."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed.to(x.dtype) if self.rounds else normed) * self.weight


class _Attention(nn.Module):
    """Projections and norms that self-attention and cross-attention share."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.shapes.dim
        self.head_size, self.dtype = config.shapes.head_size, config.dtype
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = _norm(config), _norm(config)

    def heads(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, H, d]."""
        return x.unflatten(-1, (-1, self.head_size))


class SelfAttention(_Attention):
    """Over all that the view shows."""

    def forward(self, x_BSD: Tensor, rope: Tensor, view: KVView, layer: int) -> Tensor:
        """`x_BSD` in the model's dtype, `rope` as of `rotary_table`."""
        # Keys and values first: a view that sends them elsewhere works while the queries are projected.
        k = apply_rotary(self.heads(self.norm_k(self.k(x_BSD))), rope)
        view.store(layer, k.to(self.dtype), self.heads(self.v(x_BSD)))
        q = apply_rotary(self.heads(self.norm_q(self.q(x_BSD))), rope)
        return self.o(view.attend(layer, q.to(self.dtype)).flatten(2))


class CrossAttention(_Attention):
    """Over the text; of a model that sees an image, over its tokens as well, in a sum."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.shapes.sees_image:
            dim = config.shapes.dim
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = _norm(config)

    def see(self, text_BND: Tensor, image_BPD: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values [B, N, H, d] of embedded tokens of a text, then of an image: the same for all chunks."""
        pairs = [(self.norm_k(self.k(text_BND)), self.v(text_BND))]
        if image_BPD is not None:
            pairs.append((self.norm_k_img(self.k_img(image_BPD)), self.v_img(image_BPD)))
        return tuple(self.heads(part).to(self.dtype) for pair in pairs for part in pair)

    def forward(self, x_BSD: Tensor, seen: tuple[Tensor, ...], attention: Attention) -> Tensor:
        """`x_BSD` in the model's dtype, `seen` as of `see`."""
        q = self.heads(self.norm_q(self.q(x_BSD))).to(self.dtype)
        attended = attention(q, *seen[:2])
        if seen[2:]:
            attended = attended + attention(q, *seen[2:])
        return self.o(attended.flatten(2))


class Block(nn.Module):
    """Self-attention and MLP, modulated and gated by the times, and cross-attention, which is neither."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, hidden = config.shapes.dim, config.shapes.ffn_dim
        self.eps, self.dtype, self.island = config.shapes.eps, config.dtype, config.island_dtype
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        self.norm3 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(
        self,
        x_BSD: Tensor,
        e0_F6D: Tensor,
        frames: Tensor,
        seen: tuple[Tensor, ...],
        rope: Tensor,
        view: KVView,
        layer: int,
        attention: Attention,
    ) -> Tensor:
        """Run the layer.

        `e0_F6D` and `frames` [S], the place in the chunk of each token's latent frame, are of its times, `seen` of the
        text; `view` is asked with the absolute number of the `layer`, and `attention` is for the text.
        """
        parts = (self.modulation.to(self.island) + e0_F6D).unbind(dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(part, frames) for part in parts)
        attended = self.self_attn(self._norm(x_BSD, scale1, shift1), rope, view, layer)
        x_BSD = x_BSD + attended * gate1
        x_BSD = x_BSD + self.cross_attn(self._norm3(x_BSD), seen, attention)
        return (x_BSD + self.ffn(self._norm(x_BSD, scale2, shift2)) * gate2).to(self.dtype)

    def _norm(self, x_BSD: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulated(x_BSD, scale, shift, self.eps, self.island).to(self.dtype)

    def _norm3(self, x_BSD: Tensor) -> Tensor:
        x_BSD, weight, bias = x_BSD.to(self.dtype).float(), self.norm3.weight.float(), self.norm3.bias.float()
        return F.layer_norm(x_BSD, weight.shape, weight, bias, self.eps).to(self.dtype)


def _norm(config: WanConfig) -> RMSNorm:
    return RMSNorm(config.shapes.dim, config.shapes.eps, rounds=config.precision.norm_rounds)


def modulated(x_BSD: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """A layer norm without parameters, computed in fp32, then scaled and shifted in a dtype."""
    normed = F.layer_norm(x_BSD.float(), x_BSD.shape[-1:], eps=eps).to(dtype)
    return normed * (1 + scale) + shift


def per_token(values: Tensor, frames: Tensor) -> Tensor:
    """Values of times, [F, D], as they are added to tokens: [1, D], or [S, D] where the frames of a chunk differ."""
    return values if len(values) == 1 else values[frames]


# ---- rotary positions


@lru_cache(maxsize=8)
def _frequencies(channels: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """Of one axis, [channels / 2]; taken on the CPU, since a GPU's power differs, and copied once."""
    steps = torch.arange(0, channels, 2, dtype=kind, device="cpu") / channels
    return (1.0 / torch.pow(_BASE, steps)).to(device)


def rotary_table(
    first_frame: int, grid: tuple[int, int, int], head_size: int, kind: torch.dtype, device: torch.device
) -> Tensor:
    """Rotations of a chunk's tokens, [S, d / 2] complex, in (T, H, W) order (specification 1.3).

    A third of the pairs turn with the row, a third with the column, the rest with the frame, each axis from its own
    lowest band on. `kind` is the dtype of the angles, fp32 or fp64. `grid` is of tokens.
    """
    third = head_size // 6
    sizes = (head_size - 4 * third, 2 * third, 2 * third)
    angles = []
    for axis, (count, channels) in enumerate(zip(grid, sizes, strict=True)):
        start = first_frame if axis == 0 else 0
        places = torch.arange(start, start + count, dtype=kind, device=device)
        shape = [1, 1, 1, channels // 2]
        shape[axis] = count
        angle = places[:, None] * _frequencies(channels, kind, device)
        angles.append(angle.reshape(shape).expand(*grid, -1))
    whole = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(whole), whole)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, S, H, d] by a table [S, d / 2]; the result has the table's precision."""
    pairs = torch.view_as_complex(x.to(table.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table[:, None]).flatten(-2)
