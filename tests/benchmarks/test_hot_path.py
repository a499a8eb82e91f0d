"""What is compared computes the same, with a change and without it."""

import pytest
import torch

from benchmarks.common import run_command
from benchmarks.hot_path import changes, compare, main

CPU = torch.device("cpu")


@pytest.mark.slow
@torch.no_grad()
def test_both_ways_of_a_change_give_the_same():
    found = list(changes(torch.bfloat16, CPU, compiled=False))
    once, product, tiles, fp8 = found
    assert "once" in once[0] and "one product" in product[0] and "tiles" in tiles[0] and "fp8" in fp8[0]
    for what, without, with_it in (once, fp8):
        assert torch.equal(without(), with_it()), what
    row = compare(fp8, CPU, rounds=2)
    assert row["without: ms"] > 0 and row["least ratio"] <= row["ratio"] <= row["most"]


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert run_command(main, "hot_path", ["--device", "tpu"]) == 2
    assert "choose cpu" in capsys.readouterr().err
