"""What `--cache` and `--kv-budget` stand for with each model: settings of reuse and of the KV buffer.

Figures only; nothing is loaded here. How a policy decides is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.kv.selection import SelectionSettings
from engine.kv.size import KVSettings
from engine.reuse.settings import ReuseSettings
from launch.options import CacheName, Options, ReuseKind
from models.errors import InputError

DEFAULT_MODEL = "magi-pocket"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFigures:
    """What the presets of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    reuse: ReuseKind = ReuseKind.EXTRAPOLATE  # stands in for a step that is left out; docs/reuse.md has the figures
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated in place of that; 1 never


_MAGI_1 = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01)  # FlowCache, below Eq. 8

# Models with figures of their own, and not those of MAGI-1. magi-pocket's thresholds are for 16 steps;
# benchmarks.quality measures what they mean.
REUSE_FIGURES = {"magi-pocket": ReuseFigures(warmup_steps=3, slow=0.0629, fast=0.0994, teacache=0.0657)}


def reuse_preset(name: CacheName, model: str | None) -> ReuseSettings:
    """What a name of `--cache` stands for.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both. A configuration file (`model` None) is one of MAGI-1.
    """
    if name is CacheName.NONE:
        return ReuseSettings()
    figures = REUSE_FIGURES.get(model or "", _MAGI_1)
    policy, threshold = {
        CacheName.TEACACHE: ("teacache", figures.teacache),
        CacheName.FLOWCACHE_SLOW: ("flowcache", figures.slow),
        CacheName.FLOWCACHE_FAST: ("flowcache", figures.fast),
    }[name]
    return ReuseSettings(
        policy=policy,
        threshold=threshold,
        warmup_steps=figures.warmup_steps,
        reuse=figures.reuse.value,
        extrapolate_from=figures.extrapolate_from,
        clean_pass=False,
        copy_pass=False,
    )


def reuse_settings(options: Options, *, num_steps: int, guided: bool) -> ReuseSettings:
    """The preset that was asked for, with what was given on top of it; a model with guidance has no copy pass.

    Raises:
        InputError: the options do not fit each other or the model.
    """
    names = [
        "--" + name.replace("_", "-")
        for name in ("cache_threshold", "cache_warmup", "reuse", "extrapolate_from")
        if getattr(options, name) is not None
    ]
    if options.cache is CacheName.NONE and names:
        raise InputError(f"--cache none reuses nothing: leave out {' and '.join(names)}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
    settings = reuse_preset(options.cache, None if options.config is not None else options.model or DEFAULT_MODEL)
    if options.cache_threshold is not None:
        settings = settings.with_threshold(options.cache_threshold)
    warmup = options.cache_warmup
    if warmup is not None and settings.policy == "flowcache" and warmup >= num_steps:  # teacache counts all ticks
        raise InputError(f"--cache-warmup {warmup} computes all {num_steps} steps: give less, or --cache none")
    given: dict[str, Any] = {
        "warmup_steps": warmup,
        "reuse": None if options.reuse is None else options.reuse.value,
        "extrapolate_from": options.extrapolate_from,
        "clean_pass": options.clean_pass,
        "copy_pass": options.copy_pass,
    }
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def kv_settings(options: Options) -> KVSettings:
    """How much of the past is held, and how it is cut down. Raises `InputError`: the options do not fit each other."""
    retention, queries = options.kv_retention, options.kv_queries
    if options.kv_budget is None and (retention is not None or queries is not None):
        name = "--kv-queries" if retention is None else "--kv-retention"
        raise InputError(f"{name} says how the past is compressed: give --kv-budget CHUNKS with it, or leave it out")
    given: dict[str, Any] = {"retention": retention, "queries": queries}
    chosen = {name: unit.value for name, unit in given.items() if unit is not None}
    return KVSettings(budget=options.kv_budget, selection=replace(SelectionSettings(), **chosen))
