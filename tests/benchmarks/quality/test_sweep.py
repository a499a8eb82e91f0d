"""Settings that are compared, and thresholds that are found."""

from dataclasses import replace

import pytest

from benchmarks.quality.__main__ import METHODS, STAND_INS, calibrated, curves, presets_of_pocket, settings_of
from benchmarks.quality.trial import LEAN, WORK, Setting, label_of

PRESETS = presets_of_pocket()
SLOW = PRESETS["flowcache-slow"]


def curved(setting):
    """A computed fraction that falls with the threshold, for any method and kind."""
    return 0.3 + 0.7 / (1 + (setting.reuse.threshold / 0.05) ** 4) if setting.reuses else 1.0


def test_a_setting_says_what_it_is_and_what_it_is_compared_with():
    setting = Setting(reuse=replace(SLOW.reuse, reuse="velocity", extrapolate_from=0.5))
    assert not setting.reuse.clean_pass and not setting.reuse.copy_pass
    assert setting.lean and setting.reuses and setting.label == "velocity, extrapolate from 0.5"
    assert not Setting().reuses and Setting().reuse.clean_pass and Setting().reuse.copy_pass
    assert replace(setting, budget=2).plain == Setting(reuse=LEAN, budget=2)
    assert [label_of("velocity", 1.0), label_of("residual", 0.7)] == ["velocity", "residual, extrapolate from 0.7"]


def test_the_sweep_has_everything_once_and_each_has_its_reference():
    points = curves(PRESETS, (0.8, 0.5), curved, 12)
    found = settings_of(PRESETS, points, (1, 3))
    assert len(points) == 2 * 4 * 2
    assert len(found) == len(set(found)) == 2 + len({*PRESETS.values(), *points}) + 2 + 2 * 3
    assert {one.plain for one in found if one.reuses and one.budget is None} == {Setting(), Setting(reuse=LEAN)}
    assert {one.budget for one in found} == {None, 1, 3}
    assert {one.plain for one in found} <= set(found)


def test_what_was_chosen_is_swept_too():
    odd = {"flowcache-slow": Setting(reuse=replace(SLOW.reuse, reuse="residual", extrapolate_from=0.7))}
    labels = {one.label for one in curves(odd, (0.8,), curved, 12)}
    assert labels == {*(label_of(*one) for one in STAND_INS), "residual, extrapolate from 0.7"}


def test_points_compute_the_fractions_that_were_asked_for():
    for method in METHODS:
        own = [one for one in curves(PRESETS, (0.8, 0.5), curved, 12) if one.reuse.policy == method]
        assert [curved(one) for one in own] == pytest.approx([0.8, 0.5] * 4, abs=0.02)


def test_presets_are_calibrated_to_the_work_with_few_videos():
    asked = []

    def work(setting):
        asked.append(setting)
        return 0.8 * curved(setting)

    found = calibrated(PRESETS, work, 12)
    for name, target in WORK.items():
        setting = Setting(reuse=SLOW.reuse.with_threshold(found[name]))
        assert work(setting) == pytest.approx(target, abs=0.01)
        assert found[name] == float(f"{found[name]:.3g}")
    assert len(asked) <= 2 * 12 + len(WORK)
