"""What the commands and the layout of ranks ask of a family of models, besides what the engine does (`protocols`).

A `ModelConfig` answers for one model; a `Family` knows names, folders and files. `models/families.py` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch

from models.attention import Attention
from models.checkpoint import Loading, Stored
from models.protocols import KVGeometry, Pipeline, Sampling, VideoModel
from models.text import TextDtype, TextLoading


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What planning needs to know of a model, and of its videos if nothing else is asked for."""

    layers: int
    key_heads: int
    dtype: torch.dtype  # of the hidden states
    layer_cost: float  # multiplications of a layer for one token, in a video of its own size
    edge_cost: float  # the same of the embedding, and of reading out
    hidden: int  # channels
    mlp: int  # channels within the MLP
    text_rows: int  # of a text, at most
    text_values: int  # keys and values of one row in a layer
    encodes_on: str | None  # device of the text encoder; None for a vocabulary of its own
    height: int  # pixels
    width: int
    fps: int
    num_steps: int
    chunk_frames: int  # frames of a chunk
    frames: int  # of a video
    window: int  # chunks that are denoised at once
    copies: bool = False  # there is a copy pass, which may be left out
    boundless: bool = False  # it looks back at all of a video, whose KV grows with it
    offload: bool = False  # finished chunks are to be in host memory, where there is a GPU
    decode_cost: float = 0.0  # the same of the autoencoder, which works for a chunk once in all its passes
    most_chunks: int | None = None  # of what the model is run on; a longer video is made of several
    sees_image: bool = False  # it makes nothing without an image
    ends: bool = False  # it can be told with which image a video ends


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFigures:
    """What the presets of reuse of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    default: Literal["none", "flowcache-slow", "flowcache-fast", "teacache"]  # holds where no preset is asked for
    reuse: Literal["residual", "extrapolate"]  # stands in for a step that is left out; docs/reuse.md has the figures
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated in place of that; 1 never
    distance: Literal["fp32", "bf16", "condition"] = "fp32"  # that is summed
    polynomial: tuple[float, ...] = ()  # that it is put into first, of the highest power first; none takes it as it is
    clean_pass: bool = True  # a run without reuse renews the KV of a finished chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What was asked for of a model, by the options of the command line; None where nothing was."""

    name: str  # of the model, for people
    preset: bool = False  # it is asked for by that name, and not by a file
    weights: Path | None = None  # folder of them
    random: bool = False  # they are random numbers
    fps: int | None = None
    window: int | None = None
    guidance_times: str | None = None
    chunk_scales: str | None = None
    text_scales: str | None = None
    special: str | None = None
    special_tokens: Path | None = None
    negative: bool = False
    t5_device: str | None = None
    t5_dtype: TextDtype | None = None
    prompt_cache: Path | None = None  # that was asked for
    usual_cache: Path | None = None  # where prompts are kept in any case
    copy_weight: float | None = None
    sampling: str | None = None  # a family's name of one of its ways
    precision: str | None = None  # `fast`

    def given(self, *names: str) -> str | None:
        """The first of these options that was given, as it is written."""
        found = next((name for name in names if getattr(self, name) not in (None, False)), None)
        return None if found is None else "--" + found.replace("_", "-")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoader(ABC):
    """Loads one model, or a part of it. It is sent to ranks, so it holds no weights."""

    config: Any  # the model's configuration, a `ModelConfig`
    weights: Path | None = None  # folder of its weights; every node must see it
    text: TextLoading = TextLoading()  # how prompts are read

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """Plain values that name the model and its weights; a checkpoint is taken up by the same only."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that a video depends on besides the configuration."""

    @property
    @abstractmethod
    def vae(self) -> Path | None:
        """Where its autoencoder is; None for random weights. An `InputError` says what is missing."""

    @abstractmethod
    def pipeline(self, loading: Loading) -> Pipeline:
        """Layers, text encoder and autoencoder; an `InputError` says what is missing or damaged."""

    @abstractmethod
    def stage(self, loading: Loading) -> StageLayers:
        """Layers alone; errors likewise."""

    def absolute(self) -> Self:
        """The same for another working directory."""
        return replace(self, weights=None if self.weights is None else self.weights.absolute())

    def with_prompts(self, prompts: tuple[str, ...]) -> Self:
        """The same, with prompts that are known before the model is loaded."""
        return replace(self, text=replace(self.text, prompts=prompts))


