"""Diffusion forcing made several ways, at small sizes."""

import csv

import numpy as np
import pytest
import torch

from benchmarks.common import run_command
from benchmarks.quality.__main__ import run
from benchmarks.quality.forcing import DISTANCES, FAST, GROUPS, SLOW, VANILLA, Made, Way, pass_operations, psnr, report
from engine.reuse.policy import ReuseSettings
from models.families import presets
from models.wan.sampling.forcing import BlockSampling

NAME = "skyreels-v2-df-1.3b-540p"
CONFIG = presets()[NAME].config()


def test_a_forward_of_the_released_window_takes_what_was_counted_by_hand():
    """51,000 tokens of 25 latent frames through 1.3B, both ways."""
    assert pass_operations(CONFIG, 25, 25) == pytest.approx(6.118e14, rel=1e-3)
    assert pass_operations(CONFIG, 5, 5) < pass_operations(CONFIG, 5, 25) < pass_operations(CONFIG, 25, 25) / 4
    large = presets()["skyreels-v2-df-14b-540p"].config()
    assert 5 < pass_operations(large, 25, 25) / pass_operations(CONFIG, 25, 25) < 10


def made(what, operations, *shares):
    way = Way(what=what, sampling=BlockSampling(steps=2, frames=2), reuse=ReuseSettings())
    latents, shares = torch.randn(1, 2, 2, 2, 2), np.array(shares or (1.0, 1.0))
    return Made(way=way, latents=latents, passes=1, operations=operations, shares=shares, seconds=1)


@pytest.mark.parametrize(
    ("groups", "slow", "shares", "status"),
    [(5.0, 2.0, (0.5, 0.5), 0), (9.0, 2.0, (0.5, 0.5), 1), (5.0, 6.0, (0.5, 0.5), 1), (5.0, 2.0, (0.4, 0.6), 1)],
)
def test_the_status_says_whether_structure_and_reuse_each_save(tmp_path, capsys, groups, slow, shares, status):
    found = [made(VANILLA, 10.0), made(GROUPS, groups), made(SLOW, slow, *shares), made(FAST, min(slow, 1.0), 0.4, 0.4)]
    assert report(tmp_path, NAME, CONFIG, found, [made("by patches", 3.0, 0.5, 0.7)], []) == status
    assert capsys.readouterr().out.count("FAIL") == status
    rows = {row["what"]: row for row in csv.DictReader((tmp_path / "forcing.csv").open())}
    slowly = rows[SLOW]
    both = float(slowly["by structure"]) * float(slowly["by reuse"])
    assert both == pytest.approx(float(slowly["speed-up"]), rel=1e-3)
    assert float(rows[GROUPS]["by reuse"]) == 1 and rows["by patches"]["of a group"] == "50% to 70%"


def test_equal_latents_have_no_error():
    latents = torch.randn(1, 2, 3, 4, 4)
    assert psnr(latents, latents) == float("inf") and psnr(latents + 0.1, latents) < 60


@pytest.mark.parametrize(("name", "said"), [("self-forcing-1.3b", "by diffusion forcing"), ("wan", "choose from")])
def test_another_model_is_refused(tmp_path, capsys, name, said):
    assert run_command(run, "quality", ["--model", name, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_command_has_structure_reuse_and_both_distances(tmp_path, one_thread):  # two are slower at this size
    assert run_command(run, "quality", ["--model", NAME, "--quick", "--steps", "8", "--out", str(tmp_path)]) in (0, 1)
    rows = list(csv.DictReader((tmp_path / "forcing.csv").open()))
    assert [row["what"] for row in rows][:2] == [VANILLA, "whole window, in step"] and len(rows) == 7 + len(DISTANCES)
    by_table, by_patches = rows[-2:]
    assert [by_table["what"], by_patches["what"]] == list(DISTANCES) and " to " not in by_table["of a group"]
    assert all(float(row["computed"]) < 1 for row in (by_table, by_patches))
