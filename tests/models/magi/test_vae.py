"""The ViT autoencoder against what the published code computes, and its rules for single frames."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.config import checked
from models.errors import InputError
from models.magi.config import VaeConfig
from models.magi.vae import ViTVAE
from tests.models.released import GOLDENS

CASES = ["native", "resized", "image"]


@cache
def golden() -> tuple[ViTVAE, dict[str, Tensor]]:
    with safe_open(GOLDENS / "vae.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        config = checked(VaeConfig, json.loads(file.metadata()["config"]), source="golden")
    vae = ViTVAE(config).requires_grad_(False)
    prefix = "weights."
    vae.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    return vae, tensors


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_encode_gives_the_published_posterior_mode(case: str) -> None:
    vae, tensors = golden()
    latent = vae.encode(tensors[f"input.video.{case}"])
    assert relative_error(latent, tensors[f"output.latent_mode.{case}"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_decode_gives_the_published_pixels(case: str) -> None:
    vae, tensors = golden()
    video = vae.decode(tensors[f"output.latent_mode.{case}"])
    assert relative_error(video, tensors[f"output.decoded.{case}"]) < 1e-2  # stored as fp16


def test_an_image_is_encoded_as_four_equal_frames() -> None:
    vae, tensors = golden()
    image = tensors["input.video.image"]
    assert torch.equal(vae.encode(image), vae.encode(image.repeat(1, 1, 4, 1, 1)))


def test_one_latent_frame_decodes_to_the_first_of_four_frames() -> None:
    vae, tensors = golden()
    latent = tensors["output.latent_mode.native"]
    assert vae.decode(latent[:, :, :1]).shape[2] == 1
    assert vae.decode(latent[:, :, :2]).shape[2] == 8


def test_an_incomplete_patch_of_frames_is_dropped() -> None:
    vae, tensors = golden()
    video = tensors["input.video.native"]
    assert torch.equal(vae.encode(video[:, :, :7]), vae.encode(video[:, :, :4]))


def test_bf16_stays_near_fp32() -> None:
    vae, tensors = golden()
    half = ViTVAE(vae.config).requires_grad_(False)
    half.load_state_dict(vae.state_dict())
    half = half.bfloat16()
    latent = half.encode(tensors["input.video.resized"])
    assert latent.dtype == torch.bfloat16
    assert relative_error(latent.float(), tensors["output.latent_mode.resized"]) < 0.05


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"use_rope": True}, "use_rope: Input should be False"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"widht": 3}, "widht"),
    ],
)
def test_an_unknown_variant_is_reported(change: dict[str, object], part: str) -> None:
    known = {"z_chans": 16, "qkv_bias": True, "ln_in_attn": True, "conv_last_layer": True}
    assert checked(VaeConfig, known, source="config.json").z_chans == 16
    with pytest.raises(InputError, match=part):
        checked(VaeConfig, known | change, source="config.json")
