"""Kernels and bytes of a layer: what was saved stays saved."""

import pytest
import torch

from benchmarks.layer_cost import Counted, fused, rows


def test_a_run_is_one_kernel_that_reads_and_writes_once():
    x, w = torch.ones(8, 4, device="meta"), torch.ones(4, 4, device="meta")
    with Counted() as counted:
        y = (x + 1) * 2
        z = torch.mm(y, w) - x
    assert [one.kind for one in counted.kernels] == ["elementwise", "elementwise", "product", "elementwise"]
    assert [one.nbytes for one in counted.kernels] == [256, 256, 128 + 64 + 128, 384]
    assert [one.nbytes for one in fused(counted.kernels)] == [256, 128 + 64 + 128, 384]
    assert z.shape == (8, 4)


@pytest.mark.parametrize(("name", "before"), [("4.5B_distill", 7.71), ("24B_base", 37.5)])
def test_a_layer_moves_less_than_half_of_what_it_did(name, before):
    plain, compiled = rows(name)
    assert (plain["products"], plain["attentions"]) == (4, 2)
    assert 0 < plain["their GB"] < 0.85 * before
    assert 0 < compiled["their GB"] < 0.3 * before and compiled["other kernels"] <= 8
