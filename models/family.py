"""What the commands and the layout of ranks ask of a family of models, besides what the engine does (`protocols`).

A `ModelConfig` answers for one model; a `Family` knows names, folders and files. `models/families.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from models.checkpoint import Stored
from models.protocols import KVGeometry, Sampling


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
    window: int  # chunks that are denoised at once
    offload: bool = False  # finished chunks are to be in host memory, where there is a GPU
    decode_cost: float = 0.0  # the same of the autoencoder, which works for a chunk once in all its passes
    most_chunks: int | None = None  # of what the model is run on; a longer video is made of several


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


class Preset(Protocol):
    """A model that can be asked for by name."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""

    @property
    def summary(self) -> str:
        """What it is good for."""

    @property
    def config(self) -> Callable[[], Any]:
        """Makes its configuration."""

    @property
    def parameters(self) -> int:
        """Of the DiT."""

    @property
    def folder(self) -> str | None:
        """Where the weights are; None if they ship with the project."""

    @property
    def disk(self) -> int:
        """Bytes of files."""


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

    def stage_bytes(self, config: Any, layers: range) -> int:
        """Bytes that the DiT with these layers takes once it is loaded."""

    def vae_bytes(self, config: Any, vae: Path | None) -> int:
        """The same of the autoencoder that is there, else of the model's own."""

    def sampling(self, config: Any, num_steps: int, *, clean_pass: bool, copy_pass: bool) -> Sampling:
        """How to denoise; as `Pipeline.sampling`."""
