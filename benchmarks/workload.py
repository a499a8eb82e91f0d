"""What is measured: models, the videos that they make, and what comes of a run, as data that processes hand around.

Models are magi-pocket, or random weights of any size, whole or one stage of them. Random weights are drawn tensor by
tensor from the tensor's name, so that a stage's are those of the whole model. Seconds are of denoising, from the
submission of the first video to its last chunk, with everything loaded and warm.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from engine.kv.layout import KVSettings
from engine.kv.views import LayerKV, SliceView
from engine.record import NOT_ACTIVE
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from engine.schedule import Schedule
from launch.model.resolve import reuse_preset
from launch.options import CacheName
from models.attention import Attention
from models.checkpoint import Loading
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.family import POCKET_FIGURES
from models.magi.pipeline import MagiPipeline, load_pipeline, load_stage, random_dit
from models.magi.sampling import MagiSampling
from models.pocket.clips import SIDE
from models.pocket.preset import pocket_config
from models.pocket.text import PocketEncoder
from models.pocket.words import COLOURS, MOTIONS, SHAPES, Scene
from models.protocols import CELL_PIXELS, Caption, Modulation, PassCondition, Positions, TextKV
from parallel.trace import RankCounters

Flags = tuple[tuple[int, ...], ...]
"""What was decided of a video's steps, [ticks][chunks] as in a record."""
POCKET = "magi-pocket"
PROMPT = "a red circle moving right"
MOST_PROMPTS = 1000  # of one run; its noise has as many seeds to itself
TEXT = 200  # caption tokens of a `ChunkPass`
_KEY_HEADS = 4  # of a random model

