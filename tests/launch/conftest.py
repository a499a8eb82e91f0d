"""Fixtures: weights of a pocket model that was never trained, and the command line as a real process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.magi.vae import ViTVAE
from models.pocket.preset import write_vae_config
from models.pocket.train_dit import new_dit
from models.pocket.train_vae import POCKET_VAE
from tests.launch.process import Result, flowcache_process
from tests.parallel.forked import interpreter


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--weights`: magi-pocket's shapes with random numbers. It makes noise, at magi-pocket's price."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    (folder / "inference_weight.distill").mkdir()
    save_file(new_dit(0).state_dict(), folder / "inference_weight.distill" / "model.safetensors")
    write_vae_config(folder / "vae", POCKET_VAE)
    save_file(ViTVAE(POCKET_VAE).state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, and ranks that they start, have imported everything (`tests.parallel.forked`)."""
    monkeypatch.setattr(sys, "executable", interpreter())


@pytest.fixture
def flowcache(tmp_path: Path) -> Callable[..., Result]:
    """Runs `python -m launch ...` in an empty folder."""

    def run(*arguments: object, timeout: float = 120) -> Result:
        process = flowcache_process(tmp_path, *arguments)
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Result(process.args, process.returncode, output, errors)

    return run
