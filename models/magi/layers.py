"""What a layer of MAGI-1's DiT is made of, from its norms up to the whole layer (specification 5.3, 6.2 and 6.3).

What the layer attends to is behind `KVView`: it hands over keys and values, then asks with queries. It does not know
whether they are kept, compressed or sent to other ranks.

Shapes: B batch, S tokens, D hidden, C condition, H query heads, G key heads, d head size, N text tokens, R chunks in S,
T H W latent frames and token grid, n rotary bands.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.magi.config import ModelConfig
from models.protocols import KVView

_FP8_MAX = 448.0


class LayerNorm(nn.LayerNorm):
    """Ordinary layer norm that computes in its parameters' dtype (specification 6.3, steps 1 and 9)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(input.to(self.weight.dtype))


class LayerNorm1p(nn.Module):
    """Layer norm with an effective gain of weight + 1, in the dtype of its parameters.

    The parameters are fp32 after promotion, but those of the cross-attention stay in the model's dtype, and weight + 1
    is then rounded to it (specification 5.5 and 6.3, step 5).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the parameters' dtype."""
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight + 1, self.bias, self.eps)


class RotaryBands(nn.Module):
    """Learned bands of three-axis rotary positions, shared by the axes: head size / 8, at first 10000^(-i/n) (6.2).

    A table is made for one chunk from its own index, so nothing grows with the length of the video. The released code
    scales the time axis by (f - 1) and back; that is the identity up to one rounding, and is left out here.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        count = head_size // 8
        self.bands = nn.Parameter(10000.0 ** -(torch.arange(count, dtype=torch.float32, device="cpu") / count))

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


def _quantise(x: Tensor, scale: Tensor) -> Tensor:
    """Clamp to the fp8 range, with the released detour over bf16 (two roundings)."""
    return (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).bfloat16().to(torch.float8_e4m3fn)


class _Fp8Linear(nn.Module):
    """A linear layer of a quantised checkpoint (5.3).

    Products of two fp8 values are exact in bf16 and sums are taken in fp32, so it gives the released results up to the
    order of summation on any device; the released kernel (a scaled fp8 matrix product) is faster on GPUs that have it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.zeros(1, outputs, inputs, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def _product(self, quantised: Tensor, input_scale: Tensor) -> Tensor:
        y = quantised.float() @ self.weight[0].float().T
        return (y * (input_scale * self.weight_scale[0])).bfloat16()


class Fp8TensorLinear(_Fp8Linear):
    """`linear_qkv.*` and `mlp.linear_fc1`. Its input scale is stored as a vector, of which the product reads the first
    element only, as the released kernel does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.input_scale = nn.Parameter(torch.ones(inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs] bf16."""
        return self._product(_quantise(x, self.input_scale), self.input_scale[0])


class Fp8ChannelLinear(_Fp8Linear):
    """`linear_proj` and `mlp.linear_fc2`: inputs are smoothed per channel before they are quantised."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.input_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.smooth_scale = nn.Parameter(torch.ones(1, inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs] bf16."""
        return self._product(_quantise(x, self.smooth_scale[0]), self.input_scale[0])


class _ProjectionIn(nn.Module):
    """`linear_qkv`: a pre-norm and four projections, for self-attention (q, k, v) and cross-attention (qx)."""

    def __init__(self, config: ModelConfig, fp8: bool) -> None:
        super().__init__()
        dim, keys = config.hidden_size, config.num_query_groups * config.kv_channels
        linear = Fp8TensorLinear if fp8 else _linear
        self.layer_norm = LayerNorm(dim, eps=config.layernorm_epsilon)
        self.q = linear(dim, dim)
        self.qx = linear(dim, dim)
        self.k = linear(dim, keys)
        self.v = linear(dim, keys)


class _Attention(nn.Module):
    """`self_attention`: self-attention over the view and cross-attention over the text, one output projection."""

    def __init__(self, config: ModelConfig, fp8: bool, precise: bool) -> None:
        super().__init__()
        dim, d, eps = config.hidden_size, config.kv_channels, config.layernorm_epsilon
        self.groups, self.head_size, self.precise = config.num_query_groups, d, precise and not fp8
        self.linear_qkv = _ProjectionIn(config, fp8)
        self.linear_kv_xattn = _linear(int(dim * config.xattn_cond_hidden_ratio), 2 * self.groups * d)
        self.linear_proj = Fp8ChannelLinear(2 * dim, dim) if fp8 else _linear(2 * dim, dim)
        self.q_layernorm = LayerNorm1p(d, eps)
        self.k_layernorm = LayerNorm1p(d, eps)
        self.q_layernorm_xattn = LayerNorm1p(d, eps)
        self.k_layernorm_xattn = LayerNorm1p(d, eps)

    def forward(
        self, h_BSD: Tensor, text_BND: Tensor, rope: Tensor, view: KVView, layer: int, cross: Attention
    ) -> Tensor:
        z = self.linear_qkv.layer_norm(h_BSD)
        # Keys and values first: a view that sends them elsewhere works while the queries are projected.
        k = apply_rotary(self.k_layernorm(self._heads(self.linear_qkv.k(z))).float(), rope)
        view.store(layer, k.to(z.dtype), self._heads(self.linear_qkv.v(z)))
        q = apply_rotary(self.q_layernorm(self._heads(self.linear_qkv.q(z))).float(), rope).to(z.dtype)
        attended = view.attend(layer, q)
        seen = self._cross(z, text_BND, cross)
        return self._project(attended.flatten(2), seen.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))

    def _cross(self, z: Tensor, text_BND: Tensor, cross: Attention) -> Tensor:
        qx = self.q_layernorm_xattn(self._heads(self.linear_qkv.qx(z))).to(z.dtype)
        # Rows of the projection are [K_g, V_g] per key head, not a half of keys and a half of values.
        kv = self.linear_kv_xattn(text_BND).unflatten(-1, (self.groups, 2 * self.head_size))
        k, v = kv.chunk(2, dim=-1)
        return cross(qx, self.k_layernorm_xattn(k).to(z.dtype), v)

    def _project(self, attended: Tensor, seen: Tensor) -> Tensor:
        """Interleave the two results in groups, as the released layout has it, and project: fp32 by default (6)."""
        parts = torch.stack([attended.unflatten(-1, (8, -1)), seen.unflatten(-1, (8, -1))], dim=-2)
        mixed = parts.flatten(-3)
        if not self.precise:
            return self.linear_proj(mixed)
        return F.linear(mixed.float(), self.linear_proj.weight.float())


