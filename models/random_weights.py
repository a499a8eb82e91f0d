"""Random weights: to try a layout, or to measure a pass, before anything is downloaded.

Each tensor is drawn by its name, so every stage has the same ones in whatever layout. On a GPU they are others.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

_Network = TypeVar("_Network", bound=nn.Module)
Value = Callable[[str, Tensor, torch.device], Tensor]
"""A parameter of a name, of the shape that is declared, on a device."""
_WORDS = 16  # fewest tokens of a made-up caption


def fill_random(model: _Network, dtypes: Mapping[str, torch.dtype], device: str, value: Value) -> _Network:
    """Give a network on the meta device random parameters, one after the other, in these dtypes."""
    state = {
        name: value(name, tensor, torch.device(device)).to(dtypes[name]) for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def normal(name: str, declared: Tensor, device: torch.device) -> Tensor:
    """Normal numbers of a parameter of several dimensions, with the deviation that keeps a product's size."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    std = 1.0 if declared.dtype == torch.float8_e4m3fn else 1 / math.sqrt(math.prod(declared.shape[1:]))
    return torch.empty(declared.shape, device=device).normal_(std=std, generator=generator)


class RandomEncoder:
    """Captions of normal numbers: as many tokens as a prompt has words, 16 or more; the same for the same prompt."""

    def __init__(self, channels: int, max_length: int) -> None:
        self._channels, self._most = channels, max_length

    def encode(self, prompt: str) -> Tensor:
        """A caption [N, channels] fp32."""
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        count = min(self._most, max(_WORDS, len(prompt.split()) + 1))
        return torch.randn(count, self._channels, generator=generator)
