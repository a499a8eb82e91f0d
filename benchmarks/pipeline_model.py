"""The models of the pipeline benchmark: magi-pocket, or random weights of any size, whole or one stage of it.

Random weights are drawn tensor by tensor from the tensor's name, so that a stage's are those of the whole model.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.pipeline_job import Job, ModelSpec
from engine.engine import Engine
from engine.record import Recorder, RunRecord
from engine.request import Request
from engine.reuse.policy import ChunkPolicy, Decision, Observation
from engine.reuse.settings import ReuseSettings
from models.attention import Attention
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.model import MagiModel
from models.magi.pipeline import Loading, load_autoencoder, load_stage
from models.magi.sampling import MagiSampling
from models.pocket.clips import SIDE
from models.pocket.preset import pocket_config
from models.pocket.text import PocketEncoder
from models.protocols import Autoencoder, CaptionTable
from parallel.ranks.worker import StageModel

PROMPT = "a red circle moving right"
_HEAD, _KEY_HEADS = 48, 4
_GAIN = 0.3 - 1  # of post-norms, which have an offset of one
_SEARCHES = 40
_SHORT, _TRIES, _NEAR = 4, 6, 0.02


class _NoFrames:
    """Stands where an autoencoder is when frames are not wanted."""

    def encode(self, frames: Tensor) -> Tensor:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError("this benchmark makes videos from prompts alone")

    def decode(self, latents: Tensor) -> Tensor:
        """No frames, uint8 [0, 1, 1, 3]."""
        return torch.empty(0, 1, 1, 3, dtype=torch.uint8)


class BenchPipeline:
    """A model with magi-pocket's text encoder.

    Args:
        config: of the model.
        model: all layers, or a stage's.
        autoencoder: None for latents alone.
    """

    def __init__(self, config: MagiConfig, model: MagiModel, autoencoder: Autoencoder | None) -> None:
        self.config, self.model = config, model
        self.autoencoder: Autoencoder = autoencoder or _NoFrames()
        self._encoder = PocketEncoder()

    @property
    def attention(self) -> Attention:
        """What KV views attend with."""
        return self.model.dit.attention

    @property
    def stage(self) -> StageModel:
        """The layers, for a rank that does not lead."""
        return StageModel(model=self.model, attention=self.attention)

    def sampling(self, num_steps: int, *, clean_pass: bool = True, copy_pass: bool = True) -> MagiSampling:
        """How to denoise with that many steps, with or without the passes that reuse may leave out."""
        return MagiSampling(config=self.config, num_steps=num_steps, clean_pass=clean_pass, copy_pass=copy_pass)

    def captions(self, prompt: str) -> CaptionTable:
        """Encode a prompt."""
        dit = self.model.dit
        return CaptionTable(text=self._encoder.encode(prompt), null=dit.null_text())


def model_config(spec: ModelSpec) -> MagiConfig:
    """The configuration of a model.

    Raises:
        InputError: there is no such model.
    """
    if spec.side < 16 or spec.side % 16:
        raise InputError(f"frames of {spec.side} pixels: give --side as a multiple of 16")
    if spec.name == "magi-pocket":
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


def build(spec: ModelSpec, layers: range | None = None, *, decode: bool = False) -> BenchPipeline:
    """Load or draw a model.

    Args:
        spec: which.
        layers: of a stage; None for all.
        decode: with the autoencoder.

    Raises:
        InputError: it cannot be had.
    """
    config = model_config(spec)
    if spec.name == "random":
        if decode:
            raise InputError("a random model has no autoencoder: leave out --decode")
        return BenchPipeline(config, _random_model(config, layers), None)
    weights = None if spec.weights is None else Path(spec.weights)
    loading = Loading(layers=layers)
    autoencoder = load_autoencoder(config, weights, loading) if decode else None
    return BenchPipeline(config, load_stage(config, weights, loading), autoencoder)


def _random_model(config: MagiConfig, layers: range | None) -> MagiModel:
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
    return MagiModel(dit.requires_grad_(False).eval())


def requests(job: Job, videos: int) -> list[Request]:
    """The videos of a case."""
    side = job.model.side
    return [
        Request(prompt=PROMPT, chunks=job.chunks, height=side, width=side, num_steps=job.steps, seed=seed)
        for seed in range(videos)
    ]


def find_threshold(job: Job, cache: ReuseSettings, fraction: float) -> float:
    """A threshold with which about a share of the chunk-steps is computed, on a short video.

    Where to begin is told by the distances of a video without reuse; with reuse they are different.

    Args:
        job: the model, and the size of the video.
        cache: the other settings.
        fraction: of chunk-steps to compute.
    """
    torch.set_num_threads(job.threads)
    short, pipeline = replace(job, chunks=min(job.chunks, _SHORT)), build(job.model)
    none = ReuseSettings(clean_pass=cache.clean_pass, copy_pass=cache.copy_pass)
    changes = _record(short, pipeline, none).changes
    low, high = 0.0, float(np.nansum(changes, axis=1).max())
    for _ in range(_SEARCHES):
        middle = (low + high) / 2
        if _computed(changes, middle, cache.warmup_steps) > fraction:
            low = middle
        else:
            high = middle
    low, found, high = 0.0, high, 4 * high
    for _ in range(_TRIES):
        share = _record(short, pipeline, cache.with_threshold(found)).computed_fraction
        if abs(share - fraction) < _NEAR:
            break
        low, high = (found, high) if share > fraction else (low, found)
        found = (low + high) / 2
    return found


def _record(job: Job, pipeline: BenchPipeline, cache: ReuseSettings) -> RunRecord:
    """Make a video and record it."""
    trace = Recorder()
    for _ in Engine(pipeline, cache).generate(requests(job, 1)[0], trace=trace):
        pass
    return trace.finish({})


def _computed(changes: np.ndarray, threshold: float, warmup: int) -> float:
    policy, computed = ChunkPolicy(threshold, warmup), 0
    for chunk, distances in enumerate(changes.tolist()):
        for step, distance in enumerate(distances):
            seen = Observation(
                chunk=chunk, step=step, tick=step, last_tick=False, change=distance if step else None, scale=1.0
            )
            computed += policy.decide([seen])[0] is Decision.COMPUTE
    return computed / changes.size
