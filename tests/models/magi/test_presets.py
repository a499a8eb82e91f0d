"""Presets: values of the released configuration files, and sizes that are those of the real modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.presets import PRESETS, find_preset, released_config
from models.magi.vae import ViTVAE
from models.pocket.preset import pocket_config
from models.pocket.train_vae import POCKET_VAE

RELEASED = [name for name in PRESETS if name != "magi-pocket"]
WIDE = ("x_embedder.", "y_embedder.", "t_embedder.", "final_linear.", "rope.")  # stored in fp32


def _stored_bytes(name: str, tensor: torch.Tensor) -> int:
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.numel()
    return tensor.numel() * (4 if name.startswith(WIDE) or name.endswith("_scale") else 2)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_of_the_model(name: str) -> None:
    preset = PRESETS[name]
    config = preset.config()
    with torch.device("meta"):
        state = MagiDiT(config.model_config, fp8=config.engine_config.fp8_quant).state_dict()
    assert preset.parameters == sum(tensor.numel() for tensor in state.values())
    if name in RELEASED:
        assert preset.stored == sum(_stored_bytes(key, tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_is_a_valid_configuration_file(name: str, tmp_path: Path) -> None:
    config = PRESETS[name].config()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert MagiConfig.from_json(path) == config


@pytest.mark.parametrize(
    ("name", "steps", "size", "cfg", "distill", "fp8", "load"),
    [
        ("magi-4.5b", 64, (720, 720), 3, False, False, "./downloads/4.5B_base"),
        ("magi-4.5b-distill", 64, (720, 720), 1, True, False, "./downloads/4.5B_distill"),
        ("magi-4.5b-distill-quant", 64, (720, 720), 1, True, True, "./downloads/4.5B_distill_quant"),
        ("magi-24b", 32, (720, 1280), 3, False, False, "./downloads/24B_base"),
        ("magi-24b-distill", 16, (720, 1280), 1, True, False, "./downloads/24B_distill"),
        ("magi-24b-distill-quant", 16, (720, 1280), 1, True, True, "./downloads/24B_distill_quant"),
    ],
)
def test_what_differs_between_released_models(
    name: str, steps: int, size: tuple[int, int], cfg: int, distill: bool, fp8: bool, load: str
) -> None:
    config = PRESETS[name].config()
    run, engine = config.runtime_config, config.engine_config
    assert (run.num_steps, (run.video_size_h, run.video_size_w), run.cfg_number) == (steps, size, cfg)
    assert (engine.distill, engine.fp8_quant, run.load) == (distill, fp8, load)


def test_the_large_model_has_its_own_shape() -> None:
    small, large = released_config("4.5B_base").model_config, released_config("24B_base").model_config
    assert (small.num_layers, small.hidden_size, small.latent_channels) == (34, 3072, 16)
    assert (large.num_layers, large.hidden_size, large.latent_channels) == (48, 6144, 16)
    assert large.half_channel_vae and large.gated_linear_unit and large.x_rescale_factor == 0.1


def test_disk_of_a_released_model() -> None:
    preset = PRESETS["magi-4.5b-distill"]
    vae = 613_755_239
    assert preset.disk == preset.stored + 4 * vae + 19_000_000_000


def test_the_pocket_autoencoder_is_counted() -> None:
    with torch.device("meta"):
        vae = ViTVAE(POCKET_VAE)
    assert PRESETS["magi-pocket"].vae_parameters == sum(parameter.numel() for parameter in vae.parameters())


def test_pocket_is_the_pocket_configuration() -> None:
    assert find_preset("magi-pocket").config() == pocket_config()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown model 'magi-9b'.*magi-pocket, magi-4.5b"):
        find_preset("magi-9b")
