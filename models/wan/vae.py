"""The autoencoder of Wan 2.1, which is diffusers' `AutoencoderKLWan`, from a released file or a folder of diffusers.

Frames 1 + 4k are latents 1 + k. Both directions go in pieces of one latent frame, of which each layer keeps the last
two frames that it has seen, so that a video is decoded as its chunks come (specification 1.7).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from models.checkpoint import Stored, TorchFile, WeightFiles, shape_of
from models.config import STRICT, checked, read_json
from models.errors import InputError
from models.protocols import CELL_FRAMES, CELL_PIXELS
from models.rewriting import Rules
from models.text import package

RELEASED_VAE = "Wan2.1_VAE.pth"
_STEM = "diffusion_pytorch_model"
_LEVELS = 4
_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_Count = Annotated[int, Field(ge=1, le=4_096)]

_WORDS = Rules(
    (r"(\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)
"""A parameter's name in diffusers, and the released one, but for `_UP`."""
_UP = re.compile(r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WanVaeConfig:
    """Shapes and scales of the autoencoder, by the names of diffusers; those that have one value are Wan 2.1's."""

    base_dim: _Count = 96
    decoder_base_dim: _Count | None = None
    z_dim: _Count = 16
    dim_mult: tuple[_Count, _Count, _Count, _Count] = (1, 2, 4, 4)
    num_res_blocks: Literal[2] = 2
    attn_scales: tuple[()] = ()
    temperal_downsample: tuple[Literal[False], Literal[True], Literal[True]] = (False, True, True)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    latents_mean: tuple[float, ...] = _MEAN
    latents_std: tuple[Annotated[float, Field(gt=1e-6, le=1e6)], ...] = _STD
    is_residual: Literal[False] = False
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    patch_size: None = None
    scale_factor_temporal: Literal[4] = 4
    scale_factor_spatial: Literal[8] = 8

    @model_validator(mode="after")
    def _scales_fit(self) -> WanVaeConfig:
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError("latents_mean and latents_std must have z_dim numbers each")
        return self


class WanVAE:
    """Frames to latents and back, in fp32; an `Autoencoder`. `network` is diffusers' `AutoencoderKLWan`."""

    def __init__(self, network: Any, config: WanVaeConfig) -> None:
        self.network, self.config = network, config
        shape, device = (1, -1, 1, 1, 1), next(network.parameters()).device
        self._mean = torch.tensor(config.latents_mean, device=device).view(shape)
        self._scale = 1.0 / torch.tensor(config.latents_std, device=device).view(shape)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Latents [1, z, 1 + k, h, w] fp32 of frames uint8 [F, H, W, 3], of which the last 1 + 4k are taken.

        An `InputError` if H or W is no multiple of 8, or there are no frames.
        """
        count, height, width, _ = frames.shape
        if height % CELL_PIXELS or width % CELL_PIXELS:
            raise InputError(f"height and width must be multiples of {CELL_PIXELS} to be encoded: {height} x {width}")
        if not count:
            raise InputError("a video of no frames cannot be encoded")
        pixels = frames[(count - 1) % CELL_FRAMES :].to(self._mean.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return (self.network.encode(pixels).latent_dist.mode() - self._mean) * self._scale

    @torch.no_grad()
    def encode_start(self, image: Tensor, count: int) -> Tensor:
        """Latents [1, z, count, h, w] fp32 of an image uint8 [1, H, W, 3] with frames behind it that are zero."""
        frames = image.to(self._mean.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        rest = frames.new_zeros(()).expand(1, 3, CELL_FRAMES * (count - 1), *image.shape[1:3])
        mode = self.network.encode(torch.cat([frames, rest], dim=2)).latent_dist.mode()
        return (mode - self._mean) * self._scale

    def stream(self) -> Callable[[Tensor], Tensor]:
        """Decodes the chunks of one video in order; as `Autoencoder.stream`."""
        return _WanStream(self.network, self._mean, self._scale)


class _WanStream:
    """A `RememberingStream`: every layer keeps the last frames that it has seen."""

    def __init__(self, network: Any, mean: Tensor, scale: Tensor) -> None:
        self._network, self._mean, self._scale = network, mean, scale
        self._features: dict[int, Any] = defaultdict(lambda: None)  # frames, or a word where there were too few

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        z = latents.to(self._mean) / self._scale + self._mean
        parts = [
            self._network.decoder(part, feat_cache=self._features, feat_idx=[0], first_chunk=not self._features)
            for part in self._network.post_quant_conv(z).split(1, dim=2)
        ]
        unit = (torch.cat(parts, dim=2).clamp(-1, 1) / 2 + 0.5).clamp(0, 1)
        return (unit[0] * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()

    def state(self) -> dict[str, Tensor]:
        """As of `RememberingStream`; a word has its letters as numbers."""
        return {
            f"{layer}{'.word' if isinstance(kept, str) else ''}": (
                torch.tensor(list(kept.encode()), dtype=torch.uint8) if isinstance(kept, str) else kept
            )
            for layer, kept in self._features.items()
            if kept is not None
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, kept in state.items():
            layer, _, word = name.partition(".")
            self._features[int(layer)] = bytes(kept.tolist()).decode() if word else kept.to(self._mean.device)


class WanVaeFiles:
    """The stored autoencoder: `Wan2.1_VAE.pth`, or a folder of diffusers with its config.json."""

    def __init__(self, source: Path) -> None:
        self.source, self._released = source, source.suffix == ".pth"
        self._files = TorchFile(source) if self._released else WeightFiles(source, stem=_STEM)
        self._stored_as: Callable[[str], str] = released_name if self._released else str

    def load(self, device: str) -> WanVAE:
        """Read it; an `InputError` if something is missing, damaged or too much, or of another autoencoder."""
        network, config, dtypes = self._empty()
        filled = self._files.fill(network, dtypes, device, all_used=True, stored_as=self._stored_as)
        return WanVAE(filled, config)

    def check(self) -> dict[str, Stored]:
        """Its tensors, seen to fit its description; errors as in `load`."""
        network, _, dtypes = self._empty()
        return self._files.fitting(network, dtypes, all_used=True, stored_as=self._stored_as)

    def config(self) -> WanVaeConfig:
        """Its description, or that which follows from the shapes of a released file; errors as in `load`."""
        if self._released:
            return self._config_of_shapes()
        path = self.source / "config.json"
        values = read_json(path, "the autoencoder's configuration")
        if (name := values.pop("_class_name", None)) != "AutoencoderKLWan":
            raise InputError(f"{path}: _class_name is {name!r}, but only 'AutoencoderKLWan' is known")
        kept = {key: value for key, value in values.items() if not key.startswith("_")}
        return checked(WanVaeConfig, kept, source=str(path))

    def _config_of_shapes(self) -> WanVaeConfig:
        shape = partial(shape_of, self._files.stored(), f"{self.source} holds no autoencoder of Wan 2.1")
        firsts = ["encoder.conv1.weight", "conv2.weight"]
        levels = [f"encoder.downsamples.{3 * level}.residual.2.weight" for level in range(_LEVELS)]
        base, channels = (shape(name, 5)[0] for name in firsts)
        mult = [shape(name, 5)[0] // base for name in levels]
        values = {"base_dim": base, "z_dim": channels, "dim_mult": mult}
        return checked(WanVaeConfig, values, source=str(self.source))

    def _empty(self) -> tuple[nn.Module, WanVaeConfig, dict[str, torch.dtype]]:
        config = self.config()
        network = empty_vae(config)
        return network, config, dict.fromkeys(network.state_dict(), torch.float32)


def empty_vae(config: WanVaeConfig) -> nn.Module:
    """The network on the meta device; an `InputError` if diffusers is not installed."""
    diffusers: Any = package("diffusers.models.autoencoders.autoencoder_kl_wan", "wan", "this model")
    values = {name: getattr(config, name) for name in WanVaeConfig.__dataclass_fields__}
    values |= {name: list(values[name]) for name in ("dim_mult", "attn_scales", "temperal_downsample")}
    with torch.device("meta"):
        network: nn.Module = diffusers.AutoencoderKLWan(**values)
    return network


def released_name(name: str) -> str:
    """What the released file calls a parameter of diffusers' network."""

    def place(found: re.Match[str]) -> str:
        inner = 3 if found[2] is None else int(found[2])
        return f".upsamples.{4 * int(found[1]) + inner}."

    return _UP.sub(place, _WORDS(name))
