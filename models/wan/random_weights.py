"""Random weights of any configuration of this family, as `models/random_weights.py` draws them."""

import torch
from torch import Tensor

from models.checkpoint import Loading
from models.random_weights import RandomEncoder, fill_random, normal
from models.wan.config import IMAGE_TOKENS, WanConfig
from models.wan.dit import WanDiT
from models.wan.pipeline import WanPipeline
from models.wan.vae import WanVAE, WanVaeConfig, empty_vae
from models.wan.weights import empty_dit


def random_pipeline(config: WanConfig, loading: Loading, *, vae: WanVaeConfig | None = None) -> WanPipeline:
    """A model with random weights and a text encoder that makes up captions; the autoencoder is Wan 2.1's, or `vae`."""
    described = vae or WanVaeConfig()
    empty = empty_vae(described)
    network = fill_random(empty, dict.fromkeys(empty.state_dict(), torch.float32), loading.device, _value)
    encoder = RandomEncoder(config.shapes.text_dim, config.shapes.text_len)
    images = _RandomImages(config.shapes.clip_dim) if config.shapes.sees_image else None
    return WanPipeline(config, random_dit(config, loading), WanVAE(network, described), encoder, images)


class _RandomImages:
    """An `ImageEncoder` that makes up tokens."""

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def encode(self, image: Tensor) -> Tensor:
        return torch.randn(IMAGE_TOKENS, self._channels, generator=torch.Generator().manual_seed(0))


def random_dit(config: WanConfig, loading: Loading) -> WanDiT:
    """The DiT, all of it or the layers that are asked for, in the dtype of a loaded one."""
    model, dtypes = empty_dit(config, loading)
    return fill_random(model, dtypes, loading.device, _value)


def _value(name: str, declared: Tensor, device: torch.device) -> Tensor:
    last = name.rpartition(".")[2]
    if last == "bias":
        return torch.zeros(declared.shape, device=device)
    if declared.dim() > 1 and last != "gamma":
        return normal(name, declared, device)
    return torch.ones(declared.shape, device=device)
