"""Linear layers of quantised checkpoints (specification 5.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FP8_MAX = 448.0


def _quantise(x: Tensor, scale: Tensor) -> Tensor:
    """Clamp to the fp8 range, with the released detour over bf16 (two roundings)."""
    return (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).bfloat16().to(torch.float8_e4m3fn)


class _Fp8Linear(nn.Module):
    """A linear layer of a quantised checkpoint (5.3).

    Products of two fp8 values are exact in bf16 and sums are taken in fp32, so it gives the released results up to the
    order of summation on any device; the released kernel (a scaled fp8 matrix product) is faster on GPUs that have it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.zeros(1, outputs, inputs, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def _product(self, quantised: Tensor, input_scale: Tensor) -> Tensor:
        y = quantised.float() @ self.weight[0].float().T
        return (y * (input_scale * self.weight_scale[0])).bfloat16()


class Fp8TensorLinear(_Fp8Linear):
    """`linear_qkv.*` and `mlp.linear_fc1`. Its input scale is stored as a vector, of which the product reads the first
    element only, as the released kernel does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.input_scale = nn.Parameter(torch.ones(inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs] bf16."""
        return self._product(_quantise(x, self.input_scale), self.input_scale[0])


class Fp8ChannelLinear(_Fp8Linear):
    """`linear_proj` and `mlp.linear_fc2`: inputs are smoothed per channel before they are quantised."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.input_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.smooth_scale = nn.Parameter(torch.ones(1, inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., inputs] -> [.., outputs] bf16."""
        return self._product(_quantise(x, self.smooth_scale[0]), self.input_scale[0])
