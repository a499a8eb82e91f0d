"""Settings that are compared, and thresholds that are found."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sweep import (
    LEAN,
    STAND_INS,
    WORK,
    Grid,
    ObservationLog,
    Setting,
    StandIn,
    calibrate,
    estimate_threshold,
    ladder,
    refined,
)
from engine.reuse.policy import ChunkPolicy, Decision, Observation
from engine.schedule import Schedule

VELOCITY = StandIn(kind="velocity")
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


def test_settings_become_those_of_the_engine():
    setting = Setting(method="flowcache", kind="velocity", threshold=0.02, warmup=3, passes=LEAN, budget=2)
    cache = setting.cache
    assert (cache.policy, cache.reuse, cache.threshold, cache.warmup_steps) == ("flowcache", "velocity", 0.02, 3)
    assert not cache.clean_pass and not cache.copy_pass and setting.kv.budget == 2
    assert replace(setting, extrapolate_from=0.5).cache.extrapolate_from == 0.5
    vanilla = Setting().cache
    assert vanilla.policy == "none" and vanilla.clean_pass and vanilla.copy_pass
    assert setting.plain == Setting(passes=LEAN, budget=2)


def test_the_grid_has_everything_once_and_each_has_its_reference():
    found = GRID.settings(lambda method, stand_in, fraction: round(1 - fraction, 3), PRESETS)
    assert len(found) == len(set(found)) == 2 + 2 * 4 * 2 + 2 + 2 + 2 * 3
    lean_curves = {one.plain for one in found if one.method != "none" and one.budget is None}
    assert lean_curves == {Setting(), Setting(passes=LEAN)}
    assert {one.budget for one in found} == {None, 1, 3}
    assert {one.plain for one in found} <= set(found)


def test_what_was_chosen_is_swept_too():
    odd = StandIn(kind="residual", extrapolate_from=0.7)
    assert replace(GRID, chosen=odd).stand_ins == (*STAND_INS, odd) and GRID.stand_ins == STAND_INS
    assert [one.label for one in (VELOCITY, odd)] == ["velocity", "residual, extrapolate from 0.7"]


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


def test_a_ladder_has_equal_ratios():
    rungs = ladder(0.001, 0.1, 5)
    assert rungs[0] == 0.001 and rungs[-1] == 0.1
    assert all(b / a == pytest.approx(10**0.5, rel=0.01) for a, b in pairwise(rungs))


def curved(threshold):
    return 0.3 + 0.7 / (1 + (threshold / 0.05) ** 4)


@pytest.mark.parametrize("target", [0.9, 0.8, 0.5, 0.35])
@pytest.mark.parametrize("known", [(0.001, 1.0), (0.001, 0.002), (0.5, 1.0)])
def test_thresholds_are_found_between_known_ones_and_beyond_them(target, known):
    measured = {one: curved(one) for one in known}
    found = refined(curved, measured, target, tries=9)
    assert curved(found) == pytest.approx(target, abs=0.02)
    assert len(measured) <= 2 + 9 and found == float(f"{found:.3g}")


def test_what_is_known_well_enough_is_not_measured_again():
    def measure(threshold):
        raise AssertionError("there was no need")

    assert refined(measure, {0.01: 0.9, 0.1: 0.51, 1.0: 0.3}, 0.5) == 0.1


@given(jumps=st.lists(st.floats(0.05, 1), min_size=2, max_size=8), target=st.floats(0, 1), tries=st.integers(0, 6))
def test_the_nearest_that_was_measured_is_taken_however_fractions_jump(jumps, target, tries):
    measured = {0.001 * 2**i: fraction for i, fraction in enumerate(jumps)}
    found = refined(lambda threshold: jumps[int(threshold * 1e6) % len(jumps)], measured, target, tries)
    assert len(measured) <= len(jumps) + tries
    assert abs(measured[found] - target) == min(abs(one - target) for one in measured.values())


@pytest.mark.parametrize("start", [0.02, 0.05])
def test_calibration_finds_the_work_that_is_wanted(start):
    asked = []

    def work(threshold):
        asked.append(threshold)
        return 1 / (1 + 20 * threshold)

    found = calibrate(work, start=start, target=0.6)
    assert work(found) == pytest.approx(0.6, abs=0.01)
    assert len(set(asked[:-1])) <= 8 and found == float(f"{found:.3g}")
