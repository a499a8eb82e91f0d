"""One transformer layer of MAGI-1's DiT (specification 6.3).

What the layer attends to is behind `KVView`: it hands over keys and values, then asks with queries. It does not know
whether they are kept, compressed or sent to other ranks.

Shapes: B batch, S tokens, D hidden, C condition, H query heads, G key heads, d head size, N text tokens, R chunks in S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.magi.config import ModelConfig
from models.magi.fp8 import Fp8ChannelLinear, Fp8TensorLinear
from models.magi.norms import LayerNorm, LayerNorm1p
from models.magi.rope import apply_rotary
from models.protocols import KVView


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