Chunks = Annotated[int, typer.Option(min=1, help="Length of a video.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")]
Weights = Annotated[Path | None, typer.Option(help="Folder of weights, in place of those that ship.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which model: `random` or `magi-pocket`, which has a size of its own."""

    name: str = "random"
    layers: int = 8
    width: int = 384  # a multiple of four heads
    head: int = 48  # size of an attention head
    dtype: str = "torch.float32"
    side: int = 64  # pixels of a frame's side
    threshold: float = 0.08  # of reuse that computes about half of the steps of random weights


QUICK = ModelSpec(layers=2, width=192, side=32, threshold=0.3)
"""So small that only the process matters, not the time that it takes."""


class _NoFrames:
    """Stands where an autoencoder is when latents alone are wanted."""

    def encode(self, frames: Tensor) -> Tensor:
        raise InputError("this benchmark makes videos from prompts alone")

    def stream(self) -> Callable[[Tensor], Tensor]:
        return self.decode

    def decode(self, latents: Tensor) -> Tensor:
        """No frames, uint8 [0, 1, 1, 3]."""
        return torch.empty(0, 1, 1, 3, dtype=torch.uint8)


def model_config(spec: ModelSpec) -> MagiConfig:
    """The configuration of a model; an `InputError` if there is no such model."""
    if spec.name == POCKET:
        return pocket_config()
    if spec.name != "random":
        raise InputError(f"unknown model {spec.name!r}: choose random or magi-pocket")
    values = pocket_config().to_dict()
    width, heads = spec.width, {"kv_channels": spec.head, "num_attention_heads": spec.width // spec.head}
    shape = {"num_layers": spec.layers, "hidden_size": width, "ffn_hidden_size": 4 * width, "params_dtype": spec.dtype}
    values["model_config"] |= shape | heads | {"num_query_groups": _KEY_HEADS}
    values["runtime_config"] |= {"video_size_h": spec.side, "video_size_w": spec.side}
    return MagiConfig.from_dict(values, source="the random model")


def build(spec: ModelSpec, layers: range | None = None) -> MagiPipeline:
    """Load or draw a model, or the layers of a stage, with magi-pocket's text encoder and no autoencoder."""
    config = model_config(spec)
    if spec.name == POCKET:
        model = load_stage(config, None, Loading(layers=layers))
    else:
        model = random_dit(config, Loading(layers=layers))
    return MagiPipeline(config, model, _NoFrames(), PocketEncoder())


class ChunkPass:
    """A pass of one chunk through the layers of a model, on random inputs; it attends to `chunks`, itself the last.

    The chunk is of the size that the configuration names; `attention` is in place of the model's own.
    """

    def __init__(self, model: MagiDiT, config: MagiConfig, chunks: int, attention: Attention | None = None) -> None:
        shapes, run, draw = model.config, config.runtime_config, partial(torch.randn, device=model.device)
        grid = run.chunk_width, run.video_size_h // CELL_PIXELS, run.video_size_w // CELL_PIXELS
        tokens = model.token_count(*grid)
        rows = chunks * tokens
        self._model, self._attention = model, attention or model.attention
        self._hidden = draw(1, tokens, shapes.hidden_size, dtype=shapes.dtype)
        self._caption = Caption(draw(TEXT, shapes.caption_channels))
        self._condition = PassCondition(times=(0.5,), distill=8.0 if run.cfg_number == 1 else None)
        self._place = chunks * grid[0], grid
        size = 2, rows, shapes.num_query_groups, shapes.kv_channels
        held = {number: LayerKV(draw(*size, dtype=shapes.dtype)) for number in model.held}
        self._view = SliceView(held, slice(rows - tokens, rows), slice(0, rows), self._attention, asks=False)
        self._inputs = self._made()

    def _made(self) -> tuple[Modulation, TextKV, Positions]:
        """What is the same for many passes."""
        model = self._model
        return model.modulation(self._condition), model.text(self._caption), model.positions(*self._place)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self._model.layers(self._hidden, *self._inputs, self._view, cross=self._attention)

    @torch.no_grad()
    def anew(self) -> Tensor:
        """The same, with its inputs made in it."""
        self._inputs = self._made()
        return self()


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Videos of one length on one model; they differ in their noise."""

    model: ModelSpec
    chunks: int  # of every video
    steps: int  # of every chunk
    videos: int = 1  # with seeds 0, 1, ...; all in flight at once on a gang, one after another in one process
    reuse: ReuseSettings = field(default_factory=ReuseSettings)  # which steps are reused
    kv: KVSettings = field(default_factory=KVSettings)  # how much of the past is held
    barrier: bool = False  # wait for all chunks of a tick before the next

    @property
    def reuses(self) -> bool:
        """Whether steps may be reused."""
        return self.reuse.policy != "none"

    @property
    def name(self) -> str:
        """The videos in words."""
        kind = "reuse" if self.reuses else "no reuse"
        return f"{self.videos} video{'s' * (self.videos > 1)}, {kind}{', barrier' * self.barrier}"

    @property
    def size(self) -> str:
        """Model and length in words."""
        config = model_config(self.model).model_config
        model = f"{self.model.name}: {config.num_layers} layers of width {config.hidden_size}, {self.model.side} pixels"
        return f"{model}, {self.chunks} chunks of {self.steps} steps"

    @property
    def requests(self) -> list[Request]:
        """What the engine is asked for."""
        side = self.model.side
        return [
            Request(prompt=PROMPT, chunks=self.chunks, height=side, width=side, num_steps=self.steps, seed=seed)
            for seed in range(self.videos)
        ]

    @property
    def schedule(self) -> Schedule:
        """Schedule of every video."""
        window = model_config(self.model).runtime_config.window_size
        return Schedule(first=0, chunks=self.chunks, num_steps=self.steps, window=window)

    @property
    def sampling(self) -> MagiSampling:
        """How every video is denoised; an `InputError` if the model cannot take that many steps."""
        config, clean, copy = model_config(self.model), self.reuse.clean_pass, self.reuse.copy_pass
        return MagiSampling(config=config, num_steps=self.steps, clean_pass=clean, copy_pass=copy)

    @property
    def warm_up(self) -> Workload:
        """A short video on the same model, before those that count."""
        return replace(self, chunks=1, videos=1, reuse=ReuseSettings(), barrier=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of a workload."""

    seconds: float  # from the first video's submission to the last chunk
    latents: tuple[tuple[str, ...], ...]  # digests of each video's chunks
    videos: tuple[float, ...] = ()  # seconds of each video, where one was made after another
    flags: tuple[Flags, ...] = ()  # of each video; nothing where no step may be reused
    ranks: tuple[RankCounters, ...] = ()  # of a gang
    hop: float = 0.0  # seconds of a message with hidden states from one rank to another, if it was measured
    start: float | None = None  # seconds until all ranks of a cluster were warm
    losses: tuple[str, ...] = ()  # why gangs of a cluster were lost; there should be none

    @property
    def computed(self) -> float:
        """Computed chunk-steps, as a share of all."""
        flags = np.array(self.flags)
        return float((flags == 0).sum() / (flags != NOT_ACTIVE).sum()) if self.flags else 1.0

    @property
    def item(self) -> float:
        """Mean seconds of a stage's items, from a gang's counters."""
        items = sum(rank.items for rank in self.ranks)
        return sum(rank.busy for rank in self.ranks) / items if items else 0.0


def digest(chunk: Tensor | NDArray[np.float32]) -> str:
    """A digest of a chunk's latents."""
    return hashlib.sha256(np.ascontiguousarray(chunk).tobytes()).hexdigest()


def differing(runs: Sequence[Made], wanted: Made) -> list[str]:
    """Videos that are not those of one process, and gangs that were lost; one line each."""
    found = []
    for place, run in enumerate(runs, 1):
        found += [f"run {place}: {loss}" for loss in run.losses]
        same = [one == other for one, other in zip(run.latents, wanted.latents, strict=True)]
        found += [f"run {place}: video {number} has other latents" for number, one in enumerate(same) if not one]
    return found


def pocket_pipeline(weights: Path | None) -> MagiPipeline:
    """Load magi-pocket, with the weights that ship or those of a folder."""
    return load_pipeline(pocket_config(), weights, Loading())


def pocket_reuse(cache: CacheName) -> ReuseSettings:
    """What a preset of `--cache` is for magi-pocket."""
    return reuse_preset(cache, POCKET_FIGURES)


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


def pocket_requests(count: int, *, chunks: int, num_steps: int, seed: int) -> list[Request]:
    """Videos of balanced scenes, each with noise of its own; two runs whose seeds differ share no noise."""
    return [
        Request(prompt=scene.prompt, chunks=chunks, height=SIDE, width=SIDE, num_steps=num_steps, seed=noise)
        for noise, scene in enumerate(balanced_scenes(count, seed), MOST_PROMPTS * seed)
    ]
