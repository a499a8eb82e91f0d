"""Videos in simulated time: cases that can be worked out by hand, and what must hold whatever the times are."""

import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulate.clock import Machine, plan_video, simulate
from engine.schedule import Schedule
from models.protocols import Pass, PassCondition


class OnePass:
    """Sampling of one pass for each step, and one to renew a finished chunk if that is wanted."""

    chunks_at_once, overlap = None, 0
    chunk_width, branches, publishes, sink, ends = 1, 1, True, 0, 0
    residual_of_layers, changes = False, None

    def __init__(self, num_steps, window, *, clean):
        self.num_steps, self.window, self.clean_pass = num_steps, window, clean

    def time(self, step):
        return step / self.num_steps

    @property
    def stagger(self):
        return self.num_steps // self.window

    def prefix_chunks(self, frames):
        return frames

    def solver(self, given, draw):
        return self

    def model_input(self, x, step):
        return x

    def step(self, x, velocity, step):
        return x + velocity / self.num_steps

    def computes(self, step, *, last_tick):
        return last_tick

    def key_limit(self, step, place):
        return None

    def clean_limit(self, *, prefix):
        return None

    def weighs_text(self, step):
        return False

    def _passes(self, name, weight):
        condition = PassCondition(times=(0.0,))
        one = Pass(name=name, caption="text", branch=0, isolated=False, weight=weight, condition=condition)
        return (one,)

    def step_passes(self, step, *, oldest, text_needed):
        return self._passes("denoise", 1.0)

    def clean_passes(self, step_in_quantum, *, prefix, text_needed):
        return self._passes("clean", 0.0) if self.clean_pass else ()


def video(chunks, seconds, *, steps=16, window=4, computed=lambda chunk, step: True, clean=False):
    """A video whose passes all take the same on each stage."""
    schedule = Schedule(first=0, chunks=chunks, num_steps=steps, window=window)
    flags = np.full((schedule.ticks, chunks), 255, dtype=np.uint8)
    for tick in schedule:
        for chunk, step in tick.active:
            flags[tick.index, chunk] = not computed(chunk, step)
    return plan_video(schedule, OnePass(steps, window, clean=clean), lambda what, step: seconds, flags)


def even(stages, whole=1.0):
    return (whole / stages,) * stages


def speed_up(plan, machine):
    return plan.total / simulate([plan], machine).seconds


def test_one_stage_takes_the_sum_of_its_calls():
    plan = video(5, (0.5,), steps=8, clean=True, computed=lambda chunk, step: step % 3 == 0)
    made = simulate([plan], Machine(stages=1, latency=9.0))
    calls = 5 * 3 + 4  # steps 0, 3 and 6 of each chunk, and every chunk but the last is renewed
    assert len(made.spans) == plan.calls == calls
    assert made.seconds == pytest.approx(0.5 * calls)
    assert made.utilisation == pytest.approx((1.0,))
    assert made.chunks[0][-1] == pytest.approx(made.seconds)
    assert made.first_chunk < made.chunks[0][1]


def test_a_window_of_one_goes_through_one_stage_after_the_other():
    """Each step is a full traverse with its links, and only the way back carries a velocity. A chunk's first step
    follows the last one of the chunk before through the pipeline, at the distance of the slowest stage."""
    plan = video(3, (0.2, 0.3, 0.5), steps=4, window=1)
    machine = Machine(stages=3, latency=0.1, bandwidth=10.0, hidden_bytes=2.0, velocity_bytes=1.0)
    traverse = 0.2 + 0.3 + 0.5 + 2 * (0.1 + 0.2) + 0.1 + 0.1
    chunks = simulate([plan], machine).chunks[0]
    assert chunks[0] == pytest.approx(4 * traverse)
    assert [b - a for a, b in pairwise(chunks)] == pytest.approx([3 * traverse + 0.5] * 2)


@pytest.mark.parametrize(("stages", "window"), [(2, 4), (4, 4), (8, 4), (8, 2), (3, 1)])
def test_one_video_is_bounded_by_its_window(stages, window):
    """A long video comes close to the smaller of the stages and the window; a chunk's first step may overlap with the
    last one of the chunk that it follows, which is all that it can gain."""
    plan = video(200, even(stages), steps=32, window=window)
    found, most = speed_up(plan, Machine(stages=stages)), min(stages, window)
    assert 0.93 * most < found <= min(stages, most * 32 / 31)


def test_two_stages_in_closed_form():
    """Two chunks or more keep both busy; while there is one, a step takes as long as on one GPU. Of 16 steps that is
    4 at the start, 4 at the end, and half a call over."""
    for chunks in (4, 6, 10):
        found = speed_up(video(chunks, even(2)), Machine(stages=2))
        assert found == pytest.approx(16 * chunks / (8 * chunks + 4.5))


def test_the_boundary_of_a_quantum_costs_a_slot():
    """With as many stages as chunks, the leader waits for the new oldest chunk while the one that left still runs:
    one slot in num_steps + 1."""
    chunks, steps = 800, 16
    assert speed_up(video(chunks, even(4), steps=steps), Machine(stages=4)) == pytest.approx(4 * 16 / 17, rel=0.01)


def test_a_barrier_in_closed_form():
    """k chunks take k + 3 slots of a quarter."""
    chunks, steps = 12, 16
    full, edges = (chunks - 3) * (4 + 3), 2 * (1 + 2 + 3 + 3 * 3)
    seconds = steps // 4 * (full + edges) / 4
    plan = video(chunks, even(4), steps=steps)
    assert simulate([plan], Machine(stages=4, barrier=True)).seconds == pytest.approx(seconds)