class _Mlp(nn.Module):
    def __init__(self, config: ModelConfig, fp8: bool) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.ffn_hidden_size
        self.gated = config.gated_linear_unit
        self.layer_norm = LayerNorm(dim, eps=config.layernorm_epsilon)
        wide = 2 * hidden if self.gated else hidden
        self.linear_fc1 = Fp8TensorLinear(dim, wide) if fp8 else _linear(dim, wide)
        self.linear_fc2 = Fp8ChannelLinear(hidden, dim) if fp8 else _linear(hidden, dim)

    def forward(self, h_BSD: Tensor) -> Tensor:
        x = self.linear_fc1(self.layer_norm(h_BSD))
        if self.gated:  # one rounding: silu and product in fp32
            gate, value = x.float().chunk(2, dim=-1)
            x = (F.silu(gate) * value).to(x.dtype)
        else:
            x = F.gelu(x)
        return self.linear_fc2(x)


class _Modulation(nn.Module):
    """`ada_modulate_layer`: two gates per chunk from its condition, soft-capped by tanh."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = int(2 * config.hidden_size * config.cond_gating_ratio)
        self.proj = nn.Sequential(nn.Linear(config.cond_size, width))

    def forward(self, cond_BRC: Tensor) -> tuple[Tensor, Tensor]:
        gates = torch.tanh(self.proj(F.silu(cond_BRC)).float()).to(cond_BRC.dtype)
        attention, mlp = gates.chunk(2, dim=-1)
        return attention, mlp


class TransformerLayer(nn.Module):
    """Attention and MLP, each gated, then normalised ("sandwich"), then added in fp32.

    Args:
        config: shapes.
        fp8: the big projections are stored as fp8 (quantised checkpoints, all layers but the first and the last).
        precise: the output projection runs in fp32, as released; False runs it in the model's dtype.
    """

    def __init__(self, config: ModelConfig, *, fp8: bool = False, precise: bool = True) -> None:
        super().__init__()
        self.ada_modulate_layer = _Modulation(config)
        self.self_attention = _Attention(config, fp8, precise)
        self.self_attn_post_norm = LayerNorm1p(config.hidden_size, config.layernorm_epsilon)
        self.mlp = _Mlp(config, fp8)
        self.mlp_post_norm = LayerNorm1p(config.hidden_size, config.layernorm_epsilon)

    def forward(
        self,
        h_BSD: Tensor,
        cond_BRC: Tensor,
        text_BND: Tensor,
        rope: Tensor,
        view: KVView,
        layer: int,
        cross: Attention,
    ) -> Tensor:
        """Run the layer.

        Args:
            h_BSD: hidden states.
            cond_BRC: one condition per chunk; S must be R equal chunks.
            text_BND: embedded caption tokens, only those that count.
            rope: table of `RotaryBands.table` for the S tokens.
            view: what to attend to.
            layer: the layer's absolute number, which the view is asked with.
            cross: attention function for the text.
        """
        gate_attention, gate_mlp = self.ada_modulate_layer(cond_BRC)
        attended = self.self_attention(h_BSD, text_BND, rope, view, layer, cross)
        h_BSD = self._add(h_BSD, attended, gate_attention, self.self_attn_post_norm)
        return self._add(h_BSD, self.mlp(h_BSD), gate_mlp, self.mlp_post_norm)

    @staticmethod
    def _add(h_BSD: Tensor, update: Tensor, gate_BRD: Tensor, norm: LayerNorm1p) -> Tensor:
        chunks = gate_BRD.shape[1]
        gated = update.float().unflatten(1, (chunks, -1)) * gate_BRD.float()[:, :, None]
        return (norm(gated.flatten(1, 2)).float() + h_BSD.float()).to(h_BSD.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
