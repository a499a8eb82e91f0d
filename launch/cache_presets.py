"""Reuse and memory by name: what `--cache` stands for with each model, and how expert options change it.

Figures only; nothing is loaded here. How a policy decides is the engine's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from models.errors import InputError

if TYPE_CHECKING:  # the engine pulls in torch, which a list of names must not wait for
    from engine.kv.size import KVSettings
    from engine.reuse.settings import ReuseSettings


# magi-pocket's thresholds, for 16 steps; benchmarks.quality measures what they mean.
POCKET_WARMUP = 3
POCKET_SLOW = 0.0629
POCKET_FAST = 0.0994
POCKET_TEACACHE = 0.0657


class CacheName(StrEnum):
    """Names of `--cache`."""

    NONE = "none"
    TEACACHE = "teacache"
    FLOWCACHE_SLOW = "flowcache-slow"
    FLOWCACHE_FAST = "flowcache-fast"


class ReuseKind(StrEnum):
    """Names of `--reuse`."""

    RESIDUAL = "residual"
    VELOCITY = "velocity"
    EXTRAPOLATE = "extrapolate"


class TokenUnit(StrEnum):
    """Names of `--kv-retention` and `--kv-queries`."""

    TOKEN = "token"
    FRAME = "frame"
    CHUNK = "chunk"


DEFAULT_CACHE = CacheName.FLOWCACHE_SLOW


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFigures:
    """What the presets of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    reuse: ReuseKind = ReuseKind.EXTRAPOLATE  # docs/reuse.md has the figures that decided it
    """What stands in for a step that is left out."""
    extrapolate_from: float = 1.0
    """Share of the threshold above which a step is extrapolated in place of that; 1 never does."""


_MAGI_1 = CacheFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01)  # FlowCache, below Eq. 8
_POCKET = CacheFigures(warmup_steps=POCKET_WARMUP, slow=POCKET_SLOW, fast=POCKET_FAST, teacache=POCKET_TEACACHE)

CACHE_FIGURES: dict[str, CacheFigures] = {
    "magi-pocket": _POCKET,
    "magi-4.5b": _MAGI_1,
    "magi-4.5b-distill": _MAGI_1,
    "magi-4.5b-distill-quant": _MAGI_1,
    "magi-24b": _MAGI_1,
    "magi-24b-distill": _MAGI_1,
    "magi-24b-distill-quant": _MAGI_1,
}
"""By the name of the model's preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """What was asked for of reuse; None where the preset decides."""

    preset: CacheName = DEFAULT_CACHE
    threshold: float | None = None
    warmup: int | None = None
    reuse: ReuseKind | None = None
    extrapolate_from: float | None = None
    clean_pass: bool | None = None
    copy_pass: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KVOptions:
    """What was asked for of the KV buffer; None where nothing was."""

    budget: int | None = None
    retention: TokenUnit | None = None
    queries: TokenUnit | None = None


def cache_preset(name: CacheName, model: str | None) -> ReuseSettings:
    """What a name of `--cache` stands for.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both.

    Args:
        name: of the preset.
        model: name of the model's preset; None for a configuration file, which is one of MAGI-1.
    """
    from engine.reuse.settings import ReuseSettings

    if name is CacheName.NONE:
        return ReuseSettings()
    figures = _MAGI_1 if model is None else CACHE_FIGURES[model]
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


def cache_settings(options: CacheOptions, *, model: str | None, num_steps: int, guided: bool) -> ReuseSettings:
    """The preset that was asked for, with what was given on top of it.

    Args:
        options: what was asked for.
        model: as in `cache_preset`.
        num_steps: of a chunk.
        guided: the model has guidance, and with that no copy pass.

    Raises:
        InputError: the options do not fit each other or the model.
    """
    _check_fit(options, guided=guided)
    settings = cache_preset(options.preset, model)
    if options.threshold is not None:
        settings = settings.with_threshold(options.threshold)
    if options.warmup is not None:
        _check_warmup(options.warmup, settings.policy, num_steps)
        settings = replace(settings, warmup_steps=options.warmup)
    if options.reuse is not None:
        settings = replace(settings, reuse=options.reuse.value)
    if options.extrapolate_from is not None:
        settings = replace(settings, extrapolate_from=options.extrapolate_from)
    if options.clean_pass is not None:
        settings = replace(settings, clean_pass=options.clean_pass)
    if options.copy_pass is not None:
        settings = replace(settings, copy_pass=options.copy_pass)
    return settings


def kv_settings(options: KVOptions) -> KVSettings:
    """How much of the past is held, and how it is cut down.

    Raises:
        InputError: the options do not fit each other.
    """
    from engine.kv.selection import SelectionSettings
    from engine.kv.size import KVSettings

    if options.budget is None and (options.retention is not None or options.queries is not None):
        name = "--kv-queries" if options.retention is None else "--kv-retention"
        raise InputError(f"{name} says how the past is compressed: give --kv-budget CHUNKS with it, or leave it out")
    selection = SelectionSettings()
    if options.retention is not None:
        selection = replace(selection, retention=options.retention.value)
    if options.queries is not None:
        selection = replace(selection, queries=options.queries.value)
    return KVSettings(budget=options.budget, selection=selection)


def _check_fit(options: CacheOptions, *, guided: bool) -> None:
    given = {
        "--cache-threshold": options.threshold,
        "--cache-warmup": options.warmup,
        "--reuse": options.reuse,
        "--extrapolate-from": options.extrapolate_from,
    }
    names = [name for name, value in given.items() if value is not None]
    if options.preset is CacheName.NONE and names:
        raise InputError(f"--cache none reuses nothing: leave out {' and '.join(names)}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
    if options.threshold is not None and not (math.isfinite(options.threshold) and options.threshold >= 0):
        raise InputError(f"--cache-threshold {options.threshold:g} is no distance: give 0 or more, such as 0.01")
    if options.extrapolate_from is not None and not 0 <= options.extrapolate_from <= 1:
        raise InputError(f"--extrapolate-from {options.extrapolate_from:g} is no share of the threshold: give 0 to 1")


def _check_warmup(steps: int, policy: str, num_steps: int) -> None:
    if steps < 1:
        raise InputError(f"--cache-warmup {steps}: a chunk's first step must be computed, so give 1 or more")
    if policy == "flowcache" and steps >= num_steps:  # teacache counts the ticks of the whole video
        raise InputError(f"--cache-warmup {steps} computes all {num_steps} steps: give less, or --cache none")
