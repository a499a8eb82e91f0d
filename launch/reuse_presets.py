"""What `--cache` and `--kv-budget` stand for with each model: settings of reuse and of the KV buffer.

Figures only; nothing is loaded here. How a policy decides is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launch.options import CacheName, Options, ReuseKind
from models.errors import InputError

if TYPE_CHECKING:  # the engine pulls in torch, which a list of names must not wait for
    from engine.kv.size import KVSettings
    from engine.reuse.settings import ReuseSettings


DEFAULT_MODEL = "magi-pocket"

# magi-pocket's thresholds, for 16 steps; benchmarks.quality measures what they mean.
POCKET_WARMUP = 3
POCKET_SLOW = 0.0629
POCKET_FAST = 0.0994
POCKET_TEACACHE = 0.0657


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFigures:
    """What the presets of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    reuse: ReuseKind = ReuseKind.EXTRAPOLATE  # docs/reuse.md has the figures that decided it
    """What stands in for a step that is left out."""
    extrapolate_from: float = 1.0
    """Share of the threshold above which a step is extrapolated in place of that; 1 never does."""


_MAGI_1 = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01)  # FlowCache, below Eq. 8
_POCKET = ReuseFigures(warmup_steps=POCKET_WARMUP, slow=POCKET_SLOW, fast=POCKET_FAST, teacache=POCKET_TEACACHE)

REUSE_FIGURES: dict[str, ReuseFigures] = {
    "magi-pocket": _POCKET,
    "magi-4.5b": _MAGI_1,
    "magi-4.5b-distill": _MAGI_1,
    "magi-4.5b-distill-quant": _MAGI_1,
    "magi-24b": _MAGI_1,
    "magi-24b-distill": _MAGI_1,
    "magi-24b-distill-quant": _MAGI_1,
}
"""By the name of the model's preset."""


def reuse_preset(name: CacheName, model: str | None) -> ReuseSettings:
    """What a name of `--cache` stands for.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both.
    A configuration file (`model` None) is one of MAGI-1.
    """
    from engine.reuse.settings import ReuseSettings

    if name is CacheName.NONE:
        return ReuseSettings()
    figures = _MAGI_1 if model is None else REUSE_FIGURES[model]
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
    _check_fit(options, guided=guided)
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
    """How much of the past is held, and how it is cut down.

    Raises:
        InputError: the options do not fit each other.
    """
    from engine.kv.selection import SelectionSettings
    from engine.kv.size import KVSettings

    retention, queries = options.kv_retention, options.kv_queries
    if options.kv_budget is None and (retention is not None or queries is not None):
        name = "--kv-queries" if retention is None else "--kv-retention"
        raise InputError(f"{name} says how the past is compressed: give --kv-budget CHUNKS with it, or leave it out")
    selection = SelectionSettings()
    if retention is not None:
        selection = replace(selection, retention=retention.value)
    if queries is not None:
        selection = replace(selection, queries=queries.value)
    return KVSettings(budget=options.kv_budget, selection=selection)


def _check_fit(options: Options, *, guided: bool) -> None:
    names = [
        "--" + name.replace("_", "-")
        for name in ("cache_threshold", "cache_warmup", "reuse", "extrapolate_from")
        if getattr(options, name) is not None
    ]
    if options.cache is CacheName.NONE and names:
        raise InputError(f"--cache none reuses nothing: leave out {' and '.join(names)}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
