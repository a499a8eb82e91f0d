"""Which model is meant, where its weights are, and what `--cache` and `--kv-budget` stand for with it.

What cannot be used is an `InputError` with one line that says what to do. No weights are read.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.reuse.policy import ReuseSettings
from launch.options import CacheName, Options, ReuseKind
from models.attention import attention_backend
from models.errors import InputError
from models.families import family_of
from models.magi.config import MagiConfig
from models.magi.folder import ModelFiles, find_files, recognise
from models.magi.presets import POCKET, find_preset, preset_of
from models.magi.sampling import COPY_WEIGHT, MagiSampling
from models.magi.text import SPECIAL, SpecialToken, TextLoading
from parallel.cluster.config import MagiSource
from parallel.mesh import Layout
from parallel.ranks.environment import prompt_cache
from parallel.split import stage_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """Which model to load, and how the engine uses it: what every rank must know."""

    name: str  # for people
    source: MagiSource  # what each rank loads its part of
    vae_bytes: int  # of its autoencoder
    device: str  # where to, without ranks
    cache: CacheName  # preset of reuse
    reuse: ReuseSettings  # which steps are reused
    kv: KVSettings  # how much of the past is held

    @property
    def config(self) -> MagiConfig:
        """The model's configuration."""
        return self.source.config


def layout_of(options: Options) -> Layout:
    """The ranks that are asked for."""
    return Layout(pp=options.pp, cp=options.cp)


def plan_model(options: Options) -> ModelPlan:
    """Which model to load, and how to use it; what was given of a video is not looked at."""
    name, config = _model(options)
    stage_sizes(config, options.pp, options.split)  # says whether the stages fit
    if (heads := config.model_config.num_query_groups) % options.cp:
        raise InputError(f"--cp {options.cp} does not divide the model's {heads} key heads")
    config = _changed(config, options)
    num_steps = options.steps or config.runtime_config.num_steps
    sampling = MagiSampling(config=config, num_steps=num_steps)  # says whether the steps fit
    if config.runtime_config.t5_pretrained is None or _random(options):
        _check_no_text_options(options, name)
    figures = POCKET_FIGURES if config.runtime_config.t5_pretrained is None else MAGI_1_FIGURES
    reuse = reuse_settings(options, figures, num_steps=num_steps, guided=sampling.guided)
    attention_backend(options.attention)  # says whether it can run here
    if options.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "gcc", "clang"))):
        raise InputError("--compile needs a C++ compiler, and there is none on the PATH: install g++, or leave it out")
    random = _random(options)
    vae_bytes = family_of(config).vae_bytes(config, None if random else _files(options, config, name).vae)
    source = MagiSource(
        config=config,
        random=random,
        weights=None if random else options.weights,
        text=TextLoading(
            tokens=options.special_tokens,
            device=options.t5_device,
            dtype=options.t5_dtype,
            special=_special(options.special),
            negative=options.negative,
            cache=options.prompt_cache or prompt_cache(),
        ),
        copy_weight=COPY_WEIGHT if options.copy_weight is None else options.copy_weight,
        split=options.split,
        precise=options.precision == "reference",
        compiled=options.compile,
        attention=options.attention,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = options.cache or figures.default
    # On a CPU it would move rows from memory to memory.
    kv = kv_settings(options, offload=config.figures.offload and device == "cuda")
    return ModelPlan(name=name, source=source, vae_bytes=vae_bytes, device=device, cache=cache, reuse=reuse, kv=kv)


def _model(options: Options) -> tuple[str, MagiConfig]:
    """Which model is meant, in a word, and its configuration."""
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    if options.config is not None:
        return str(options.config), MagiConfig.from_json(options.config)
    if options.model is None and options.weights is not None and not _random(options):
        config = recognise(options.weights)
        preset = preset_of(config)
        return str(options.weights) if preset is None else preset.name, config
    name = options.model or POCKET
    return name, find_preset(name).config()


def _random(options: Options) -> bool:
    """Random weights are asked for, and not a folder of that name."""
    return options.weights == Path("random") and not Path("random").exists()


def _changed(config: MagiConfig, options: Options) -> MagiConfig:
    """The configuration with the sampling settings that were given in place of its own."""
    runtime = config.runtime_config
    guidance = {
        "cfg_t_range": ("--guidance-times", options.guidance_times),
        "prev_chunk_scales": ("--chunk-scales", options.chunk_scales),
        "text_scales": ("--text-scales", options.text_scales),
    }
    given = {key: _numbers(name, text) for key, (name, text) in guidance.items() if text is not None}
    if given and runtime.cfg_number == 1:
        raise InputError(f"{guidance[next(iter(given))][0]} is for models with guidance, this one is distilled")
    changes = _given(options, {"fps": "fps", "window": "window_size"})
    if given:
        count = len(given.get("cfg_t_range", runtime.cfg_t_range))
        for key, (name, _) in guidance.items():
            numbers = given.get(key, list(getattr(runtime, key)))
            if len(numbers) not in (1, count):
                raise InputError(f"{name} has {len(numbers)} numbers, but there are {count} times: give 1 or {count}")
            changes[key] = numbers * count if len(numbers) == 1 else numbers
    if not changes:
        return config
    values = config.to_dict()
    values["runtime_config"] |= changes
    return MagiConfig.from_dict(values, source="these options")


def _numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} {text} is not a list of numbers such as 7.5,7.5,0") from None
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} {text} has a number that is not finite")
    return numbers


