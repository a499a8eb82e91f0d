"""The models and videos that are measured: magi-pocket, or random weights of any size, whole or one stage of them.

Random weights are drawn tensor by tensor from the tensor's name, so that a stage's are those of the whole model.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.request import Request
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import Loading, MagiPipeline, load_pipeline, load_stage
from models.pocket.clips import SIDE
from models.pocket.preset import pocket_config
from models.pocket.text import PocketEncoder
from models.pocket.words import COLOURS, MOTIONS, SHAPES, Scene

POCKET = "magi-pocket"
PROMPT = "a red circle moving right"
_HEAD, _KEY_HEADS = 48, 4  # size of an attention head, and heads of keys
_GAIN = 0.3 - 1  # of post-norms, which have an offset of one


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model."""

    name: str = "random"  # `random` or `magi-pocket`
    layers: int = 8  # of a random model
    width: int = 384  # of a random model
    side: int = 64  # pixels of a frame's side
    weights: str | None = None  # folder of magi-pocket's weights, in place of those that ship


class _NoFrames:
    """Stands where an autoencoder is when latents alone are wanted."""

    def encode(self, frames: Tensor) -> Tensor:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError("this benchmark makes videos from prompts alone")

    def decode(self, latents: Tensor) -> Tensor:
        """No frames, uint8 [0, 1, 1, 3]."""
        return torch.empty(0, 1, 1, 3, dtype=torch.uint8)


def model_config(spec: ModelSpec) -> MagiConfig:
    """The configuration of a model.

    Raises:
        InputError: there is no such model.
    """
    if spec.side < 16 or spec.side % 16:
        raise InputError(f"frames of {spec.side} pixels: give --side as a multiple of 16")
    if spec.name == POCKET:
        if spec.side != SIDE:
            raise InputError(f"magi-pocket makes frames of {SIDE} pixels, not {spec.side}: leave out --side")
        return pocket_config()
    if spec.name != "random":
        raise InputError(f"unknown model {spec.name!r}: choose random or magi-pocket")
    step = _HEAD * _KEY_HEADS
    if spec.width < step or spec.width % step:
        raise InputError(f"a width of {spec.width}: give --width as a multiple of {step}")
    values = pocket_config().to_dict()
    values["model_config"] |= {
        "num_layers": spec.layers,
        "hidden_size": spec.width,
        "ffn_hidden_size": 4 * spec.width,
        "num_attention_heads": spec.width // _HEAD,
        "num_query_groups": _KEY_HEADS,
        "kv_channels": _HEAD,
    }
    values["runtime_config"] |= {"video_size_h": spec.side, "video_size_w": spec.side}
    return MagiConfig.from_dict(values, source="the random model")


def build(spec: ModelSpec, layers: range | None = None, *, decode: bool = False) -> MagiPipeline:
    """Load or draw a model, with magi-pocket's text encoder.

    Args:
        spec: which.
        layers: of a stage; None for all.
        decode: with the autoencoder.

    Raises:
        InputError: it cannot be had.
    """
    config = model_config(spec)
    weights, loading = None if spec.weights is None else Path(spec.weights), Loading(layers=layers)
    if spec.name == POCKET and decode:
        return load_pipeline(config, weights, loading)
    if decode:
        raise InputError("a random model has no autoencoder: leave out --decode")
    model = load_stage(config, weights, loading) if spec.name == POCKET else _random_model(config, layers)
    return MagiPipeline(config, model, _NoFrames(), PocketEncoder())


def _random_model(config: MagiConfig, layers: range | None) -> MagiDiT:
    dit = MagiDiT(config.model_config, layers=layers)
    for name, parameter in dit.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()), generator=generator)
        elif name.endswith("ada_modulate_layer.proj.0.bias"):
            nn.init.ones_(parameter)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("post_norm.weight"):
            nn.init.constant_(parameter, _GAIN)
    return dit.requires_grad_(False).eval()


def pocket_request(prompt: str, *, chunks: int, num_steps: int, seed: int) -> Request:
    """A video of magi-pocket."""
    return Request(prompt=prompt, chunks=chunks, height=SIDE, width=SIDE, num_steps=num_steps, seed=seed)


def balanced_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes in which every colour, shape and motion comes up equally often, to within one.

    The words are shuffled, then each kind is gone through in turn. As 6 colours, 4 shapes and 5 motions repeat together
    only after 60 scenes, the first 60 are all different, and they have each colour with each motion twice, and each
    shape with each motion three times. The next 60 are the other half of the 120 scenes.
    """
    rng = random.Random(seed)
    colours, shapes, motions = (rng.sample(list(words), len(words)) for words in (COLOURS, SHAPES, MOTIONS))
    cycle = math.lcm(len(colours), len(shapes), len(motions))
    return [
        Scene(
            colour=colours[i % len(colours)],
            shape=shapes[(i + i // cycle) % len(shapes)],
            motion=motions[i % len(motions)],
        )
        for i in range(count)
    ]
