"""Diffusion forcing made several ways, at small sizes."""

import csv

import pytest
import torch

from benchmarks.common import run_command
from benchmarks.forcing import Made, pass_operations, psnr, report, run


def test_a_forward_of_the_released_window_takes_what_was_counted_by_hand():
    """51,000 tokens of 25 latent frames through 1.3B, both ways."""
    assert pass_operations(25, 25) == pytest.approx(6.118e14, rel=1e-3)
    assert pass_operations(5, 5) < pass_operations(5, 25) < pass_operations(25, 25) / 4


def made(what, operations, computed=1.0):
    return Made(
        what=what, latents=torch.randn(1, 2, 2, 2, 2), passes=1, operations=operations, computed=computed, seconds=1
    )


@pytest.mark.parametrize(("groups", "slow", "status"), [(5.0, 2.0, 0), (9.0, 2.0, 1), (5.0, 6.0, 1)])
def test_the_status_says_whether_structure_and_reuse_each_save(tmp_path, capsys, groups, slow, status):
    ways = [
        made("whole window, staggered", 10.0),
        made("groups", groups),
        made("FlowCache slow, 0.1", slow, computed=0.5),
        made("FlowCache fast, 0.15", min(slow, 1.0), computed=0.4),
    ]
    assert report(tmp_path, ways, "") == status
    assert capsys.readouterr().out.count("FAIL") == status
    rows = {row["what"]: row for row in csv.DictReader((tmp_path / "forcing.csv").open())}
    slowly = rows["FlowCache slow, 0.1"]
    both = float(slowly["by structure"]) * float(slowly["by reuse"])
    assert both == pytest.approx(float(slowly["speed-up"]), rel=1e-3)
    assert float(rows["groups"]["by reuse"]) == 1


def test_equal_latents_have_no_error():
    latents = torch.randn(1, 2, 3, 4, 4)
    assert psnr(latents, latents) == float("inf") and psnr(latents + 0.1, latents) < 60


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path):
    few = ["--steps", "8", "--frames", "6", "--block", "3", "--ar-step", "2", "--out", str(tmp_path)]
    assert run_command(run, "forcing", few) in (0, 1)
    rows = list(csv.DictReader((tmp_path / "forcing.csv").open()))
    assert [row["what"] for row in rows][:2] == ["whole window, staggered", "whole window, in step"]
    assert len(rows) == 8