def _check_no_text_options(options: Options, name: str) -> None:
    for option in ("special", "special_tokens", "t5_device", "t5_dtype", "prompt_cache"):
        if getattr(options, option) is not None or options.negative:
            flag = "negative" if options.negative else option.replace("_", "-")
            raise InputError(f"--{flag} is for models that read prompts with T5, {name} does not: leave it out")


def _special(text: str | None) -> tuple[SpecialToken, ...]:
    """Names of special tokens, of a text such as `HQ,3D`."""
    if text is None:
        return SPECIAL
    known = get_args(SpecialToken)
    names = [] if text == "none" else text.upper().split(",")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--special {text}: {unknown[0]!r} is not known: choose from {', '.join(known)}, or none")
    return tuple(name for name in known if name in names)


def _files(options: Options, config: MagiConfig, name: str) -> ModelFiles:
    """Where the files are; says at once what is not there. What is in them is checked when they are loaded."""
    load = config.runtime_config.load
    if options.weights is None and load is not None and not Path(load).is_dir():
        folder = None if options.config is not None else find_preset(name).folder
        where = "" if folder is None else f"download {folder} from huggingface.co/sand-ai/MAGI-1 to there, or "
        raise InputError(f"{name} has no weights in {load}: {where}give their folder with --weights")
    return find_files(config, options.weights, tokens=options.special_tokens)


# ---- presets of reuse, and the KV buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFigures:
    """What the presets of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    default: CacheName  # what holds where no preset is asked for
    reuse: ReuseKind  # stands in for a step that is left out; docs/reuse.md has the figures
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated in place of that; 1 never


# As published (FlowCache, below Eq. 8). Extrapolation was measured on magi-pocket only.
MAGI_1_FIGURES = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01, default="none", reuse="residual")
# Thresholds for 16 steps; benchmarks.quality measures what they mean.
POCKET_FIGURES = ReuseFigures(
    warmup_steps=3, slow=0.0629, fast=0.0994, teacache=0.0657, default="flowcache-slow", reuse="extrapolate"
)
# Options that change a figure of a preset, and that figure.
_CHANGES = {"cache_threshold": "threshold", "cache_warmup": "warmup_steps"} | {
    name: name for name in ("reuse", "extrapolate_from", "distance")
}


def reuse_preset(name: CacheName, figures: ReuseFigures) -> ReuseSettings:
    """What a name of `--cache` stands for with a model's figures.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both.
    """
    if name == "none":
        return ReuseSettings()
    return ReuseSettings(
        policy=name.partition("-")[0],
        threshold={"flowcache-slow": figures.slow, "flowcache-fast": figures.fast}.get(name, figures.teacache),
        warmup_steps=figures.warmup_steps,
        reuse=figures.reuse,
        extrapolate_from=figures.extrapolate_from,
        clean_pass=False,
        copy_pass=False,
    )


def reuse_settings(options: Options, figures: ReuseFigures, *, num_steps: int, guided: bool) -> ReuseSettings:
    """The preset that was asked for, with what was given on top of it; a model with guidance has no copy pass."""
    changes = _given(options, _CHANGES)
    cache = options.cache or figures.default
    if cache == "none" and changes:
        names = " and ".join("--" + option.replace("_", "-") for option, name in _CHANGES.items() if name in changes)
        raise InputError(f"--cache none reuses nothing: leave out {names}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
    settings = reuse_preset(cache, figures)
    warmup = options.cache_warmup
    if warmup is not None and settings.policy == "flowcache" and warmup >= num_steps:  # teacache counts all ticks
        raise InputError(f"--cache-warmup {warmup} computes all {num_steps} steps: give less, or --cache none")
    passes = _given(options, {"clean_pass": "clean_pass", "copy_pass": "copy_pass"})
    return replace(settings, **changes, **passes)


def kv_settings(options: Options, *, offload: bool = False) -> KVSettings:
    """How much of the past is held, how it is cut down, and where, `offload` if nothing is said.

    An `InputError` says which options do not fit.
    """
    chosen = _given(options, {"kv_retention": "retention", "kv_queries": "queries"})
    if options.kv_budget is None and chosen:
        name = f"--kv-{next(iter(chosen))}"
        raise InputError(f"{name} says how the past is compressed: give --kv-budget CHUNKS with it, or leave it out")
    if options.kv_offload is not None:
        offload = options.kv_offload
    return KVSettings(budget=options.kv_budget, selection=SelectionSettings(**chosen), offload=offload)


def _given(options: Options, names: Mapping[str, str]) -> dict[str, Any]:
    """Values of those options that were given, under other names."""
    values = {name: getattr(options, option) for option, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}
