"""A small model of this family, for tests."""

from dataclasses import replace

import torch

from models.checkpoint import Loading
from models.random_weights import RandomEncoder
from models.wan.config import SKYREELS, WanConfig, WanPrecision, WanRuntime, WanShapes
from models.wan.dit import WanDiT
from models.wan.pipeline import WanPipeline

SHAPES = WanShapes(
    model_type="t2v", dim=48, ffn_dim=64, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, inject_sample_info=True
)
IMAGE_SHAPES = replace(SHAPES, model_type="i2v", in_dim=36, clip_dim=40, inject_sample_info=False)
SINGLE = replace(SKYREELS, dtype="float32")


def small_config(shapes: WanShapes = SHAPES, precision: WanPrecision = SINGLE) -> WanConfig:
    return WanConfig(shapes=shapes, precision=precision)


def small_dit(config: WanConfig, layers: range | None = None) -> WanDiT:
    """Parameters are drawn by name, so that every stage has the same ones."""
    model = WanDiT(config, Loading(layers=layers))
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()) * len(name))
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.to(config.dtype).requires_grad_(False).eval()


class _Grey:
    """An autoencoder that makes grey frames of latents, and noise of frames."""

    def stream(self):
        return lambda latents: torch.full(
            (latents.shape[2] * 4, latents.shape[3] * 8, latents.shape[4] * 8, 3), 127, dtype=torch.uint8
        )

    def encode(self, frames):
        generator, count = torch.Generator().manual_seed(7), 1 + (len(frames) - 1) // 4
        return torch.randn(1, 16, count, frames.shape[1] // 8, frames.shape[2] // 8, generator=generator)


def small_pipeline(**runtime):
    """A model of two layers with that `WanRuntime`."""
    config = replace(small_config(replace(SHAPES, num_layers=2)), runtime=WanRuntime(**runtime))
    encoder = RandomEncoder(config.shapes.text_dim, config.shapes.text_len)
    return WanPipeline(config, small_dit(config), _Grey(), encoder)
