"""The DiT of MAGI-1, a `VideoModel`: layers, embeddings, output (specification 5.3 and part 6).

The model's parts are called one by one, since a stage of a pipeline runs only some of them. What a layer attends to is
behind `KVView`: it hands over keys and values, then asks with queries. Nothing here knows ranks, requests or caches, or
whether keys are kept, compressed or sent to other ranks.

Shapes: B batch, R chunks, T h w latent frames and cells of them all, S tokens = T * h/2 * w/2, D hidden, C condition,
H query heads, G key heads, d head size, N text tokens, n rotary bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, attention_backend
from models.checkpoint import WHOLE, Loading
from models.linear import linear_fp32
from models.magi.config import ModelConfig
from models.magi.layers import (
    Fp8Linear,
    LayerNorm,
    LayerNorm1p,
    RotaryBands,
    apply_rotary,
    product_in_fp32,
)
from models.protocols import Caption, KVGeometry, KVView, Modulation, PassCondition, Positions, TextKV

NULL_TEXT_ROWS = 50
"""How many rows of the learned null caption stand for "no text" (specification 2.4)."""
_FREQUENCIES = 128
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

# ---- a layer


class _ProjectionIn(nn.Module):
    """`linear_qkv`: a pre-norm and four projections, for self-attention (q, k, v) and cross-attention (qx).

    `fused` is the weights of all four, once they are final. Quantised ones have scales of their own and stay apart.
    """

    def __init__(self, config: ModelConfig, fp8: bool) -> None:
        super().__init__()
        dim, keys = config.hidden_size, config.num_query_groups * config.kv_channels
        linear = Fp8Linear if fp8 else _linear
        self.layer_norm = LayerNorm(dim, eps=config.layernorm_epsilon)
        self.q = linear(dim, dim)
        self.qx = linear(dim, dim)
        self.k = linear(dim, keys)
        self.v = linear(dim, keys)
        self.fused: Tensor | None = None

    def forward(self, h_BSD: Tensor) -> tuple[Tensor, ...]:
        z = self.layer_norm(h_BSD)
        parts = self.q, self.qx, self.k, self.v
        if self.fused is None:
            return tuple(part(z) for part in parts)
        return F.linear(z, self.fused).split([len(part.weight) for part in parts], dim=-1)

    def fuse(self) -> None:
        """Join the weights; the four become views of the result."""
        parts = self.q, self.qx, self.k, self.v
        if any(isinstance(part, Fp8Linear) for part in parts):
            return
        self.fused = torch.cat([part.weight for part in parts])
        for part, rows in zip(parts, self.fused.split([len(part.weight) for part in parts]), strict=True):
            part.weight = nn.Parameter(rows, requires_grad=False)


class _Attention(nn.Module):
    """`self_attention`: self-attention over the view and cross-attention over the text, one output projection."""

    def __init__(self, config: ModelConfig, fp8: bool, precise: bool) -> None:
        super().__init__()
        dim, d, eps = config.hidden_size, config.kv_channels, config.layernorm_epsilon
        self.groups, self.head_size, self.precise = config.num_query_groups, d, precise and not fp8
        self.linear_qkv = _ProjectionIn(config, fp8)
        self.linear_kv_xattn = _linear(int(dim * config.xattn_cond_hidden_ratio), 2 * self.groups * d)
        self.linear_proj = Fp8Linear(2 * dim, dim, smooth=True) if fp8 else _linear(2 * dim, dim)
        self.q_layernorm = LayerNorm1p(d, eps)
        self.k_layernorm = LayerNorm1p(d, eps)
        self.q_layernorm_xattn = LayerNorm1p(d, eps)
        self.k_layernorm_xattn = LayerNorm1p(d, eps)

    def text(self, text_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, G, d] of embedded caption tokens."""
        # Rows of the projection are [K_g, V_g] per key head, not a half of keys and a half of values.
        k, v = self.linear_kv_xattn(text_BND).unflatten(-1, (self.groups, 2 * self.head_size)).chunk(2, dim=-1)
        return self.k_layernorm_xattn(k).to(v.dtype), v

    def heads(self, h_BSD: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        """q, qx [B, S, H, d], k, v [B, S, G, d] of hidden states: normalised, q and k rotated."""
        q, qx, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in self.linear_qkv(h_BSD))
        q_turned, k_turned = (
            apply_rotary(norm(x).float(), rope).to(v.dtype)
            for norm, x in ((self.q_layernorm, q), (self.k_layernorm, k))
        )
        return q_turned, self.q_layernorm_xattn(qx).to(v.dtype), k_turned, v

    def project(self, attended: Tensor, seen: Tensor) -> Tensor:
        """Interleave the two results in groups, as the released layout has it, and project: fp32 by default (6)."""
        attended, seen = (part.flatten(2).unflatten(-1, (8, -1)) for part in (attended, seen))
        parts = torch.stack([attended, seen], dim=-2)
        mixed = parts.flatten(-3)
        return product_in_fp32(mixed, self.linear_proj.weight) if self.precise else self.linear_proj(mixed)