class StageLayers(VideoModel, Protocol):
    """Layers of a model, and what their KV views attend with."""

    @property
    def attention(self) -> Attention:
        """The attention backend."""


class ModelConfig(Protocol):
    """The configuration of one model."""

    @property
    def figures(self) -> Figures:
        """What planning needs to know."""

    def chunk_tokens(self, height: int, width: int) -> int:
        """Tokens of a chunk of a video of that size in pixels."""

    def kv_geometry(self, layers: range, device: torch.device) -> KVGeometry:
        """Shape of the KV of some layers."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model that can be asked for by name."""

    name: str  # what it is called on the command line
    summary: str  # what it is good for
    config: Callable[[], Any]  # makes its configuration
    parameters: int  # of the DiT, the scales of a quantised model counted
    stored: int  # bytes of the DiT's weights on disk
    vae_parameters: int  # of the autoencoder
    others: int  # bytes of the other files: the autoencoder's and the text encoder's
    folder: str | None  # where the weights are; None if they ship with the project

    @property
    def disk(self) -> int:
        """Bytes of files."""
        return self.stored + self.others


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a downloaded model."""

    name: str
    where: Path
    check: Callable[[], Mapping[str, Stored] | int | str]
    """Its tensors, seen to fit, or the bytes of its weights, or words; an `InputError` says what is damaged."""


class Family(Protocol):
    """A family of models. Configurations that it is given are its own."""

    @property
    def config_type(self) -> type:
        """Of its configurations."""

    @property
    def notes(self) -> str:
        """Where released weights are, and what they need."""

    @property
    def presets(self) -> Mapping[str, Preset]:
        """The models that can be asked for, by name."""

    def preset_of(self, config: Any) -> Preset | None:
        """The preset of a configuration, if it is one."""

    def describe(self, config: Any) -> str:
        """What a model that is no preset is, in words."""

    def holds_model(self, folder: Path) -> bool:
        """Whether a folder looks like one of this family."""

    def recognise(self, folder: Path) -> Any:
        """The configuration of the model in a folder; an `InputError` if there is none."""

    def parts(self, config: Any, folder: Path, tokens: Path | None) -> Iterator[Part]:
        """The parts of a downloaded model, the DiT first; an `InputError` says all that is missing of the others."""

    def changed(self, config: Any, choices: Choices) -> Any:
        """The configuration with the settings of sampling that were given; an `InputError` says what does not fit."""

    def loader(self, config: Any, choices: Choices) -> ModelLoader:
        """What loads the model; an `InputError` says which options are not for it."""

    def reuse_figures(self, config: Any) -> ReuseFigures | None:
        """Of the presets of reuse; None if there are none for it."""

    def check_prompt(self, config: Any, prompt: str) -> None:
        """An `InputError` says what the model cannot read."""

    def check_negative(self, config: Any) -> None:
        """An `InputError` says that the model has no text of what is not wanted."""

    def stage_bytes(self, config: Any, layers: range) -> int:
        """Bytes that the DiT with these layers takes once it is loaded."""

    def vae_bytes(self, config: Any, vae: Path | None) -> int:
        """The same of the autoencoder that is there, else of the model's own."""

    def sampling(
        self, config: Any, num_steps: int, *, clean_pass: bool, copy_pass: bool, given: int = 0, ends: int = 0
    ) -> Sampling:
        """How to denoise; as `Pipeline.sampling`."""
