"""Which model is meant, where its weights are, and what `--cache` and `--kv-budget` stand for with it.

What cannot be used is an `InputError` with one line that says what to do. No weights are read.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.reuse.policy import ReuseSettings
from launch.options import CacheName, Options
from models.attention import attention_backend
from models.errors import InputError
from models.families import family_of, presets, recognise
from models.family import Choices, ModelConfig, ReuseFigures
from models.magi.config import MagiConfig
from models.magi.presets import POCKET
from parallel.cluster.config import Source
from parallel.mesh import Layout
from parallel.ranks.environment import prompt_cache
from parallel.split import stage_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """Which model to load, and how the engine uses it: what every rank must know."""

    name: str  # for people
    source: Source  # what each rank loads its part of
    vae_bytes: int  # of its autoencoder
    device: str  # where to, without ranks
    cache: CacheName  # preset of reuse
    reuse: ReuseSettings  # which steps are reused
    kv: KVSettings  # how much of the past is held

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.source.loader.config


def layout_of(options: Options) -> Layout:
    """The ranks that are asked for."""
    return Layout(pp=options.pp, cp=options.cp)


def plan_model(options: Options) -> ModelPlan:
    """Which model to load, and how to use it; what was given of a video is not looked at."""
    name, config = _model(options)
    stage_sizes(config, options.pp, options.split)  # says whether the stages fit
    if (heads := config.figures.key_heads) % options.cp:
        raise InputError(f"--cp {options.cp} does not divide the model's {heads} key heads")
    family, choices = family_of(config), _choices(options, name)
    config = family.changed(config, choices)
    known = config.figures
    num_steps = options.steps or known.num_steps
    family.sampling(config, num_steps, clean_pass=True, copy_pass=True)  # says whether the steps fit
    figures = family.reuse_figures(config)
    reuse = reuse_settings(options, figures, num_steps=num_steps, guided=not known.copies)
    attention_backend(options.attention, known.dtype)  # says whether it can run here
    if options.compile:
        _check_compile(config)
    loader = family.loader(config, choices)
    vae_bytes = family.vae_bytes(config, loader.vae)
    source = Source(
        loader=loader,
        split=options.split,
        precise=options.precision == "reference",
        compiled=options.compile,
        attention=options.attention,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = options.cache or ("none" if figures is None else figures.default)
    # On a CPU it would move rows from memory to memory.
    kv = kv_settings(options, offload=known.offload and device == "cuda")
    return ModelPlan(name=name, source=source, vae_bytes=vae_bytes, device=device, cache=cache, reuse=reuse, kv=kv)


def _check_compile(config: ModelConfig) -> None:
    if not isinstance(config, MagiConfig):
        raise InputError("--compile is for MAGI-1 and magi-pocket: leave it out")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "gcc", "clang"))):
        raise InputError("--compile needs a C++ compiler, and there is none on the PATH: install g++, or leave it out")


def _model(options: Options) -> tuple[str, ModelConfig]:
    """Which model is meant, in a word, and its configuration."""
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    if options.config is not None:
        return str(options.config), MagiConfig.from_json(options.config)
    if options.model is None and options.weights is not None and not _random(options):
        config = recognise(options.weights)
        preset = family_of(config).preset_of(config)
        return str(options.weights) if preset is None else preset.name, config
    name, known = options.model or POCKET, presets()
    if name not in known:
        raise InputError(f"unknown model {name!r}: choose from {', '.join(known)}")
    return name, known[name].config()


def _choices(options: Options, name: str) -> Choices:
    random = _random(options)
    return Choices(
        name=name,
        preset=options.config is None and name in presets(),
        weights=None if random else options.weights,
        random=random,
        fps=options.fps,
        window=options.window,
        guidance_times=options.guidance_times,
        chunk_scales=options.chunk_scales,
        text_scales=options.text_scales,
        special=options.special,
        special_tokens=options.special_tokens,
        negative=options.negative,
        t5_device=options.t5_device,
        t5_dtype=options.t5_dtype,
        prompt_cache=options.prompt_cache,
        usual_cache=prompt_cache(),
        copy_weight=options.copy_weight,
        sampling=options.sampling,
        precision=None if options.precision == "reference" else options.precision,
    )


def _random(options: Options) -> bool:
    """Random weights are asked for, and not a folder of that name."""
    return options.weights == Path("random") and not Path("random").exists()


# ---- presets of reuse, and the KV buffer


# Options that change a figure of a preset, and that figure.
_CHANGES = {"cache_threshold": "threshold", "cache_warmup": "warmup_steps"} | {
    name: name for name in ("reuse", "extrapolate_from", "distance")
}


def reuse_preset(name: CacheName, figures: ReuseFigures) -> ReuseSettings:
    """What a name of `--cache` stands for with a model's figures.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both, where the model is published with them.
    """
    if name == "none":
        return ReuseSettings(clean_pass=figures.clean_pass)
    return ReuseSettings(
        policy=name.partition("-")[0],
        threshold={"flowcache-slow": figures.slow, "flowcache-fast": figures.fast}.get(name, figures.teacache),
        warmup_steps=figures.warmup_steps,
        reuse=figures.reuse,
        extrapolate_from=figures.extrapolate_from,
        distance=figures.distance,
        polynomial=figures.polynomial,
        clean_pass=False,
        copy_pass=False,
    )


def reuse_settings(options: Options, figures: ReuseFigures | None, *, num_steps: int, guided: bool) -> ReuseSettings:
    """The preset that was asked for, with what was given on top of it; a model with guidance has no copy pass."""
    changes = _given(options, _CHANGES)
    cache = options.cache or ("none" if figures is None else figures.default)
    if figures is None and cache != "none":
        raise InputError(f"--cache {cache}: there are no figures of reuse for this model, leave it out")
    if cache == "none" and changes:
        names = " and ".join("--" + option.replace("_", "-") for option, name in _CHANGES.items() if name in changes)
        raise InputError(f"--cache none reuses nothing: leave out {names}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
    settings = ReuseSettings() if figures is None else reuse_preset(cache, figures)
    if options.distance is not None and options.distance != settings.distance:
        changes["polynomial"] = ()  # a fit is one of its own distance
    warmup = options.cache_warmup
    if warmup is not None and settings.policy == "flowcache" and warmup >= num_steps:  # teacache counts all ticks
        raise InputError(f"--cache-warmup {warmup} computes all {num_steps} steps: give less, or --cache none")
    passes = _given(options, {"clean_pass": "clean_pass", "copy_pass": "copy_pass"})
    return replace(settings, **changes, **passes)


def kv_settings(options: Options, *, offload: bool = False) -> KVSettings:
    """How much of the past is held, how it is cut down, and where, `offload` if nothing is said.

    An `InputError` says which options do not fit.
    """
    chosen = _given(options, {"kv_score": "score", "kv_retention": "retention", "kv_queries": "queries"})
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
