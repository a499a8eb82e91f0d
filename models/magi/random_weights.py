"""Random weights of any configuration of MAGI-1, as `models/random_weights.py` draws them."""

from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import Loading
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import MagiPipeline
from models.magi.sampling import COPY_WEIGHT
from models.magi.vae import TiledVAE, ViTVAE
from models.magi.weights import Checkpoint, empty_dit
from models.pocket.text import PocketEncoder
from models.random_weights import RandomEncoder, fill_random, normal

# The released autoencoder (specification 1.1).
_RELEASED_VAE = VaeConfig(
    z_chans=16, embed_dim=1024, depth=24, num_heads=16, qkv_bias=True, ln_in_attn=True, conv_last_layer=True
)  # fmt: skip
_GAIN = 0.3 - 1  # of the norms behind attention and MLP, which have an offset of one: layers then change a little each


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
    vae = fill_random(empty, dict.fromkeys(empty.state_dict(), dtype), loading.device, _value)
    autoencoder = TiledVAE(vae, scale_factor=runtime.scale_factor, fps=runtime.fps)
    known = runtime.t5_pretrained is None
    encoder = PocketEncoder() if known else RandomEncoder(model.caption_channels, model.caption_max_length)
    return MagiPipeline(config, random_dit(config, loading), autoencoder, encoder, copy_weight=copy_weight)


def random_dit(config: MagiConfig, loading: Loading) -> MagiDiT:
    """The DiT, all of it or the layers that are asked for, in the dtypes of a loaded one."""
    model, dtypes = empty_dit(config, loading)
    return fill_random(model, dtypes, loading.device, _value).fuse()


def _value(name: str, declared: Tensor, device: torch.device) -> Tensor:
    shape, last = declared.shape, name.rpartition(".")[2]
    if name == "rope.bands":
        return 10000.0 ** -(torch.arange(len(declared), dtype=torch.float32, device=device) / len(declared))
    if last == "weight_scale":  # the only place for the size of an fp8 weight, which is drawn with a deviation of one
        return torch.full(shape, 1 / 64, device=device)
    if last.endswith("_scale") or name.endswith("ada_modulate_layer.proj.0.bias"):
        return torch.ones(shape, device=device)
    if declared.dim() > 1:
        return normal(name, declared, device)
    if last == "bias":
        return torch.zeros(shape, device=device)
    if name.endswith("post_norm.weight"):
        return torch.full(shape, _GAIN, device=device)
    offset = "layernorm" in name  # norms with an offset of one; those of the autoencoder and in front have none
    return torch.zeros(shape, device=device) if offset else torch.ones(shape, device=device)