@pytest.mark.slow
def test_the_designs_figures_of_a_barrier():
    """34 layers over 4 stages, 64 steps, a clean pass for each chunk, a long video: 2.24x against 3.75x."""
    plan = video(400, tuple(Fraction(n, 34) for n in (9, 9, 8, 8)), steps=64, clean=True)
    assert round(float(speed_up(plan, Machine(stages=4))), 2) == 3.75
    assert round(float(speed_up(plan, Machine(stages=4, barrier=True))), 2) == 2.24


def test_reuse_lowers_the_bound_and_a_second_video_lifts_it():
    def computed(chunk, step):
        return step < 4 or step % 3 == 0 or step > 12

    plan = video(12, even(4), computed=computed)
    one = speed_up(plan, Machine(stages=4))
    two = 2 * plan.total / simulate([plan, plan], Machine(stages=4)).seconds
    assert one < speed_up(video(12, even(4)), Machine(stages=4))
    assert two > 1.2 * one


def test_decisions_and_results_take_the_leaders_time():
    """Eight decisions and two results, of which one decision is made while the other stage works."""
    plan = video(2, even(2), steps=4, computed=lambda chunk, step: step == 0)
    assert simulate([plan], Machine(stages=2, decide=0.1, take=0.2)).seconds == pytest.approx(2 + 7 * 0.1 + 2 * 0.2)


def test_a_last_step_that_is_reused_finishes_its_chunk():
    made = simulate([video(3, (1.0,), steps=4, computed=lambda chunk, step: step == 0)], Machine(stages=1))
    assert len(made.chunks[0]) == 3
    assert made.seconds == pytest.approx(3.0)


def test_calls_for_another_pipeline_are_refused():
    with pytest.raises(ValueError, match="2 stages, the machine has 3"):
        simulate([video(1, even(2))], Machine(stages=3))


def test_a_long_video_on_eight_stages_is_simulated_within_seconds():
    plan = video(60, even(8), steps=64, clean=True)
    began = time.perf_counter()
    simulate([plan], Machine(stages=8, latency=0.01))
    assert time.perf_counter() - began < 60


times = st.floats(0.01, 2.0)
small = st.builds(
    lambda chunks, window, per, seconds, mask, clean: video(
        chunks,
        tuple(seconds),
        steps=window * per,
        window=window,
        computed=lambda chunk, step: step == 0 or bool(mask >> (7 * chunk + 3 * step) % 31 & 1),
        clean=clean,
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(times, min_size=3, max_size=3),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
machines = st.builds(
    Machine,
    stages=st.just(3),
    latency=st.floats(0, 1),
    bandwidth=st.floats(0.5, 100),
    hidden_bytes=st.floats(0, 3),
    velocity_bytes=st.floats(0, 3),
    decide=st.floats(0, 0.3),
    barrier=st.booleans(),
)


def changed(machine, **figures):
    values = {name: getattr(machine, name) for name in Machine.__dataclass_fields__}
    return Machine(**{**values, **figures})


@settings(max_examples=60, deadline=None)
@given(small, machines, st.floats(1, 10))
def test_what_is_faster_never_makes_one_video_slower(plan, machine, factor):
    """One video's items run in one order whatever the times are, so every time is a sum of earlier ones at their
    latest. With several videos the order depends on the times, and this need not hold."""
    slow = simulate([plan], machine).seconds + 1e-9
    assert simulate([plan], changed(machine, bandwidth=machine.bandwidth * factor)).seconds <= slow
    assert simulate([plan], changed(machine, latency=machine.latency / factor)).seconds <= slow
    assert simulate([plan], changed(machine, decide=machine.decide / factor)).seconds <= slow
    assert simulate([plan], changed(machine, barrier=False)).seconds <= slow


@settings(max_examples=60, deadline=None)
@given(st.lists(small, min_size=1, max_size=3), machines)
def test_no_work_is_lost_or_done_twice_or_at_the_same_time(plans, machine):
    # Plans of one gang have the same stages, but not the same times.
    made = simulate(plans, machine)
    assert len(made.spans) == 3 * sum(plan.calls for plan in plans)
    assert sum(made.busy) == pytest.approx(sum(plan.total for plan in plans))
    assert made.seconds >= max(made.busy) - 1e-9
    orders = []
    for stage in range(3):
        spans = [span for span in made.spans if span.stage == stage]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans))
        orders.append([(span.video, span.tick, span.chunk, span.name) for span in spans])
    assert orders[0] == orders[1] == orders[2]
    for number in range(len(plans)):
        own = [(tick, chunk) for video, tick, chunk, name in orders[0] if video == number and name == "denoise"]
        assert own == sorted(own)
    for plan, chunks in zip(plans, made.chunks, strict=True):
        assert len(chunks) == plan.schedule.chunks
        assert list(chunks) == sorted(chunks)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), times, st.integers(2, 7), st.booleans())
def test_the_leader_never_idles_while_work_is_ready(chunks, seconds, every, clean):
    """Two videos on one stage, which has no one to wait for, leave no gap."""
    plan = video(chunks, (seconds,), steps=8, computed=lambda chunk, step: step % every == 0, clean=clean)
    made = simulate([plan, plan], Machine(stages=1))
    assert made.seconds == pytest.approx(2 * plan.total)
    assert all(b.start == pytest.approx(a.end) for a, b in pairwise(made.spans))
