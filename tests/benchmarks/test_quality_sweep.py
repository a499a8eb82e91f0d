"""Settings that are compared, and thresholds that are found."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.sweep import (
    LEAN,
    STAND_INS,
    WORK,
    Grid,
    ObservationLog,
    Probe,
    Setting,
    estimate_threshold,
    label_of,
    make_plan,
)
from engine.reuse.policy import ChunkPolicy, Decision, Observation
from engine.schedule import Schedule

VELOCITY = ("velocity", 1.0)
GRID = Grid(warmup=2, chosen=VELOCITY, fractions=(0.8, 0.5), budgets=(1, 3))
PRESETS = {name: GRID.reuse("flowcache", VELOCITY, 0.01 * (i + 1)) for i, name in enumerate(WORK)}


def watched(chunks=6, distance=lambda chunk, step: 0.01):
    """What is seen of a video of 8 steps whose distances are known."""
    log = ObservationLog()
    schedule = Schedule(first=0, chunks=chunks, num_steps=8, window=4)
    log.begin(schedule)
    for tick in schedule:
        for chunk, step in tick.active:
            change = distance(chunk, step) if step else None
            last = tick.index == schedule.ticks - 1
            seen = Observation(
                chunk=chunk, step=step, tick=tick.index, last_tick=last, change=change, scale=1.0 if step else None
            )
            log.decided(seen, Decision.COMPUTE)
    return log.ticks


def test_a_log_keeps_each_tick_apart():
    ticks = watched()
    assert len(ticks) == 18 and sum(map(len, ticks)) == 6 * 8
    assert all(len({one.tick for one in seen}) == 1 for seen in ticks)


def test_a_setting_says_what_it_is_and_what_it_is_compared_with():
    setting = GRID.reuse("flowcache", ("velocity", 0.5), 0.02)
    cache = setting.reuse
    assert (cache.policy, cache.reuse, cache.threshold, cache.warmup_steps) == ("flowcache", "velocity", 0.02, 2)
    assert not cache.clean_pass and not cache.copy_pass and cache.extrapolate_from == 0.5
    assert setting.lean and setting.reuses and setting.label == "velocity, extrapolate from 0.5"
    assert not Setting().reuses and Setting().reuse.clean_pass and Setting().reuse.copy_pass
    assert replace(setting, budget=2).plain == Setting(reuse=LEAN, budget=2)


def test_the_grid_has_everything_once_and_each_has_its_reference():
    found = GRID.settings(lambda method, stand_in, fraction: round(1 - fraction, 3), PRESETS)
    assert len(found) == len(set(found)) == 2 + 2 * 4 * 2 + 2 + 2 + 2 * 3
    lean_curves = {one.plain for one in found if one.reuses and one.budget is None}
    assert lean_curves == {Setting(), Setting(reuse=LEAN)}
    assert {one.budget for one in found} == {None, 1, 3}
    assert {one.plain for one in found} <= set(found)


def test_what_was_chosen_is_swept_too():
    odd = ("residual", 0.7)
    assert replace(GRID, chosen=odd).stand_ins == (*STAND_INS, odd) and GRID.stand_ins == STAND_INS
    assert [label_of(one) for one in (VELOCITY, odd)] == ["velocity", "residual, extrapolate from 0.7"]


@settings(deadline=None)
@given(st.floats(0.4, 0.95))
def test_an_estimated_threshold_computes_about_the_fraction(fraction):
    seen = [watched(distance=lambda chunk, step: 0.01 * (1 + step % 3) * (1 + chunk % 2))]
    threshold = estimate_threshold(seen, lambda one: ChunkPolicy(one, 2), fraction)
    policy = ChunkPolicy(threshold, 2)
    decided = [one for tick in seen[0] for one in policy.decide(tick)]
    share = decided.count(Decision.COMPUTE) / len(decided)
    finer = ChunkPolicy(threshold * 0.98, 2)
    before = [one for tick in seen[0] for one in finer.decide(tick)]
    assert share <= fraction + 0.01 <= before.count(Decision.COMPUTE) / len(before) + 0.02


def test_what_the_warm_up_computes_cannot_be_saved():
    assert estimate_threshold([watched()], lambda one: ChunkPolicy(one, 8), 0.5) == 100


def curved(setting):
    """A computed fraction that falls with the threshold, for any method and kind."""
    return 0.3 + 0.7 / (1 + (setting.reuse.threshold / 0.05) ** 4) if setting.reuses else 1.0


def test_a_plan_has_thresholds_of_the_fractions_and_of_the_work():
    asked = []

    def work(setting):
        asked.append(setting)
        return 0.8 * curved(setting)

    probe = Probe(observe=lambda: [watched(distance=lambda chunk, step: 0.02)], computed=curved, work=work)
    plan = make_plan(probe, GRID, None, {"model": "made up"}, lambda line: None)
    for name, target in WORK.items():
        assert work(plan.presets[name]) == pytest.approx(target, abs=0.01)
        assert plan.calibrated[name] == plan.presets[name].reuse.threshold == float(f"{plan.calibrated[name]:.3g}")
    assert len(set(asked)) <= 1 + 8 * len(WORK)
    for method in ("flowcache", "teacache"):
        own = [one for one in plan.settings if (one.reuse.policy, one.reuse.reuse) == (method, "extrapolate")]
        assert sorted({curved(one) for one in own}) == pytest.approx([0.5, 0.8], abs=0.02)
