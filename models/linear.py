"""Linear layers in another precision than that of their parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_in(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer in a dtype, whatever its parameters are stored in."""
    assert isinstance(layer, nn.Linear)
    return F.linear(x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def linear_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """The same in fp32."""
    return linear_in(layer, x, torch.float32)
