"""Random weights of any configuration: to try a layout, or to measure a pass, before anything is downloaded.

Each tensor is drawn by its name, so every stage has the same ones in whatever layout. On a GPU they are others.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.checkpoint import Loading
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import MagiPipeline
from models.magi.sampling import COPY_WEIGHT
from models.magi.vae import TiledVAE, ViTVAE
from models.magi.weights import Checkpoint, empty_dit
from models.pocket.text import PocketEncoder

_Network = TypeVar("_Network", bound=nn.Module)
# The released autoencoder (specification 1.1).
_RELEASED_VAE = VaeConfig(
    z_chans=16, embed_dim=1024, depth=24, num_heads=16, qkv_bias=True, ln_in_attn=True, conv_last_layer=True
)  # fmt: skip
_GAIN = 0.3 - 1  # of the norms behind attention and MLP, which have an offset of one: layers then change a little each
_WORDS = 16  # fewest tokens of a made-up caption


def vae_config(config: MagiConfig) -> VaeConfig:
    """The autoencoder that a configuration names, if its description is there, or the released one."""
    folder = config.runtime_config.vae_pretrained
    described = folder is not None and (Path(folder) / "config.json").is_file()
    return Checkpoint(Path(folder)).vae_config() if folder is not None and described else _RELEASED_VAE


def random_pipeline(config: MagiConfig, loading: Loading, *, copy_weight: float = COPY_WEIGHT) -> MagiPipeline:
    """A model with random weights and a text encoder that makes up captions."""
    model, runtime = config.model_config, config.runtime_config
    with torch.device("meta"):
        empty = ViTVAE(vae_config(config))
    dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    vae = _fill(empty, dict.fromkeys(empty.state_dict(), dtype), loading.device)
    autoencoder = TiledVAE(vae, scale_factor=runtime.scale_factor, fps=runtime.fps)
    known = runtime.t5_pretrained is None
    encoder = PocketEncoder() if known else RandomEncoder(model.caption_channels, model.caption_max_length)
    return MagiPipeline(config, random_dit(config, loading), autoencoder, encoder, copy_weight=copy_weight)


def random_dit(config: MagiConfig, loading: Loading) -> MagiDiT:
    """The DiT, all of it or the layers that are asked for, in the dtypes of a loaded one."""
    model, dtypes = empty_dit(config, loading)
    return _fill(model, dtypes, loading.device)


class RandomEncoder:
    """Captions of normal numbers: as many tokens as a prompt has words, 16 or more; the same for the same prompt."""

    def __init__(self, channels: int, max_length: int) -> None:
        self._channels, self._most = channels, max_length

    def encode(self, prompt: str) -> Tensor:
        """A caption [N, channels] fp32."""
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        count = min(self._most, max(_WORDS, len(prompt.split()) + 1))
        return torch.randn(count, self._channels, generator=generator)


def _fill(model: _Network, dtypes: Mapping[str, torch.dtype], device: str) -> _Network:
    """Give a network on the meta device random parameters, one after the other, in these dtypes."""
    state = {
        name: _value(name, tensor, torch.device(device)).to(dtypes[name]) for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _value(name: str, declared: Tensor, device: torch.device) -> Tensor:
    shape, last = declared.shape, name.rpartition(".")[2]
    if name == "rope.bands":
        return 10000.0 ** -(torch.arange(len(declared), dtype=torch.float32, device=device) / len(declared))
    if last == "weight_scale":  # the only place for the size of an fp8 weight, which is drawn with a deviation of one
        return torch.full(shape, 1 / 64, device=device)
    if last.endswith("_scale") or name.endswith("ada_modulate_layer.proj.0.bias"):
        return torch.ones(shape, device=device)
    if declared.dim() > 1:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        std = 1.0 if declared.dtype == torch.float8_e4m3fn else 1 / math.sqrt(math.prod(shape[1:]))
        return torch.empty(shape, device=device).normal_(std=std, generator=generator)
    if last == "bias":
        return torch.zeros(shape, device=device)
    if name.endswith("post_norm.weight"):
        return torch.full(shape, _GAIN, device=device)
    offset = "layernorm" in name  # norms with an offset of one; those of the autoencoder and in front have none
    return torch.zeros(shape, device=device) if offset else torch.ones(shape, device=device)
