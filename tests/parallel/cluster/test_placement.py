"""Whether the cluster has room, and who gets which place; no cluster is needed for that."""

import pytest

from models.errors import InputError
from parallel.cluster.actor import device_index
from parallel.cluster.placement import GangShape, assign_places, plan_strategies
from parallel.mesh import Layout


def shape(pp=1, cp=1, gpus=False, cpus=1):
    return GangShape(layout=Layout(pp=pp, cp=cp), gpus=gpus, cpus=cpus)


def nodes(*counts, cpus=64):
    return {f"n{index}": {"GPU": float(gpus), "CPU": float(cpus)} for index, gpus in enumerate(counts)}


def test_a_gang_that_fits_on_a_node_is_kept_there():
    assert plan_strategies(nodes(8, 8), shape(pp=4, gpus=True), 4) == ["STRICT_PACK"] * 4


def test_the_last_gang_spreads_over_what_the_others_leave():
    assert plan_strategies(nodes(8, 8), shape(pp=5, gpus=True), 3) == ["STRICT_PACK", "STRICT_PACK", "PACK"]


def test_small_gaps_are_filled_first_so_that_large_gangs_find_room():
    uneven = {"large": {"CPU": 4.0}, "small": {"CPU": 2.0}}
    assert plan_strategies(uneven, shape(pp=2), 3) == ["STRICT_PACK"] * 3


def test_too_many_gpus_are_refused_with_what_is_asked_and_what_is_there():
    with pytest.raises(InputError) as error:
        plan_strategies(nodes(8, 4), shape(pp=4, cp=2, gpus=True, cpus=2), 2)
    assert str(error.value) == (
        "2 gangs of --pp 4 x --cp 2 need 16 GPUs and 32 CPUs, 2 of the GPUs of each stage on one node; "
        "the cluster has 12 GPUs and 128 CPUs on 2 nodes (8, 4): ask for fewer, or add nodes"
    )


def test_a_context_parallel_group_that_fits_on_no_node_is_refused_though_the_sum_would_do():
    with pytest.raises(InputError, match="8 of the GPUs of each stage on one node; the cluster has 8 GPUs"):
        plan_strategies(nodes(4, 4), shape(cp=8, gpus=True), 1)


def test_too_few_cpus_are_refused():
    with pytest.raises(InputError, match="1 gang of --pp 3 x --cp 1 needs 6 CPUs; the cluster has 4 CPUs on 1 node"):
        plan_strategies({"n": {"CPU": 4.0}}, shape(pp=3, cpus=2), 1)


def test_ranks_are_ordered_by_node_and_a_stage_stays_together():
    places = assign_places({0: "b", 1: "a", 2: "b", 3: "a"}, Layout(pp=4, cp=2), first_node="b")
    assert [place.node for place in places] == ["b"] * 4 + ["a"] * 4
    assert [place.bundle for place in places] == [0, 0, 2, 2, 1, 1, 3, 3]
    assert [place.local_rank for place in places] == [0, 1, 2, 3] * 2


def test_the_device_is_the_one_that_ray_has_given_as_torch_counts_it():
    assert device_index(["3"], None) == 3
    assert device_index(["5"], "4,5,6") == 1
    assert device_index([], "0") is None
