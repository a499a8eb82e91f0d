"""What MAGI-1's layers are made of and PyTorch has not: norms, rotary positions, products in fp32, fp8 linear layers.

Shapes: B batch, S tokens, T H W the grid of tokens, H heads, d head size, n rotary bands.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FP8_MAX = 448.0


class LayerNorm(nn.LayerNorm):
    """Ordinary layer norm that computes in its parameters' dtype (specification 6.3, steps 1 and 9)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(input.to(self.weight.dtype))


class LayerNorm1p(nn.Module):
    """Layer norm with an effective gain of weight + 1, in the dtype of its parameters.

    The parameters are fp32 after promotion, but those of the cross-attention stay in the model's dtype, and weight + 1
    is then rounded to it (specification 5.5 and 6.3, step 5). `gain` is that sum, once the weight is final.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.gain: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the parameters' dtype."""
        gain = self.weight + 1 if self.gain is None else self.gain
        return F.layer_norm(x.to(gain.dtype), gain.shape, gain, self.bias, self.eps)


class RotaryBands(nn.Module):
    """Learned bands of three-axis rotary positions, shared by the axes: head size / 8, at first 10000^(-i/n) (6.2)."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        count = head_size // 8
        self.bands = nn.Parameter(10000.0 ** -(torch.arange(count, dtype=torch.float32, device="cpu") / count))

    def table(self, time: Tensor, grid: tuple[int, int]) -> Tensor:
        """Sines and cosines [2, S, 3n] fp32 of the tokens of some latent frames, in (T, H, W) order; n of time, n of
        height, n of width.

        `time` [T] has the absolute numbers of the frames, `grid` is (H, W) of tokens. A table is made for one chunk
        from its own index, so nothing grows with the length of the video. The released code divides the numbers by that
        of the frames so far, less one, and multiplies again, which is the identity up to two roundings.
        """
        bands = self.bands.float()
        height, width = grid
        shrink = math.sqrt(height * width / 256)
        axes = (time, _centred(height, shrink, bands.device), _centred(width, shrink, bands.device))
        of_time, of_rows, of_columns = (axis[:, None] * bands for axis in axes)
        parts = (of_time[:, None, None], of_rows[:, None], of_columns)
        angles = torch.cat([part.expand(len(time), *grid, -1) for part in parts], dim=-1).flatten(0, 2)
        return torch.stack([angles.sin(), angles.cos()])


def _centred(size: int, shrink: float, device: torch.device) -> Tensor:
    coordinate = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    return coordinate / (size - 1) * (size / shrink - 1) if size > 1 else coordinate


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 6n values of each head of x [B, S, H, d] in halves (a, b); the rest passes through.

    fp32, as the table [2, S, 3n] is.
    """
    sin, cos = table[0][:, None], table[1][:, None]
    half = sin.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def product_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., n] times the transpose of weight [m, n], in fp32. On a GPU bf16 operands are not cast: their products are
    exact and added up in fp32 all the same, 14 times as fast (docs/performance.md)."""
    if x.device.type != "cpu" and x.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    return F.linear(x.float(), weight.float())


class Fp8Linear(nn.Module):
    """A linear layer of a quantised checkpoint (5.3): [.., inputs] -> [.., outputs] bf16.

    Products of two fp8 values are exact in bf16, and sums are taken in fp32, so it gives the released results up to the
    order of summation. A GPU that multiplies fp8 does so, as the released kernel, and its sums keep fewer bits
    (docs/conformance.md); elsewhere both operands are cast to bf16 for a call, which costs little beside the product
    and no memory that lasts.

    Args:
        inputs: values of a token.
        outputs: the same, of the result.
        smooth: inputs are divided by `smooth_scale`, by channel, before they are quantised: `linear_proj` and
            `mlp.linear_fc2`. The others are divided by their `input_scale`, which is stored as a vector, of which the
            product reads the first element only, as the released kernel does.
    """

    def __init__(self, inputs: int, outputs: int, *, smooth: bool = False) -> None:
        super().__init__()
        weight = torch.zeros(1, outputs, inputs, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.input_scale = nn.Parameter(torch.ones(1 if smooth else inputs), requires_grad=False)
        self.smooth_scale = nn.Parameter(torch.ones(1, inputs), requires_grad=False) if smooth else None

    def quantise(self, x: Tensor) -> Tensor:
        """Clamp to the fp8 range, with the released detour over bf16 (two roundings)."""
        scale = self.input_scale if self.smooth_scale is None else self.smooth_scale[0]
        return (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).bfloat16().to(torch.float8_e4m3fn)

    def forward(self, x: Tensor) -> Tensor:
        """Quantise, multiply, and scale back."""
        quantised = self.quantise(x)
        return self.in_fp8(quantised) if self.multiplies_fp8 else self.in_bf16(quantised)

    @property
    def multiplies_fp8(self) -> bool:
        """Whether the device multiplies fp8, and matrices of this shape."""
        return _multiplies_fp8(self.weight.device) and not any(size % 16 for size in self.weight[0].shape)

    def in_fp8(self, quantised: Tensor) -> Tensor:
        """The result of quantised inputs, multiplied as they are."""
        rows, scale, shape = quantised.flatten(0, -2), self.input_scale[:1], quantised.shape[:-1]
        y = torch._scaled_mm(
            rows, self.weight[0].T, scale, self.weight_scale, out_dtype=torch.bfloat16, use_fast_accum=False
        )
        return y.unflatten(0, shape)

    def in_bf16(self, quantised: Tensor) -> Tensor:
        """The same of copies in bf16, which are exact, added up in fp32."""
        y = product_in_fp32(quantised.bfloat16(), self.weight[0].bfloat16())
        return (y * (self.input_scale[:1] * self.weight_scale)).bfloat16()


@cache
def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