class _Mlp(nn.Module):
    def __init__(self, config: ModelConfig, fp8: bool) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.ffn_hidden_size
        self.gated = config.gated_linear_unit
        self.layer_norm = LayerNorm(dim, eps=config.layernorm_epsilon)
        wide = 2 * hidden if self.gated else hidden
        self.linear_fc1 = Fp8Linear(dim, wide) if fp8 else _linear(dim, wide)
        self.linear_fc2 = Fp8Linear(hidden, dim, smooth=True) if fp8 else _linear(hidden, dim)

    def forward(self, h_BSD: Tensor) -> Tensor:
        x = self.linear_fc1(self.layer_norm(h_BSD))
        if self.gated:  # one rounding: silu and product in fp32
            gate, value = x.chunk(2, dim=-1)
            x = (F.silu(gate.float()) * value).to(x.dtype)
        else:
            x = F.gelu(x)
        return self.linear_fc2(x)


class _Modulation(nn.Module):
    """`ada_modulate_layer`: two gates per chunk from its condition, soft-capped by tanh, of attention and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = int(2 * config.hidden_size * config.cond_gating_ratio)
        self.proj = nn.Sequential(nn.Linear(config.cond_size, width))

    def forward(self, cond_BRC: Tensor) -> tuple[Tensor, ...]:
        gates = torch.tanh(self.proj(F.silu(cond_BRC)).float()).to(cond_BRC.dtype)
        return gates.float().chunk(2, dim=-1)


class TransformerLayer(nn.Module):
    """Attention and MLP, each gated, then normalised ("sandwich"), then added in fp32.

    With `fp8` the big projections are stored as fp8 (quantised checkpoints, all layers but the first and the last).
    Loaded as `precise`, the output projection runs in fp32, as released; otherwise in the model's dtype. `compiled`
    makes few kernels of what is in front of attention, and of what is behind it; layers of a kind share them.
    """

    def __init__(self, config: ModelConfig, loading: Loading, *, fp8: bool) -> None:
        super().__init__()
        self._enter, self._leave = self.enter, self.leave
        if loading.compiled:
            self.compile_regions()
        self.ada_modulate_layer = _Modulation(config)
        self.self_attention = _Attention(config, fp8, loading.precise)
        self.self_attn_post_norm = LayerNorm1p(config.hidden_size, config.layernorm_epsilon)
        self.mlp = _Mlp(config, fp8)
        self.mlp_post_norm = LayerNorm1p(config.hidden_size, config.layernorm_epsilon)

    def forward(
        self,
        h_BSD: Tensor,
        gates_BRD: tuple[Tensor, ...],
        text: tuple[Tensor, ...],
        rope: Tensor,
        view: KVView,
        layer: int,
        cross: Attention,
    ) -> Tensor:
        """Run the layer on hidden states, with one condition per chunk; S must be R equal chunks.

        `gates_BRD` and `text` are as of `MagiDiT.gates` and `text_kv`; `rope` is `RotaryBands.table` for the S tokens;
        `view` is what to attend to, asked with the layer's absolute number; `cross` is the attention for the text.
        """
        q, qx, k, v = self._enter(h_BSD, rope)
        view.store(layer, k, v)  # first: a view that sends them elsewhere works while the text is attended to
        seen = cross(qx, *text)
        return self._leave(h_BSD, view.attend(layer, q), seen, gates_BRD)

    def compile_regions(self, *, dynamic: bool = False) -> None:
        """Make few kernels of each region: for every size that comes or, if `dynamic`, for all sizes."""
        self._enter, self._leave = _compile(self.enter, dynamic), _compile(self.leave, dynamic)

    def enter(self, h_BSD: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        """All in front of attention: q, qx, k, v."""
        return self.self_attention.heads(h_BSD, rope)

    def leave(self, h_BSD: Tensor, attended: Tensor, seen: Tensor, gates_BRD: tuple[Tensor, ...]) -> Tensor:
        """All behind attention, which has `attended` to tokens and `seen` the text."""
        gate_attention, gate_mlp = gates_BRD
        update = self.self_attention.project(attended, seen)
        h_BSD = self._add(h_BSD, update, gate_attention, self.self_attn_post_norm)
        return self._add(h_BSD, self.mlp(h_BSD), gate_mlp, self.mlp_post_norm)

    @staticmethod
    def _add(h_BSD: Tensor, update: Tensor, gate_BRD: Tensor, norm: LayerNorm1p) -> Tensor:
        chunks = gate_BRD.shape[1]
        gated = update.unflatten(1, (chunks, -1)) * gate_BRD[:, :, None]  # in fp32, which the gate is
        return (norm(gated.flatten(1, 2)).float() + h_BSD).to(h_BSD.dtype)


def _compile(region: Callable[_Given, _Made], dynamic: bool) -> Callable[_Given, _Made]:
    """Compile a region. It rounds where the region does, though fused kernels need not."""
    return torch.compile(region, dynamic=dynamic, options={"emulate_precision_casts": True})


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


# ---- the model


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
        return linear_fp32(self.mlp[2], F.silu(linear_fp32(self.mlp[0], wave)))


class _CaptionEmbedder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = int(config.hidden_size * config.xattn_cond_hidden_ratio)
        self.null_caption_embedding = nn.Parameter(torch.zeros(config.caption_max_length, config.caption_channels))
        self.y_proj_xattn = nn.Sequential(nn.Linear(config.caption_channels, width), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(nn.Linear(config.caption_channels, config.cond_size))


class _Blocks(nn.Module):
    """`videodit_blocks`. Layers keep their absolute numbers, so a stage's parameter names are the checkpoint's."""

    def __init__(self, config: ModelConfig, layers: range, loading: Loading, fp8: bool) -> None:
        super().__init__()
        last = config.num_layers - 1
        self.layers = nn.ModuleDict(
            {str(i): TransformerLayer(config, loading, fp8=fp8 and i not in (0, last)) for i in layers}
        )
        if last in layers:
            self.final_layernorm = LayerNorm1p(config.hidden_size, config.layernorm_epsilon)


class MagiDiT(nn.Module):
    """All of the model or one stage of it, a `VideoModel`; `fp8`: of a quantised checkpoint (all layers but the first
    and the last). A stage with layer 0 embeds, one with the last reads out."""

    def __init__(self, config: ModelConfig, loading: Loading = WHOLE, *, fp8: bool = False) -> None:
        super().__init__()
        self.config = config
        self.held = range(config.num_layers) if loading.layers is None else loading.layers
        self.attention: Attention = attention_backend(loading.attention, config.dtype)  # of the text, and of KV views
        if 0 in self.held:
            size = (1, config.patch_size, config.patch_size)
            self.x_embedder = nn.Conv3d(config.in_channels, config.hidden_size, size, size, bias=False)
        self.t_embedder = _TimestepEmbedder(config)
        self.y_embedder = _CaptionEmbedder(config)
        self.rope = RotaryBands(config.kv_channels)
        self.videodit_blocks = _Blocks(config, self.held, loading, fp8)
        if config.num_layers - 1 in self.held:
            values = config.patch_size**2 * config.out_channels
            self.final_linear = nn.ModuleDict({"linear": _linear(config.hidden_size, values)})

    def fuse(self) -> MagiDiT:
        """Work out what follows from the weights alone, which are final now; moving or loading them undoes it."""
        for part in self.modules():
            if isinstance(part, _ProjectionIn):
                part.fuse()
            elif isinstance(part, LayerNorm1p):
                part.gain = part.weight + 1
        return self

    def compile_regions(self, *, dynamic: bool) -> None:
        """As of `TransformerLayer`, in the layers that are held."""
        for _, layer in self._layers():
            layer.compile_regions(dynamic=dynamic)

    def _unfuse(self) -> None:
        for part in self.modules():
            if isinstance(part, _ProjectionIn):
                part.fused = None
            elif isinstance(part, LayerNorm1p):
                part.gain = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MagiDiT:
        self._unfuse()
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`."""
        self._unfuse()
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.rope.bands.device

    @property
    def kv(self) -> KVGeometry:
        return self.config.kv_geometry(self.held, self.device)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def token_count(self, frames: int, height: int, width: int) -> int:
        return math.prod(self.token_grid((frames, height, width)))

    def null_text(self) -> Tensor:
        """The rows that stand for no text, [50, caption channels] or fewer (2.4)."""
        return self.y_embedder.null_caption_embedding[:NULL_TEXT_ROWS]

    def token_grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Token grid (T, H, W) of a latent (T, h, w)."""
        frames, height, width = latent
        return frames, height // self.config.patch_size, width // self.config.patch_size

    def patches(self, x: Tensor) -> Tensor:
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
        """Condition [B, R, C] of chunks at times t [B, R], 0 noise and 1 clean, in its dtype (6.1, steps 3 to 5).

        `distill` is the step-size constant of a distilled model, None for a base model; `null` takes the null row that
        was trained with dropped captions. The caption itself is not used here.
        """
        embedded = self.t_embedder(t)
        if distill is not None:
            embedded = embedded + self.t_embedder(torch.full_like(t, distill))
        row = self.y_embedder.null_caption_embedding[-1 if null else -2]
        text = linear_fp32(self.y_embedder.y_proj_adaln[0], row)
        return (embedded + text).to(self.config.dtype)

    def embed_text(self, y: Tensor) -> Tensor:
        """Caption tokens that count, [B, N, caption channels] -> [B, N, D] (6.1, step 6)."""
        return F.silu(linear_fp32(self.y_embedder.y_proj_xattn[0], y)).to(self.config.dtype)

    def text(self, caption: Caption) -> TextKV:
        """Keys and values of caption tokens [N, caption channels]; as `VideoModel.text`."""
        return self.text_kv(self.embed_text(caption.text[None]))

    def text_kv(self, text_BND: Tensor) -> TextKV:
        """Keys and values of embedded caption tokens, only those that count, in the layers that are held."""
        return {number: layer.self_attention.text(text_BND) for number, layer in self._layers()}

    def modulation(self, condition: PassCondition) -> Modulation:
        t = torch.full((1, 1), condition.times[0], dtype=torch.float32, device=self.device)
        return self.gates(self.embed_condition(t, distill=condition.distill, null=condition.drop))

    def gates(self, cond_BRC: Tensor) -> Modulation:
        """Gates [B, R, D] fp32 of attention and MLP in the layers that are held, of chunks with these conditions."""
        return {number: layer.ada_modulate_layer(cond_BRC) for number, layer in self._layers()}

    def positions(self, first_frame: int, grid: tuple[int, int, int], tokens: slice = slice(None)) -> Positions:
        """Rotary table [2, S, 3n] of a chunk's tokens; as `VideoModel.positions`."""
        time = first_frame + torch.arange(grid[0], dtype=torch.float32, device=self.device)
        return (self.rope.table(time, self.token_grid(grid)[1:])[:, tokens],)

    def layers(
        self,
        hidden: Tensor,
        modulation: Modulation,
        text: TextKV,
        positions: Positions,
        view: KVView,
        *,
        cross: Attention | None = None,
    ) -> Tensor:
        """Run the layers that are held; as `VideoModel.layers`, or in training with an attention for the text."""
        attention = cross or self.attention
        for number, layer in self._layers():
            hidden = layer(hidden, modulation[number], text[number], positions[0], view, number, attention)
        return hidden

    def _layers(self) -> Iterator[tuple[int, TransformerLayer]]:
        for name, layer in self.videodit_blocks.layers.items():
            yield int(name), cast(TransformerLayer, layer)

    def velocity(self, h_BSD: Tensor, grid: tuple[int, int, int], condition: PassCondition | None = None) -> Tensor:
        """Velocity [B, channels, T, h, w] fp32 of the last hidden states (6.4), which the condition has no part in.

        `grid` is of the latent, (T, h, w).
        """
        normed = self.videodit_blocks.final_layernorm(h_BSD.float())
        x = linear_fp32(self.final_linear["linear"], normed)
        (frames, height, width), p = self.token_grid(grid), self.config.patch_size
        x = x.reshape(-1, frames, height, width, p, p, self.config.out_channels)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, self.config.out_channels, frames, height * p, width * p)
        return x[:, : self.config.latent_channels] / self.config.x_rescale_factor
