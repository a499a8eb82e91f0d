"""From options to a plan: everything that can be checked is checked here, before a weight is read.

It knows options, presets and files; how a video is denoised is the engine's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.kv.size import KVSettings
from engine.request import Prefix, Request
from engine.reuse.settings import ReuseSettings
from launch.cache_presets import CacheName, CacheOptions, KVOptions, cache_settings, kv_settings
from launch.output.files import check_folder, check_target
from launch.output.media import read_image, read_video
from launch.ranks import RankOptions, check_layout
from models.attention import attention_backend
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.pipeline import Loading
from models.magi.presets import find_preset
from models.magi.sampling import MagiSampling
from models.pocket.words import parse_prompt

DEFAULT_MODEL = "magi-pocket"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What was given on the command line; None where nothing was."""

    prompt: str
    out: Path
    seed: int = 0
    model: str | None = None
    seconds: float | None = None
    chunks: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    image: Path | None = None
    video: Path | None = None
    config: Path | None = None
    weights: Path | None = None
    attention: str = "sdpa"
    precise: bool = True
    threads: int | None = None
    cache: CacheOptions = field(default_factory=CacheOptions)
    kv: KVOptions = field(default_factory=KVOptions)
    record: Path | None = None
    ranks: RankOptions = field(default_factory=RankOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """What every rank must know: attributes as in `Plan`."""

    name: str
    config: MagiConfig
    weights: Path | None
    loading: Loading


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Checked options: what to load, what to make, and where to put it."""

    name: str  # of the model, for people
    config: MagiConfig  # of the model
    weights: Path | None  # folder in place of the configured one
    request: Request
    out: Path
    loading: Loading  # device, precision, attention
    cache_name: CacheName  # of the preset that `cache` began as
    cache: ReuseSettings  # which steps are reused
    kv: KVSettings  # how much of the past is held
    record: Path | None  # folder for a record of the run; None for none
    ranks: RankOptions  # who makes it


def plan_model(options: Options) -> ModelPlan:
    """Which model to load, and how; what else was given is not looked at.

    Raises:
        InputError: there is no such model, it has no weights, or it cannot be laid out as asked.
    """
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    config = _config(options)
    check_layout(config, options.ranks)
    attention_backend(options.attention)  # says whether it can run here
    _check_weights(options, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loading = Loading(device=device, precise=options.precise, attention=options.attention)
    return ModelPlan(name=_name(options), config=config, weights=options.weights, loading=loading)


def plan_video(options: Options) -> Plan:
    """Check options, and read the picture or the clip that the video starts from. No weights are read.

    Raises:
        InputError: something cannot be used.
    """
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    if options.image is not None and options.video is not None:
        raise InputError("--image and --video both say what to start from: give one of them")
    check_target(options.out, suffix=".mp4", what="video")
    if options.record is not None:
        check_folder(options.record)
    if options.ranks.trace is not None:
        check_target(options.ranks.trace, suffix=".json", what="trace")
    config = _config(options)
    check_layout(config, options.ranks)
    runtime = config.runtime_config
    request = Request(
        prompt=options.prompt,
        chunks=_chunks(options, config),
        height=runtime.video_size_h if options.height is None else options.height,
        width=runtime.video_size_w if options.width is None else options.width,
        num_steps=runtime.num_steps if options.steps is None else options.steps,
        seed=options.seed,
    )
    sampling = MagiSampling(config=config, num_steps=request.num_steps)  # says whether the steps fit
    model = None if options.config is not None else options.model or DEFAULT_MODEL
    cache = cache_settings(options.cache, model=model, num_steps=request.num_steps, guided=sampling.guided)
    kv = kv_settings(options.kv)
    attention_backend(options.attention)  # says whether it can run here
    check_prompt(config, options.prompt)
    _check_weights(options, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(
        name=_name(options),
        config=config,
        weights=options.weights,
        request=replace(request, prefix=_prefix(options, request, fps=runtime.fps)),
        out=options.out,
        loading=Loading(device=device, precise=options.precise, attention=options.attention),
        cache_name=options.cache.preset,
        cache=cache,
        kv=kv,
        record=options.record,
        ranks=options.ranks,
    )


def check_prompt(config: MagiConfig, prompt: str) -> None:
    """See that a model understands a prompt.

    Raises:
        InputError: it has a fixed vocabulary, which lacks a word.
    """
    if config.runtime_config.t5_pretrained is None:
        parse_prompt(prompt)


def _config(options: Options) -> MagiConfig:
    if options.config is not None:
        return MagiConfig.from_json(options.config)
    return find_preset(options.model or DEFAULT_MODEL).config()


def _name(options: Options) -> str:
    return str(options.config) if options.config is not None else options.model or DEFAULT_MODEL


def _chunks(options: Options, config: MagiConfig) -> int:
    """Length in chunks; seconds are rounded up, as the released code rounds frames (specification 7.1)."""
    if options.seconds is not None and options.chunks is not None:
        raise InputError("--seconds and --chunks both say how long the video is: give one of them")
    if options.chunks is not None:
        return options.chunks
    runtime = config.runtime_config
    chunk_frames = runtime.chunk_width * runtime.temporal_downsample_factor
    if options.seconds is None:
        return math.ceil(runtime.num_frames / chunk_frames)
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise InputError(f"a video of {options.seconds:g} seconds has no frames: ask for more than 0")
    # To a thousandth of a frame, so that 2.1 s at 10 frames per second is 21 frames and not a hair more.
    return math.ceil(round(options.seconds * runtime.fps, 3) / chunk_frames)


def _check_weights(options: Options, config: MagiConfig) -> None:
    """Say at once that there are no weights; what is in the folder is checked when they are loaded."""
    if options.weights is not None:
        if not options.weights.is_dir():
            raise InputError(f"cannot read the weights: there is no folder {options.weights}")
        return
    load = config.runtime_config.load
    if load is None or Path(load).is_dir():
        return
    source = None if options.config is not None else find_preset(options.model or DEFAULT_MODEL).folder
    where = "" if source is None else f"download {source} from huggingface.co/sand-ai/MAGI-1 to there, or "
    raise InputError(f"{_name(options)} has no weights in {load}: {where}give their folder with --weights")


def _prefix(options: Options, request: Request, *, fps: int) -> Prefix | None:
    size = {"height": request.height, "width": request.width}
    if options.image is not None:
        return Prefix(frames=read_image(options.image, **size))
    if options.video is not None:
        return Prefix(frames=read_video(options.video, fps=fps, **size))
    return None
