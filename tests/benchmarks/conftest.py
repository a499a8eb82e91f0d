"""What several benchmarks are tested on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.pocket.preset import write_vae_config
from models.pocket.train_dit import new_dit
from models.pocket.train_vae import POCKET_VAE, new_vae


@pytest.fixture(scope="session")
def untrained_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of magi-pocket's weights before training, but with a head that gives some velocity."""
    folder = tmp_path_factory.mktemp("untrained")
    write_vae_config(folder / "vae", POCKET_VAE)
    save_file(new_vae(0).state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    dit = new_dit(0)
    torch.nn.init.normal_(dit.final_linear.linear.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    save_file(dit.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in this process, as ranks have it whose times and bits are compared with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
