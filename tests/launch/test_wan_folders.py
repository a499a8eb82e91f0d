"""SkyReels-V2 and Self-Forcing as they are downloaded: inspected."""

import shutil

import pytest
import torch

from launch.cli import run
from tests.models.wan.downloaded import of_diffusers, released, self_forcing

LAYOUTS = {"released": released, "diffusers": of_diffusers, "self-forcing": self_forcing}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {name: lay_out(root / name) for name, lay_out in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_says_what_it_is_and_what_it_takes(folders, layout, capsys):
    assert run(["inspect", str(folders[layout]), "--height", "64", "--width", "64", "--verify"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    method = "self-forcing" if layout == "self-forcing" else "diffusion forcing"
    assert f"a causal Wan of {2 if layout == 'self-forcing' else 3} layers" in shown and f"by {method}" in shown
    assert "84,575 parameters" in shown and "UMT5" in shown and "1 x 1" in shown and "2 x 1" in shown
    assert f"All {69 + 194 if layout == 'self-forcing' else 101 + 194} tensors are numbers" in shown


def test_inspect_names_what_is_missing_and_what_is_damaged(folders, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["released"], folder)
    state = torch.load(folder / "Wan2.1_VAE.pth", weights_only=True)
    state["conv1.bias"][0] = float("nan")
    torch.save(state, folder / "Wan2.1_VAE.pth")
    assert run(["inspect", str(folder), "--height", "64", "--width", "64"]) == 0
    assert run(["inspect", str(folder), "--height", "64", "--width", "64", "--verify"]) == 1
    assert "conv1.bias holds values that are not numbers" in " ".join(capsys.readouterr().out.split())
    (folder / "Wan2.1_VAE.pth").unlink()
    shutil.rmtree(folder / "google")
    assert run(["inspect", str(folder)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "no Wan2.1_VAE.pth in" in shown and "no google/umt5-xxl in" in shown and "101 tensors" in shown


def test_models_lists_both_families(capsys):
    assert run(["models"]) == 0
    shown = capsys.readouterr().out
    assert "magi-pocket" in shown and "self-forcing-1.3b" in shown and "Skywork/SkyReels-V2-DF-14B-720P" in shown
