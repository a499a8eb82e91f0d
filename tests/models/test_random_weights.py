"""Random weights: the same in every layout, and numbers that a model can compute with."""

from __future__ import annotations

import pytest
import torch

from models.checkpoint import Loading
from models.magi.pipeline import random_dit, vae_config
from models.magi.weights import vae_parameters
from models.pocket.preset import pocket_config
from models.random_weights import RandomEncoder
from tests.models.released import tiny_config


@pytest.mark.parametrize("name", ["4.5B_base", "24B_distill_quant"])
def test_a_stage_has_the_tensors_of_the_whole(name: str) -> None:
    whole = random_dit(tiny_config(name), Loading()).state_dict()
    for layers in (range(1), range(1, 3)):
        part = random_dit(tiny_config(name), Loading(layers=layers)).state_dict()
        assert part and all(torch.equal(tensor.float(), whole[key].float()) for key, tensor in part.items())
        assert all(tensor.dtype == whole[key].dtype for key, tensor in part.items())


@pytest.mark.parametrize("name", ["4.5B_base", "24B_distill_quant"])
def test_what_comes_of_them_is_neither_nothing_nor_too_much(name: str) -> None:
    model = random_dit(tiny_config(name), Loading())
    latent = torch.randn(1, model.latent_channels, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = model.velocity(model.patches(latent), (1, 4, 4))
    assert velocity.isfinite().all() and velocity.abs().max() > 1e-3
    for key, tensor in model.state_dict().items():
        assert tensor.float().isfinite().all(), key


def test_the_autoencoder_is_of_the_released_size_or_as_described() -> None:
    assert vae_parameters(vae_config(tiny_config())) == 613_755_239  # specification 1.1
    assert vae_parameters(vae_config(pocket_config())) == 6_889_319


def test_captions_are_made_up_of_the_prompt() -> None:
    encoder = RandomEncoder(24, 60)
    assert encoder.encode("a cat").shape == (16, 24)
    assert encoder.encode("word " * 100).shape == (60, 24)
    assert torch.equal(encoder.encode("a cat"), encoder.encode("a cat"))
    assert not torch.equal(encoder.encode("a cat"), encoder.encode("a dog"))
