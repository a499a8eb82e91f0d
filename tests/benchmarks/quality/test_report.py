"""Curves at equal computed fraction, on trials whose curves are known."""

from dataclasses import replace

import pytest

from benchmarks.quality.__main__ import METHODS
from benchmarks.quality.report import (
    FRACTIONS,
    compare,
    curve_table,
    pareto_figure,
    psnr_at,
    setting_rows,
    speed_figure,
    verdicts,
)
from benchmarks.quality.trial import LEAN, VANILLA, WORK, Setting, Trial
from engine.reuse.policy import KINDS


def reusing(method, kind="residual", *, threshold, warmup=1, extrapolate_from=1.0, budget=None, passes=LEAN):
    """A setting with reuse; lean unless it says otherwise."""
    reuse = replace(passes, policy=method, threshold=threshold, warmup_steps=warmup, reuse=kind)
    return Setting(reuse=replace(reuse, extrapolate_from=extrapolate_from), budget=budget)


def trial(setting, seed=0, **changes):
    values = {
        "setting": setting,
        "prompt": f"prompt {seed}",
        "seed": seed,
        "computed": 1.0,
        "items": 100,
        "tflop": 0.1,
        "work": 0.8,
        "seconds": 1.0,
        "plain_seconds": 1.0,
        "vanilla_seconds": 1.2,
        "psnr": 100.0,
        "ssim": 1.0,
        "latent_error": 0.0,
        "psnr_uncompressed": 100.0,
        "psnr_vanilla": 40.0,
        "colour_right": True,
        "motion_right": seed % 2 == 0,
        "whole": True,
    }
    return Trial(**{**values, **changes})


PRESETS = {
    name: reusing(method="flowcache", kind="velocity", threshold=threshold, warmup=2)
    for name, threshold in zip(WORK, (0.3, 0.4), strict=True)
}
WORKS = dict(zip(PRESETS.values(), WORK.values(), strict=True))
BONUS = {"flowcache": 5.0, "teacache": 0.0, "residual": 0.0, "velocity": 2.0, "extrapolate": 1.0}


def sweep(prompts=4, speed=0.95, bonus=BONUS):
    """Straight curves: 20 dB at none computed, 60 at all, and a bonus for each method and kind."""
    found = [trial(Setting(), seed, work=1.0) for seed in range(prompts)]
    for method in METHODS:
        for kind in KINDS:
            for threshold in (0.1, 0.3, 0.4, 0.6):
                computed = 1 - threshold
                setting = reusing(method=method, kind=kind, threshold=threshold, warmup=2)
                psnr = 20 + 40 * computed + bonus[method] + bonus[kind]
                figures = {"computed": computed, "seconds": computed / speed, "work": WORKS.get(setting, computed)}
                found += [trial(setting, seed, psnr=psnr + seed, **figures) for seed in range(prompts)]
    return found


@pytest.mark.parametrize("fraction", [0.9, 0.8, 0.62, 0.4])
def test_curves_are_read_between_their_points(fraction):
    found = psnr_at(sweep(), ("teacache", "velocity"), fraction)
    expected = {(f"prompt {seed}", seed): pytest.approx(22 + 40 * fraction + seed) for seed in range(4)}
    assert found == expected


def test_a_curve_has_no_value_where_it_was_not_measured():
    assert psnr_at(sweep(), ("teacache", "velocity"), 0.39) == {}
    assert psnr_at(sweep(), ("teacache", "velocity"), 0.95) == {}
    assert compare(sweep(), ("teacache", "velocity"), ("flowcache", "velocity"), 0.2) == []


def test_points_where_nothing_was_reused_or_that_are_compressed_are_on_no_curve():
    way, setting = ("flowcache", "residual"), reusing(method="flowcache", threshold=0.001)
    extra = [
        trial(setting, psnr=100.0, computed=1.0),
        trial(reusing(method="flowcache", threshold=0.1, budget=2), psnr=0.0, computed=0.8),
        trial(reusing(method="flowcache", threshold=0.1, passes=VANILLA), psnr=0.0, computed=0.8),
    ]
    assert psnr_at(sweep() + extra, way, 0.8) == psnr_at(sweep(), way, 0.8)


def test_two_ways_are_compared_on_the_prompts_of_both():
    trials = [one for one in sweep() if one.setting.reuse.policy == "flowcache" or one.seed != 3]
    found = compare(trials, ("flowcache", "residual"), ("teacache", "residual"), 0.65)
    assert [a - b for a, b in found] == pytest.approx([5] * 3)


def verdict_words(trials, kind="velocity"):
    return ["PASS" if one.passed else "FAIL" for one in verdicts(trials, kind, PRESETS)]


def test_every_verdict_passes_and_fails_for_its_own_reason():
    assert verdict_words(sweep()) == ["PASS"] * 12
    chunk_wise = ["PASS"] * 12
    chunk_wise[:6] = ["FAIL"] * 6
    assert verdict_words(sweep(bonus={**BONUS, "flowcache": 0.0})) == chunk_wise
    kind = ["PASS"] * 12
    kind[6:9] = ["FAIL"] * 3
    assert verdict_words(sweep(bonus={**BONUS, "velocity": -1.0})) == kind
    assert verdict_words(sweep(speed=0.89))[9:] == ["FAIL", "PASS", "PASS"]
    other = dict(zip(PRESETS, (reusing(method="flowcache", threshold=9.0),) * 2, strict=True))
    assert [one.passed for one in verdicts(sweep(), "velocity", other)][10:] == [False, False]


def test_residual_is_not_compared_with_itself():
    assert len(verdict_words(sweep(), "residual")) == 6
    assert [one.name for one in verdicts(sweep(), "residual", PRESETS) if "against residual" in one.name] == []


def test_a_comparison_on_few_of_the_prompts_does_not_pass():
    few = [one for one in sweep() if one.setting.reuse.policy != "teacache" or one.seed < 2]
    assert verdict_words(few)[:6] == ["FAIL"] * 6


def test_tables_hold_every_setting_once_and_name_the_presets():
    trials = sweep() + [trial(Setting(reuse=LEAN, budget=2))]
    rows = setting_rows(trials, PRESETS)
    methods = [row["method"] for row in rows]
    assert all(methods.count(name) == 1 for name in PRESETS)
    assert len(rows) == 2 + 24 and len({tuple(row) for row in rows}) == 1
    table = curve_table(trials)
    assert f"PSNR at {FRACTIONS[0]:.0%}" in table and table.count("flowcache") == 3 and "80%: 4" in table
    assert "60.50" in table  # flowcache, velocity at 80%: 20 + 32 + 7, and 1.5 for the mean prompt


def test_figures_have_a_line_for_every_way_and_units():
    for figure, lines in ((pareto_figure(sweep(), "title"), 6), (speed_figure(sweep(), "title"), 8)):
        (axes,) = figure.axes
        assert len(figure.legends[0].get_texts()) == lines
        assert "%" in axes.get_xlabel() and "(" in axes.get_ylabel() and axes.get_title().endswith("title")
    curve = pareto_figure(sweep(), "title").axes[0].lines[len(FRACTIONS)]
    assert list(curve.get_xdata()) == pytest.approx([40, 60, 70, 90])
    assert list(curve.get_ydata()) == pytest.approx([20 + 0.4 * x + 5 + 1 + 1.5 for x in (40, 60, 70, 90)])
