"""Reuse policies and what stands in for a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.reuse.memory import ComputedStep, ReuseMemory
from engine.reuse.policy import (
    ChunkPolicy,
    CyclicPolicy,
    Decision,
    Observation,
    ReuseSettings,
    WindowPolicy,
    change_norms,
)
from models.errors import InputError


def seen(chunk, step, distance, *, tick=50, last=False):
    change, scale = (None, None) if distance is None else (distance, 1.0)
    return Observation(chunk=chunk, step=step, tick=tick, final=last, change=change, scale=scale)


distances = st.lists(st.floats(0, 0.02), min_size=1, max_size=40)


@given(distances=distances, threshold=st.floats(0, 0.05), warmup=st.integers(1, 6))
def test_chunk_policy_is_equation_8(distances, threshold, warmup):
    policy = ChunkPolicy(threshold, warmup)
    total = 0.0
    for step, distance in enumerate(distances):
        (decision,) = policy.decide([seen(3, step, distance)])
        if step < warmup or total + distance >= threshold:
            total = 0.0
            assert decision is Decision.COMPUTE
        else:
            total += distance
            assert decision is Decision.REUSE


def test_a_sum_that_equals_the_threshold_is_computed():
    policy = ChunkPolicy(0.75, 1)
    decided = [policy.decide([seen(0, step, 0.25)])[0] for step in range(5)]
    assert decided == [Decision.COMPUTE, Decision.REUSE, Decision.REUSE, Decision.COMPUTE, Decision.REUSE]


def test_the_published_distance_is_rounded_at_every_step():
    then = torch.tensor([1.0, 1.0]).bfloat16()
    now = torch.tensor([1.0078125, 1.03125]).bfloat16()
    change, scale = change_norms(then, now, torch.bfloat16)
    assert (change.dtype, change.item(), scale.item()) == (torch.bfloat16, 0.01953125, 1.0)
    third = {"chunk": 0, "step": 3, "tick": 3, "final": False, "change": 0.01953125, "scale": 3.0}
    assert Observation(**third).distance == 0.01953125 / 3.0
    assert Observation(**third, rounded=True).distance == torch.tensor(0.01953125 / 3.0).bfloat16().item()
    # 1 + 2^-8 lies between two numbers of bf16, and 1e-8 is added to a scale of zero.
    change, scale = change_norms(torch.zeros(2), torch.tensor([1.0, 1.00390625]), torch.bfloat16)
    assert (change.item(), scale.float().item()) == (1.0, torch.tensor(1e-8).bfloat16().item())
    assert [norm.item() for norm in change_norms(torch.zeros(2), torch.tensor([1.0, 1.00390625]), torch.float32)] == [
        1.001953125,
        0.0,
    ]


def test_branches_warm_up_every_so_many_passes_of_both():
    """Five passes: the branches begin anew at tick 2 and 3 in turn, and both at tick 5."""
    policy = CyclicPolicy(10.0, 1, (), 5)
    decided = [policy.decide([seen(0, tick, 0.1, tick=tick)])[0].name for tick in range(7)]
    assert decided == ["COMPUTE", "REUSE", "REUSE_TEXT", "REUSE_NULL", "REUSE", "COMPUTE", "REUSE"]
    even = CyclicPolicy(0.15, 1, (), 6)
    decided = [even.decide([seen(0, tick, 0.1, tick=tick)])[0].name for tick in range(7)]
    assert decided == ["COMPUTE", "REUSE", "COMPUTE", "COMPUTE", "REUSE", "COMPUTE", "COMPUTE"]
    with pytest.raises(InputError, match="say how many by its cycle"):
        ReuseSettings(policy="teacache-cyclic", threshold=0.1)


def test_chunks_do_not_share_their_sums():
    policy = ChunkPolicy(0.01, 1)
    for _ in range(3):
        decided = policy.decide([seen(0, 5, 0.02), seen(1, 2, 0.001)])
        assert decided == [Decision.COMPUTE, Decision.REUSE]


def test_the_last_tick_and_a_first_step_are_computed():
    policy = ChunkPolicy(1.0, 1)
    assert policy.decide([seen(0, 9, 0.0, last=True)]) == [Decision.COMPUTE]
    assert policy.decide([seen(1, 0, None)]) == [Decision.COMPUTE]


def test_window_policy_decides_once_for_all_but_a_new_chunk():
    policy = WindowPolicy(0.01, 2)
    # A large change of one chunk outweighs the small ones of the others.
    assert policy.decide([seen(0, 9, 0.05), seen(1, 5, 0.0)]) == [Decision.COMPUTE] * 2
    decided = policy.decide([seen(0, 10, 0.001), seen(1, 6, 0.001), seen(2, 0, None)])
    assert decided == [Decision.REUSE, Decision.REUSE, Decision.COMPUTE]


@given(distances=distances, cut=st.integers(0, 40), kind=st.sampled_from([ChunkPolicy, WindowPolicy]))
def test_a_restored_policy_goes_on_as_if_nothing_had_happened(distances, cut, kind):
    whole, first = kind(0.02, 1), kind(0.02, 1)
    expected = [whole.decide([seen(4, step, d)]) for step, d in enumerate(distances)]
    got = [first.decide([seen(4, step, d)]) for step, d in enumerate(distances[:cut])]
    second = kind(0.02, 1)
    second.restore(first.state())
    got += [second.decide([seen(4, cut + step, d)]) for step, d in enumerate(distances[cut:])]
    assert got == expected


def test_forgotten_chunks_leave_no_state():
    policy = ChunkPolicy(1.0, 1)
    for chunk in range(100):
        policy.decide([seen(chunk, 0, None), seen(chunk, 1, 0.1)])
        policy.forget(chunk)
    assert policy.state() == {}


@pytest.mark.parametrize("kind", ["residual", "velocity", "extrapolate"])
def test_a_step_of_the_same_size_and_velocity_is_repeated(kind):
    memory = ReuseMemory(kind)
    velocity = torch.tensor([1.0, -2.0])
    for step, time in enumerate((0.0, 0.1)):
        memory.computed(0, ComputedStep(step, time, (velocity,)))
    repeated, _ = memory.velocity(0, extrapolate=False, step=2, time=0.2)
    assert torch.allclose(repeated, velocity)


def two_steps(memory):
    for step, (time, velocity) in enumerate([(0.0, 1.0), (0.1, 2.0)]):
        memory.computed(0, ComputedStep(step, time, (torch.tensor([velocity]),)))
    return memory


def test_kinds_differ_when_step_sizes_do():
    increments, sizes = {}, [0.1, 0.1, 0.3]
    for kind in ("residual", "velocity", "extrapolate"):
        memory = two_steps(ReuseMemory(kind))
        velocity, over = memory.velocity(0, extrapolate=False, step=2, time=0.2)
        increments[kind] = velocity.item() * sizes[over]
    assert increments["residual"] == pytest.approx(0.2)
    assert increments["velocity"] == pytest.approx(0.6)
    # The change from 1 to 2 is taken once more: (2 + 1) * 0.3.
    assert increments["extrapolate"] == pytest.approx(0.9)


def test_extrapolation_is_a_middle_answer():
    policy = ChunkPolicy(0.10, 1, extrapolate_from=0.5)
    decided = [policy.decide([seen(0, step, 0.04)])[0] for step in range(4)]
    assert decided == [Decision.COMPUTE, Decision.REUSE, Decision.EXTRAPOLATE, Decision.COMPUTE]
    memory = two_steps(ReuseMemory("velocity", both=True))
    assert memory.velocity(0, extrapolate=False, step=2, time=0.2)[0].item() == pytest.approx(2)
    assert memory.velocity(0, extrapolate=True, step=2, time=0.2)[0].item() == pytest.approx(3)


def test_memory_is_bounded_by_the_chunks_that_are_alive():
    memory = ReuseMemory("extrapolate")
    for chunk in range(20):
        for step in range(8):
            memory.computed(chunk, ComputedStep(step, step / 8, (torch.zeros(3),)))
        memory.forget(chunk - 3)
    assert sorted(memory.state()) == [17, 18, 19]
    assert all(len(held) == 2 for held in memory.state().values())


@pytest.mark.parametrize(
    "values",
    [
        {"policy": "magic"},
        {"reuse": "magic"},
        {"policy": "flowcache", "threshold": -1.0},
        {"policy": "flowcache", "threshold": float("nan")},
        {"policy": "teacache", "warmup_steps": 0},
        {"policy": "flowcache", "extrapolate_from": 1.1},
        {"policy": "flowcache", "distance": "fp16"},
        {"policy": "teacache", "distance": "bf16"},
    ],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(InputError):
        ReuseSettings(**values)
