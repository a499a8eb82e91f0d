"""The released MAGI-1 configuration files, as checked, frozen dataclasses.

A configuration file is a JSON object with exactly three objects, and every field must be there: a missing or an unknown
key is an error, as in the released loader. Numbers have bounds, so that a file that is wrong by orders of magnitude is
an error too, and not a crash or a hang later. What the numbers mean is said where they are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from models.errors import InputError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Of dataclasses that are read from files: every key is known, every number finite."""

Count = Annotated[int, Field(ge=1, le=1_000)]
"""Of layers, heads, chunks, frames per chunk."""
Width = Annotated[int, Field(ge=1, le=1_000_000)]
"""Of a vector."""
Ratio = Annotated[float, Field(gt=0, le=100)]
"""Of two widths."""
_Chunks = Annotated[int, Field(ge=1, le=1_000_000)]
_Pixels = Annotated[int, Field(ge=16, le=16_384)]
_Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
_Checked = TypeVar("_Checked")
_DTYPES = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16, "torch.float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Shapes of the DiT (`model_config`)."""

    model_name: str
    num_layers: Count
    hidden_size: Width
    ffn_hidden_size: Width
    num_attention_heads: Count
    num_query_groups: Count
    kv_channels: Width
    layernorm_epsilon: Annotated[float, Field(gt=0, le=1)]
    apply_layernorm_1p: bool
    x_rescale_factor: _Scale
    half_channel_vae: bool
    params_dtype: Literal["torch.bfloat16", "torch.float16", "torch.float32"]
    patch_size: Annotated[int, Field(ge=1, le=64)]
    t_patch_size: Literal[1]
    in_channels: Count
    out_channels: Count
    cond_hidden_ratio: Ratio
    caption_channels: Width
    caption_max_length: Annotated[int, Field(ge=2, le=100_000)]
    xattn_cond_hidden_ratio: Ratio
    cond_gating_ratio: Ratio
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
    video_size_h: _Pixels
    video_size_w: _Pixels
    num_steps: Annotated[int, Field(ge=1, le=10_000)]
    window_size: Count
    fps: Count
    chunk_width: Count
    t5_pretrained: str | None
    t5_device: str
    vae_pretrained: str | None
    scale_factor: _Scale
    temporal_downsample_factor: Annotated[int, Field(ge=1, le=64)]
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


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
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
        return checked(cls, values, source=source)

    @classmethod
    def from_json(cls, path: Path) -> MagiConfig:
        """Read a released configuration file as it is.

        Raises:
            InputError: the file cannot be read, is no JSON, or does not fit.
        """
        return cls.from_dict(read_json(path, "the configuration"), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it would stand in a file."""
        return TypeAdapter(MagiConfig).dump_python(self, mode="json")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; `what` names it in errors.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a JSON object")
    return values


def checked(kind: type[_Checked], values: dict[str, Any], *, source: str) -> _Checked:
    """A pydantic dataclass of decoded values.

    Raises:
        InputError: the first value that does not fit, as `source: field: problem`.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        found = error.errors()
    first = found[0]
    where = ".".join(str(part) for part in first["loc"])
    what = {"missing": "key is missing", "unexpected_keyword_argument": "unknown key"}.get(first["type"], first["msg"])
    more = f" (and {len(found) - 1} more problems)" if len(found) > 1 else ""
    raise InputError(f"{source}: {where}: {what}{more}" if where else f"{source}: {what}{more}")
