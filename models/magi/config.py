"""The released MAGI-1 configuration files, of the model and of its autoencoder, as checked, frozen dataclasses.

A model's file is a JSON object with exactly three objects, and every field must be there: a missing or an unknown key
is an error, as in the released loader. Numbers have bounds, so that a file that is wrong by orders of magnitude is an
error too, and not a crash or a hang later. What the numbers mean is said where they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from models.config import STRICT, Count, Pixels, Width, checked, read_json
from models.family import Figures
from models.protocols import CELL_FRAMES, CELL_PIXELS, KVGeometry

_Ratio = Annotated[float, Field(gt=0, le=100)]
_Chunks = Annotated[int, Field(ge=1, le=1_000_000)]
_Patch = Annotated[int, Field(ge=1, le=64)]
_Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
_DTYPES = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16, "torch.float32": torch.float32}
_CELL_COST = 1.9e9
"""Multiplications that the layers make in the time in which a latent cell is decoded: 0.39 s for the 48,600 of a chunk,
where they reach 480 TFLOP/s (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Shapes of the DiT (`model_config`)."""

    model_name: Literal["videodit_ardf"]
    num_layers: Count
    hidden_size: Width
    ffn_hidden_size: Width
    num_attention_heads: Count
    num_query_groups: Count
    kv_channels: Width
    layernorm_epsilon: Annotated[float, Field(gt=0, le=1)]
    apply_layernorm_1p: Literal[True]
    x_rescale_factor: _Scale
    half_channel_vae: bool
    params_dtype: Literal["torch.bfloat16", "torch.float16", "torch.float32"]
    patch_size: _Patch
    t_patch_size: Literal[1]
    in_channels: Count
    out_channels: Count
    cond_hidden_ratio: _Ratio
    caption_channels: Width
    caption_max_length: Annotated[int, Field(ge=2, le=100_000)]
    xattn_cond_hidden_ratio: _Ratio
    cond_gating_ratio: _Ratio
    gated_linear_unit: bool

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError("num_attention_heads must be a multiple of num_query_groups")
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            raise ValueError("num_attention_heads x kv_channels must equal hidden_size")
        if self.kv_channels % 8:
            raise ValueError("kv_channels must be a multiple of 8")
        if self.half_channel_vae and self.in_channels % 2:
            raise ValueError("in_channels must be even with half_channel_vae")
        if self.out_channels < self.latent_channels:
            raise ValueError("out_channels must not be fewer than the channels of a latent")
        ratios = (self.cond_hidden_ratio, self.xattn_cond_hidden_ratio, self.cond_gating_ratio)
        if min(ratios) * self.hidden_size < 1:
            raise ValueError("a conditioning ratio leaves no channels of hidden_size")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return _DTYPES[self.params_dtype]

    @property
    def cond_size(self) -> int:
        """Width of the conditioning vector (C in the specification)."""
        return int(self.hidden_size * self.cond_hidden_ratio)

    def kv_geometry(self, layers: range, device: torch.device) -> KVGeometry:
        """Shape of the KV of some layers."""
        return KVGeometry(
            layers=layers,
            query_heads=self.num_attention_heads,
            key_heads=self.num_query_groups,
            head_size=self.kv_channels,
            dtype=self.dtype,
            device=device,
        )

    @property
    def latent_channels(self) -> int:
        """Channels of a latent as the sampler holds it: half of `in_channels` for the 24B model."""
        return self.in_channels // 2 if self.half_channel_vae else self.in_channels


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RuntimeConfig:
    """Sampling settings (`runtime_config`)."""

    cfg_number: Literal[1, 3]
    cfg_t_range: tuple[float, ...]
    prev_chunk_scales: tuple[float, ...]
    text_scales: tuple[float, ...]
    noise2clean_kvrange: tuple[_Chunks, ...]
    clean_chunk_kvrange: Annotated[int, Field(ge=-1, le=1_000_000)]  # -1: none of its own
    clean_t: Annotated[float, Field(ge=0, le=1)]
    seed: int
    num_frames: Annotated[int, Field(ge=1, le=100_000_000)]
    video_size_h: Pixels
    video_size_w: Pixels
    num_steps: Annotated[int, Field(ge=1, le=10_000)]
    window_size: Count
    fps: Count
    chunk_width: Count
    t5_pretrained: str | None
    t5_device: str
    vae_pretrained: str | None
    scale_factor: _Scale
    temporal_downsample_factor: Literal[4]  # CELL_FRAMES, as of every autoencoder there is
    load: str | None

    @model_validator(mode="after")
    def _tables_fit(self) -> RuntimeConfig:
        if not len(self.cfg_t_range) == len(self.prev_chunk_scales) == len(self.text_scales):
            raise ValueError("cfg_t_range, prev_chunk_scales and text_scales must have the same length")
        if self.cfg_number > 1 and not self.cfg_t_range:
            raise ValueError("cfg_t_range must not be empty in a model with guidance")
        if self.clean_chunk_kvrange == 0:
            raise ValueError("clean_chunk_kvrange must be -1, or 1 or more")
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class EngineConfig:
    """Settings of the released runtime (`engine_config`). This engine reads `distill`, `fp8_quant`, `shortcut_mode`
    and `distill_nearly_clean_chunk_threshold`; what changes no numbers, the layout over GPUs, the backend and its
    timeout, where keys and values lie, comes from the command line."""

    distributed_backend: str
    distributed_timeout_minutes: int
    pp_size: int
    cp_size: int
    cp_strategy: str
    ulysses_overlap_degree: int
    fp8_quant: bool
    distill_nearly_clean_chunk_threshold: float
    shortcut_mode: str
    distill: bool
    kv_offload: bool
    enable_cuda_graph: bool


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class MagiConfig:
    """A whole configuration file, a `models.family.ModelConfig`."""

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    engine_config: EngineConfig

    @model_validator(mode="after")
    def _guidance_fits(self) -> MagiConfig:
        distilled = self.engine_config.fp8_quant or self.engine_config.distill
        if self.runtime_config.cfg_number != (1 if distilled else 3):
            raise ValueError(f"cfg_number must be {1 if distilled else 3} for this kind of model")
        return self

    @property
    def figures(self) -> Figures:
        model, runtime = self.model_config, self.runtime_config
        tokens = self.chunk_tokens(runtime.video_size_h, runtime.video_size_w)
        ranges = runtime.noise2clean_kvrange or (runtime.window_size,)
        hidden, keys = model.hidden_size, model.num_query_groups * model.kv_channels
        projections = hidden * (2 * hidden + 2 * keys) + 2 * hidden * hidden  # queries twice, keys, values; output
        mlp = hidden * model.ffn_hidden_size * (3 if model.gated_linear_unit else 2)
        return Figures(
            layers=model.num_layers,
            key_heads=model.num_query_groups,
            dtype=model.dtype,
            layer_cost=projections + mlp + 2 * hidden * tokens * sum(ranges) / len(ranges),
            edge_cost=float(hidden * model.patch_size**2 * model.t_patch_size * model.in_channels),
            hidden=hidden,
            mlp=model.ffn_hidden_size,
            text_rows=model.caption_max_length,
            text_values=2 * keys,
            encodes_on=None if runtime.t5_pretrained is None else runtime.t5_device,
            height=runtime.video_size_h,
            width=runtime.video_size_w,
            fps=runtime.fps,
            num_steps=runtime.num_steps,
            chunk_frames=runtime.chunk_width * runtime.temporal_downsample_factor,
            frames=runtime.num_frames,
            window=runtime.window_size,
            decode_cost=0.0 if runtime.t5_pretrained is None else self._decode_cost(),
            copies=runtime.cfg_number == 1,
            boundless=not runtime.noise2clean_kvrange,
            offload=self.engine_config.kv_offload,
        )

    def _decode_cost(self) -> float:
        """Of the released autoencoder; that of magi-pocket is too small to count."""
        passes = self.runtime_config.num_steps * self.runtime_config.cfg_number
        return _CELL_COST * self.model_config.patch_size**2 / passes

    def kv_geometry(self, layers: range, device: torch.device) -> KVGeometry:
        return self.model_config.kv_geometry(layers, device)

    def chunk_tokens(self, height: int, width: int) -> int:
        side = CELL_PIXELS * self.model_config.patch_size
        return self.runtime_config.chunk_width * (height // side) * (width // side)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> MagiConfig:
        """Check a decoded configuration; an `InputError` that begins with `source` if a key or a value does not fit."""
        return checked(cls, values, source=source)

    @classmethod
    def from_json(cls, path: Path) -> MagiConfig:
        """Read a released configuration file as it is; an `InputError` if it cannot be read or does not fit."""
        return cls.from_dict(read_json(path, "the configuration"), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        return TypeAdapter(MagiConfig).dump_python(self, mode="json")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class VaeConfig:
    """The `ddconfig` object of the autoencoder's config.json (specification 1.1)."""

    video_size: Pixels = 256
    video_length: Count = 16
    patch_size: _Patch = CELL_PIXELS
    patch_length: Count = CELL_FRAMES
    in_chans: Count = 3
    z_chans: Count = 4
    double_z: Literal[True] = True
    embed_dim: Width = 768
    depth: Count = 12
    num_heads: Count = 12
    mlp_ratio: _Ratio = 4.0
    qkv_bias: Literal[True]
    ln_in_attn: Literal[True]
    conv_last_layer: Literal[True]
    with_cls_token: Literal[True] = True
    norm_code: Literal[False] = False
    use_rope: Literal[False] = False
    use_final_proj: bool = False
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    @model_validator(mode="after")
    def _shapes_fit(self) -> VaeConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError("embed_dim must be a multiple of num_heads")
        if self.embed_dim * self.mlp_ratio < 1:
            raise ValueError("mlp_ratio leaves no channels of embed_dim")
        if min(self.grid) < 1:
            raise ValueError("video_size and video_length must hold at least one patch")
        if not self.patch_values[-1]:
            raise ValueError("embed_dim holds no channel for each pixel of a patch")
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid (t, h, w) that the position embedding was trained at."""
        side = self.video_size // self.patch_size
        return self.video_length // self.patch_length, side, side

    @property
    def patch_values(self) -> tuple[int, int, int, int]:
        """How a decoded token is read: (frames, height, width, channels), channels fastest (1.5)."""
        pixels = self.patch_length * self.patch_size**2
        width = 4 * pixels if self.use_final_proj else self.embed_dim
        return self.patch_length, self.patch_size, self.patch_size, width // pixels
