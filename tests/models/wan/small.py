"""A small model of this family, for tests."""

from dataclasses import replace

import torch

from models.wan.config import SKYREELS, WanConfig, WanPrecision, WanShapes
from models.wan.dit import WanDiT

SHAPES = WanShapes(
    model_type="t2v", dim=48, ffn_dim=64, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, inject_sample_info=True
)
IMAGE_SHAPES = replace(SHAPES, model_type="i2v", in_dim=36, clip_dim=40, inject_sample_info=False)
SINGLE = replace(SKYREELS, dtype="float32")


def small_config(shapes: WanShapes = SHAPES, precision: WanPrecision = SINGLE) -> WanConfig:
    return WanConfig(shapes=shapes, precision=precision)


def small_dit(config: WanConfig, layers: range | None = None) -> WanDiT:
    """Parameters are drawn by name, so that every stage has the same ones."""
    model = WanDiT(config, layers=layers)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()) * len(name))
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.to(config.dtype).requires_grad_(False).eval()
