"""The configurations of SkyReels-V2 and of causal Wan: the shapes of a config.json, and the precision of each part.

A released config.json and one of diffusers say the same in other words. Unknown keys are errors, and numbers have
bounds, so that a file that is wrong by orders of magnitude is an error too.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from models.config import STRICT, Count, Pixels, Width, checked
from models.errors import InputError
from models.family import Figures
from models.protocols import CELL_FRAMES, CELL_PIXELS, KVGeometry

Dtype = Literal["bfloat16", "float16", "float32"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The published negative prompt."""
IMAGE_TOKENS = 257
"""Of an image that a model sees through CLIP."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WanShapes:
    """Shapes of the DiT, by the names of a released config.json, which leaves out those that have a default here."""

    model_type: Literal["t2v", "i2v"]
    dim: Width
    ffn_dim: Width
    num_heads: Count
    num_layers: Count
    in_dim: Count = 16
    out_dim: Count = 16
    freq_dim: Annotated[int, Field(ge=2, le=100_000, multiple_of=2)] = 256
    text_dim: Width = 4096
    text_len: Annotated[int, Field(ge=1, le=100_000)] = 512
    clip_dim: Width = 1280
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    inject_sample_info: bool = False  # the model takes frames per second as a condition
    patch_size: tuple[Literal[1], Literal[2], Literal[2]] = (1, 2, 2)
    window_size: tuple[Literal[-1], Literal[-1]] = (-1, -1)
    qk_norm: Literal[True] = True
    cross_attn_norm: Literal[True] = True

    @model_validator(mode="after")
    def _shapes_fit(self) -> WanShapes:
        if self.dim % self.num_heads:
            raise ValueError("dim must be a multiple of num_heads")
        if self.head_size % 2 or self.head_size < 6:
            raise ValueError("dim / num_heads must be even, and 6 or more")
        if self.model_type == "t2v" and self.in_dim != self.out_dim:
            raise ValueError("in_dim must equal out_dim in a model of text alone")
        if self.sees_image and self.in_dim <= self.out_dim:
            raise ValueError("in_dim must be more than out_dim in a model that sees an image")
        return self

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads

    @property
    def sees_image(self) -> bool:
        """Image to video: the channels of an image come in beside the latent's, and its tokens beside the text's."""
        return self.model_type == "i2v"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WanPrecision:
    """What is computed in which precision."""

    dtype: Dtype = "bfloat16"  # of weights, big products and hidden states
    fp32_islands: bool = True
    """Time, modulation, layer norms, the residual within a layer and the head in fp32 (specification 1.4)."""
    rotary: Literal["complex64", "complex128"] = "complex64"
    norm_rounds: bool = False
    """RMS norms round to `dtype` before they multiply with their weight, and not after it."""


SKYREELS = WanPrecision()
CAUSAL_WAN = WanPrecision(fp32_islands=False, rotary="complex128", norm_rounds=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WanRuntime:
    """What a video is like if nothing else is asked for; the defaults are those of SkyReels-V2 with FlowCache."""

    method: Literal["diffusion forcing", "self-forcing", "image to video"] = "diffusion forcing"
    sampling: Literal["groups", "window", "staggered"] = "groups"
    """Of diffusion forcing, as `--sampling`: groups of frames in order, or whole windows in step or staggered."""
    num_steps: Annotated[int, Field(ge=1, le=1_000)] = 50
    shift: Annotated[float, Field(ge=0.01, le=100)] = 8.0  # of the noise levels
    guidance: Annotated[float, Field(ge=0, le=100)] = 6.0  # 1 and less runs no negative prompt
    negative: str = NEGATIVE
    chunk_width: Count = 5  # latent frames that are denoised together (`causal_block_size`)
    stagger: Annotated[int, Field(ge=0, le=1_000)] = 5  # steps between two chunks (`ar_step`)
    window_frames: Count = 25  # latent frames that the model is run on at most
    overlap_frames: Count = 5  # latent frames of the window before that one goes on from
    noise_condition: Annotated[int, Field(ge=0, le=999)] = 20  # noise mixed into those, in thousandths
    fps: Count = 24
    height: Pixels = 544
    width: Pixels = 960

    @model_validator(mode="after")
    def _frames_fit(self) -> WanRuntime:
        if self.window_frames % self.chunk_width or self.overlap_frames % self.chunk_width:
            raise ValueError("window_frames and overlap_frames must be whole chunks of chunk_width")
        if self.overlap_frames >= self.window_frames:
            raise ValueError("overlap_frames must be fewer than window_frames")
        return self


SELF_FORCING = WanRuntime(
    method="self-forcing",
    num_steps=4,
    shift=5.0,
    guidance=1.0,
    negative="",
    chunk_width=3,
    stagger=4,
    window_frames=21,
    overlap_frames=3,
    noise_condition=0,
    fps=16,
    height=480,
    width=832,
)


IMAGE_TO_VIDEO = WanRuntime(
    method="image to video",
    sampling="window",
    shift=5.0,
    guidance=5.0,
    chunk_width=1,
    stagger=0,
    overlap_frames=1,
    noise_condition=0,
)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WanConfig:
    """A model, a `ModelConfig`."""

    shapes: WanShapes
    precision: WanPrecision
    runtime: WanRuntime = WanRuntime()

    def to_dict(self) -> dict[str, Any]:
        return TypeAdapter(WanConfig).dump_python(self, mode="json")

    @property
    def figures(self) -> Figures:
        shapes, runtime, dim = self.shapes, self.runtime, self.shapes.dim
        keys = self.chunk_tokens(runtime.height, runtime.width) * self.window_chunks
        chunks = self.window_chunks
        attended = shapes.text_len + keys * (chunks + 1) / (2 * chunks)  # each chunk sees itself and those before it
        return Figures(
            layers=shapes.num_layers,
            key_heads=shapes.num_heads,
            dtype=self.dtype,
            layer_cost=6 * dim * dim + 2 * dim * shapes.ffn_dim + 2 * dim * attended,
            edge_cost=float(4 * dim * shapes.in_dim),
            hidden=dim * (2 if self.precision.fp32_islands else 1),  # the residual within a layer is fp32
            mlp=shapes.ffn_dim,
            text_rows=shapes.text_len + (IMAGE_TOKENS if shapes.sees_image else 0),
            text_values=2 * dim,
            encodes_on="the GPU, or on the CPU without one,",
            height=runtime.height,
            width=runtime.width,
            fps=runtime.fps,
            num_steps=runtime.num_steps,
            chunk_frames=self.chunk_latents * CELL_FRAMES,
            frames=runtime.window_frames * CELL_FRAMES,
            window=1 if runtime.method == "self-forcing" else self.window_chunks,
            most_chunks=None if runtime.method == "self-forcing" else self.window_chunks,
            sees_image=shapes.sees_image,
            ends=runtime.method == "diffusion forcing" and runtime.sampling != "groups",
        )

    @property
    def chunk_latents(self) -> int:
        """Latent frames of what the engine makes as one."""
        return self.runtime.chunk_width if self.runtime.sampling == "groups" else self.runtime.window_frames

    @property
    def window_chunks(self) -> int:
        """Chunks of a window."""
        return self.runtime.window_frames // self.chunk_latents

    def chunk_tokens(self, height: int, width: int) -> int:
        _, rows, columns = self.shapes.patch_size
        return self.chunk_latents * (height // (CELL_PIXELS * rows)) * (width // (CELL_PIXELS * columns))

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.precision.dtype]

    @property
    def island_dtype(self) -> torch.dtype:
        """The dtype of what is fp32 with `fp32_islands`."""
        return torch.float32 if self.precision.fp32_islands else self.dtype

    def kv_geometry(self, layers: range, device: torch.device) -> KVGeometry:
        heads = self.shapes.num_heads
        return KVGeometry(
            layers=layers,
            query_heads=heads,
            key_heads=heads,
            head_size=self.shapes.head_size,
            dtype=self.dtype,
            device=device,
        )


# ---- config.json

_ANY = {"_class_name", "_diffusers_version", "_name_or_path"}  # say nothing of shapes
_CLASSES = {"SkyReelsV2Transformer3DModel"}
_DIFFUSERS = {
    "attention_head_dim",
    "num_attention_heads",
    "in_channels",
    "out_channels",
    "image_dim",
    "added_kv_proj_dim",
    "rope_max_seq_len",
    "pos_embed_seq_len",
    "num_frame_per_block",
}


def shapes_from_dict(values: dict[str, Any], *, source: str) -> WanShapes:
    """Shapes of a decoded config.json, a released one or one of diffusers. An `InputError` if a key or a value does not
    fit; the line begins with `source`."""
    if values.get("_class_name") in _CLASSES or values.keys() & _DIFFUSERS:
        values = _released_words(values, source)
    return checked(WanShapes, {key: value for key, value in values.items() if key not in _ANY}, source=source)


def _released_words(values: dict[str, Any], source: str) -> dict[str, Any]:
    """What a config.json of diffusers says, in the words of a released one."""
    shared = {field.name for field in fields(WanShapes)} - {"qk_norm"}
    if unknown := sorted(values.keys() - _DIFFUSERS - _ANY - shared - {"qk_norm"}):
        raise InputError(f"{source}: {unknown[0]}: unknown key")
    for key in ("num_attention_heads", "attention_head_dim", "in_channels", "ffn_dim", "num_layers"):
        if not isinstance(values.get(key), int):
            raise InputError(f"{source}: {key}: {'key is missing' if key not in values else 'must be a whole number'}")
    heads, channels = values["num_attention_heads"], values["in_channels"]
    if values.get("qk_norm", norm := "rms_norm_across_heads") != norm:
        raise InputError(f"{source}: qk_norm is {values['qk_norm']!r}, but only {norm!r} is known")
    image = values.get("image_dim")
    said = {"clip_dim": image} if image is not None else {}
    said |= {
        "model_type": "t2v" if image is None else "i2v",
        "dim": heads * values["attention_head_dim"],
        "num_heads": heads,
        "in_dim": channels,
        "out_dim": values.get("out_channels") or channels,
    }
    return said | {key: value for key, value in values.items() if key in shared - said.keys()}
