"""Layers over stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InputError
from models.magi.presets import released_config
from models.pocket.preset import pocket_config
from parallel.mesh import Layout, Mesh
from parallel.split import balanced_split, parse_split, stage_layers, stage_range, stage_sizes


@st.composite
def cases(draw):
    layers = draw(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
    ends = {"first": draw(st.floats(0, 5)), "last": draw(st.floats(0, 5))}
    return layers, draw(st.integers(1, len(layers))), ends


def all_splits(count, stages):
    if stages == 1:
        yield (count,)
        return
    for first in range(1, count - stages + 2):
        for rest in all_splits(count - first, stages - 1):
            yield (first, *rest)


@given(case=cases())
def test_the_split_is_the_best_of_all_and_loses_no_layer(case):
    layers, stages, ends = case
    sizes = balanced_split(layers, stages, **ends)
    assert len(sizes) == stages
    placed = [layer for stage in range(stages) for layer in stage_layers(sizes, stage)]
    assert placed == list(range(len(layers)))

    def worst(split):
        costs = [sum(layers[layer] for layer in stage_layers(split, stage)) for stage in range(stages)]
        costs[0] += ends["first"]
        costs[-1] += ends["last"]
        return max(costs)

    assert worst(sizes) <= min(worst(split) for split in all_splits(len(layers), stages)) + 1e-9


def test_34_layers_over_4_and_8_are_uneven_and_whole():
    assert sorted(balanced_split([1.0] * 34, 4)) == [8, 8, 9, 9]
    assert sum(balanced_split([1.0] * 34, 8)) == 34


def test_a_costly_head_and_tail_get_fewer_layers():
    sizes = balanced_split([1.0] * 12, 3, first=2.0, last=1.0)
    assert sizes == (3, 5, 4)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(InputError, match="3 layers cannot be split over 4 stages"):
        balanced_split([1.0] * 3, 4)


def test_a_split_by_hand_is_taken():
    assert parse_split("9,9,8,8", layers=34, stages=4) == (9, 9, 8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9,9,8", "names 3 stages, but there are 4"),
        ("9,9,8,7", "places 33 layers, but the model has 34"),
        ("34,0,0,0", "without layers"),
        ("many", "not a list of numbers"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_split(text, layers=34, stages=4)


def test_every_stage_of_a_model_has_its_layers():
    config = pocket_config()
    for stages in range(1, 7):
        ranges = [stage_range(config, Mesh(layout=Layout(pp=stages), rank=stage)) for stage in range(stages)]
        assert [layer for part in ranges for layer in part] == list(range(6))
    assert stage_sizes(config, 2, "4,2") == (4, 2)
    assert stage_sizes(config, 2) == (3, 3)


def test_the_leader_decodes_and_has_fewer_layers_for_it():
    config = released_config("4.5B_distill")
    assert 0 < config.figures.decode_cost < config.figures.layer_cost
    assert stage_sizes(config, 4) == (8, 9, 9, 8)
    assert stage_sizes(config, 8)[0] == min(stage_sizes(config, 8))
    assert pocket_config().figures.decode_cost == 0
