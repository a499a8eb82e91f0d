"""The released MAGI-1 configuration files, as checked, frozen dataclasses.

A configuration file is a JSON object with exactly three objects, and every field must be there: a missing or an unknown
key is an error, as in the released loader. The module knows the format only; what the numbers mean is said where they
are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from models.errors import InputError

_STRICT = ConfigDict(extra="forbid")
_DTYPES = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16, "torch.float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ModelConfig:
    """Shapes of the DiT (`model_config`)."""

    model_name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    layernorm_epsilon: float
    apply_layernorm_1p: bool
    x_rescale_factor: float
    half_channel_vae: bool
    params_dtype: Literal["torch.bfloat16", "torch.float16", "torch.float32"]
    patch_size: int
    t_patch_size: int
    in_channels: int
    out_channels: int
    cond_hidden_ratio: float
    caption_channels: int
    caption_max_length: int
    xattn_cond_hidden_ratio: float
    cond_gating_ratio: float
    gated_linear_unit: bool

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError("num_attention_heads must be a multiple of num_query_groups")
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            raise ValueError("num_attention_heads x kv_channels must equal hidden_size")
        if self.kv_channels % 8:
            raise ValueError("kv_channels must be a multiple of 8")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return _DTYPES[self.params_dtype]

    @property
    def cond_size(self) -> int:
        """Width of the conditioning vector (C in the specification)."""
        return int(self.hidden_size * self.cond_hidden_ratio)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent as the sampler holds it: half of `in_channels` for the 24B model."""
        return self.in_channels // 2 if self.half_channel_vae else self.in_channels


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class RuntimeConfig:
    """Sampling settings (`runtime_config`)."""

    cfg_number: Literal[1, 3]
    cfg_t_range: tuple[float, ...]
    prev_chunk_scales: tuple[float, ...]
    text_scales: tuple[float, ...]
    noise2clean_kvrange: tuple[int, ...]
    clean_chunk_kvrange: int
    clean_t: float
    seed: int
    num_frames: int
    video_size_h: int
    video_size_w: int
    num_steps: int
    window_size: int
    fps: int
    chunk_width: int
    t5_pretrained: str | None
    t5_device: str
    vae_pretrained: str | None
    scale_factor: float
    temporal_downsample_factor: int
    load: str | None

    @model_validator(mode="after")
    def _tables_fit(self) -> RuntimeConfig:
        if not len(self.cfg_t_range) == len(self.prev_chunk_scales) == len(self.text_scales):
            raise ValueError("cfg_t_range, prev_chunk_scales and text_scales must have the same length")
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class EngineConfig:
    """Settings of the released runtime (`engine_config`). This engine reads `distill`, `fp8_quant`, `shortcut_mode`
    and `distill_nearly_clean_chunk_threshold`; the layout over GPUs comes from the command line."""

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


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class MagiConfig:
    """A whole configuration file."""

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    engine_config: EngineConfig

    @model_validator(mode="after")
    def _guidance_fits(self) -> MagiConfig:
        distilled = self.engine_config.fp8_quant or self.engine_config.distill
        if self.runtime_config.cfg_number != (1 if distilled else 3):
            raise ValueError(f"cfg_number must be {1 if distilled else 3} for this kind of model")
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> MagiConfig:
        """Check a decoded configuration; `source` names it in errors.

        Raises:
            InputError: a key is unknown or missing, or a value does not fit.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InputError(f"{source}: {_first_problem(error)}") from None

    @classmethod
    def from_json(cls, path: Path) -> MagiConfig:
        """Read a released configuration file as it is.

        Raises:
            InputError: the file cannot be read, is no JSON, or does not fit.
        """
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        return cls.from_dict(values, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it would stand in a file."""
        return TypeAdapter(MagiConfig).dump_python(self, mode="json")


def _first_problem(error: ValidationError) -> str:
    found = error.errors()
    first = found[0]
    where = ".".join(str(part) for part in first["loc"])
    what = {"missing": "key is missing", "unexpected_keyword_argument": "unknown key"}.get(first["type"], first["msg"])
    more = f" (and {len(found) - 1} more problems)" if len(found) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"
