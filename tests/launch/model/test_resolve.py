"""Presets of reuse and memory: the paper's figures, and options that fit or do not."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from engine.kv.layout import KVSettings
from engine.kv.selection import Granularity, SelectionSettings
from engine.reuse.policy import KINDS, ReuseSettings
from launch.model.resolve import kv_settings, plan_model, reuse_preset, reuse_settings
from launch.options import CacheName, Options, ReuseKind, TokenUnit
from models.errors import InputError
from models.family import ReuseFigures
from models.magi.family import MAGI_1_FIGURES, POCKET_FIGURES
from models.wan.family import WanFamily
from models.wan.presets import PRESETS


def _settings(options: Options, *, num_steps: int = 16, guided: bool = False) -> ReuseSettings:
    return reuse_settings(options, MAGI_1_FIGURES, num_steps=num_steps, guided=guided)


def test_names_are_those_of_the_engine() -> None:
    assert get_args(ReuseKind) == KINDS
    assert get_args(TokenUnit) == get_args(Granularity)


@pytest.mark.parametrize(
    ("name", "policy", "threshold"),
    [
        ("teacache", "teacache", 0.01),
        ("flowcache-slow", "flowcache", 0.01),
        ("flowcache-fast", "flowcache", 0.015),
    ],
)
def test_magi_1_has_the_figures_of_the_paper(name: CacheName, policy: str, threshold: float) -> None:
    settings = reuse_preset(name, MAGI_1_FIGURES)
    assert (settings.policy, settings.threshold, settings.warmup_steps) == (policy, threshold, 5)
    assert settings.reuse == "residual" and settings.extrapolate_from == 1
    assert not settings.clean_pass and not settings.copy_pass


def test_magi_pocket_has_its_own() -> None:
    names = ("flowcache-slow", "flowcache-fast")
    slow, fast = (reuse_preset(name, POCKET_FIGURES) for name in names)
    assert slow.policy == fast.policy == "flowcache"
    assert reuse_preset("flowcache-slow", MAGI_1_FIGURES).threshold < slow.threshold < fast.threshold
    assert slow.warmup_steps == fast.warmup_steps < 16


@pytest.mark.parametrize("figures", [MAGI_1_FIGURES, POCKET_FIGURES])
def test_without_reuse_nothing_is_left_out(figures: ReuseFigures) -> None:
    settings = reuse_preset("none", figures)
    assert settings == ReuseSettings() and settings.clean_pass and settings.copy_pass


def test_released_models_reuse_nothing_unless_asked() -> None:
    assert _settings(Options()) == ReuseSettings()
    assert reuse_settings(Options(), POCKET_FIGURES, num_steps=16, guided=False).policy == "flowcache"
    with pytest.raises(InputError, match="--cache none reuses nothing"):
        _settings(Options(cache_threshold=0.2))


def test_options_change_single_figures() -> None:
    options = Options(
        cache="flowcache-fast",
        cache_threshold=0.2,
        cache_warmup=2,
        reuse="velocity",
        extrapolate_from=0.5,
        clean_pass=True,
        copy_pass=True,
    )
    assert _settings(options) == ReuseSettings(
        policy="flowcache", threshold=0.2, warmup_steps=2, reuse="velocity", extrapolate_from=0.5
    )
    one = _settings(Options(cache="flowcache-fast", cache_warmup=2))
    assert (one.threshold, one.warmup_steps, one.clean_pass) == (0.015, 2, False)


def test_a_distance_that_is_given_has_no_fit_of_another() -> None:
    """The published fit of SkyReels-V2 belongs to the distance that looks at no latents."""
    config = PRESETS["skyreels-v2-df-1.3b-540p"].config()
    figures, steps = WanFamily().reuse_figures(config), config.runtime.num_steps
    published, own = (
        reuse_settings(Options(cache="flowcache-fast", distance=given), figures, num_steps=steps, guided=True)
        for given in (None, "fp32")
    )
    assert (published.distance, len(published.polynomial), published.threshold) == ("condition", 5, 0.15)
    assert (own.distance, own.polynomial) == ("fp32", ())


def test_passes_can_be_left_out_without_reuse() -> None:
    settings = _settings(Options(cache="none", clean_pass=False, copy_pass=False))
    assert settings == ReuseSettings(clean_pass=False, copy_pass=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(cache="none", cache_threshold=0.1), "leave out --cache-threshold, or"),
        (
            Options(cache="none", cache_threshold=0.1, cache_warmup=3),
            "--cache-threshold and --cache-warmup, or",
        ),
        (Options(cache="none", extrapolate_from=0.5), "leave out --extrapolate-from"),
        (Options(cache="flowcache-slow", cache_warmup=16), "computes all 16 steps"),
    ],
)
def test_options_that_do_not_fit(options: Options, said: str) -> None:
    with pytest.raises(InputError, match=said):
        _settings(options)


def test_teacache_warms_up_once_for_the_whole_video() -> None:
    options = Options(cache="teacache", cache_warmup=20)
    assert _settings(options, num_steps=16).warmup_steps == 20


def test_a_copy_pass_needs_a_distilled_model() -> None:
    with pytest.raises(InputError, match="--copy-pass is for distilled models"):
        _settings(Options(copy_pass=True), guided=True)
    assert not _settings(Options(copy_pass=False), guided=True).copy_pass


def test_a_released_configuration_offloads_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them say `kv_offload: true`. Where there is no GPU, the device is the host."""
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        for model, given, offload in (
            ("magi-4.5b", None, gpu),
            ("magi-4.5b", not gpu, not gpu),
            ("magi-pocket", None, False),
        ):
            options = Options(model=model, weights=Path("random"), kv_offload=given)
            assert plan_model(options).kv.offload == offload


def test_memory() -> None:
    assert kv_settings(Options()) == KVSettings()
    assert [kv_settings(Options(kv_offload=given), offload=True).offload for given in (None, False)] == [True, False]
    options = Options(kv_budget=3, kv_score="even", kv_retention="chunk", kv_queries="frame")
    selection = SelectionSettings(score="even", retention="chunk", queries="frame")
    assert kv_settings(options) == KVSettings(budget=3, selection=selection)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(kv_score="even"), "--kv-score says how the past is compressed: give --kv-budget"),
        (Options(kv_retention="chunk"), "--kv-retention says how the past is compressed: give --kv-budget"),
        (Options(kv_queries="chunk"), "--kv-queries says how the past is compressed: give --kv-budget"),
    ],
)
def test_memory_that_does_not_fit(options: Options, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kv_settings(options)


@pytest.mark.parametrize(
    ("model", "given", "renews"),
    [
        ("skyreels-v2-df-1.3b-540p", {}, False),
        ("skyreels-v2-df-1.3b-540p", {"clean_pass": True}, True),
        ("self-forcing-1.3b", {}, True),
        ("magi-4.5b", {}, True),
    ],
)
def test_a_run_without_reuse_renews_finished_chunks_where_it_is_published_so(model, given, renews):
    plan = plan_model(Options(prompts=["a cat"], model=model, weights=Path("random"), cache="none", **given))
    assert plan.reuse.policy == "none" and plan.reuse.clean_pass is renews
