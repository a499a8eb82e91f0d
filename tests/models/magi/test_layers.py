"""Quantised linear layers against the arithmetic of specification 5.3, written out element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.magi.layers import Fp8Linear

INPUTS, OUTPUTS = 48, 20


def filled(*, smooth: bool) -> Fp8Linear:
    generator = torch.Generator().manual_seed(3)
    layer = Fp8Linear(INPUTS, OUTPUTS, smooth=smooth)
    state = {}
    for name, declared in layer.state_dict().items():
        values = torch.randn(declared.shape, generator=generator)
        state[name] = (values.abs() * 0.02 + 0.01 if name.endswith("_scale") else values * 30).to(declared.dtype)
    layer.load_state_dict(state)
    return layer


def by_hand(x: Tensor, smooth: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Every product is exact in double precision, so only the roundings that the text names are left."""
    scaled = torch.clamp(x.float() / smooth, -448, 448).bfloat16()
    quantised = scaled.to(torch.float8_e4m3fn).double()
    return ((quantised @ weight.double().T) * scale).bfloat16()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(4)).bfloat16()


def test_per_tensor_layer(x: Tensor) -> None:
    layer = filled(smooth=False)
    scale = (layer.input_scale[0] * layer.weight_scale[0]).item()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert out.shape == (3, 5, OUTPUTS)
    torch.testing.assert_close(out, by_hand(x, layer.input_scale, layer.weight[0].float(), scale), rtol=2**-7, atol=0)


def test_per_channel_layer(x: Tensor) -> None:
    layer = filled(smooth=True)
    scale = (layer.input_scale[0] * layer.weight_scale[0]).item()
    expected = by_hand(x, layer.smooth_scale[0], layer.weight[0].float(), scale)
    torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=0)


def test_the_product_reads_only_the_first_input_scale() -> None:
    """With a scale that is not uniform the inputs are divided by one value and multiplied by another."""
    layer = Fp8Linear(2, 1)
    layer.weight.data = torch.ones(1, 1, 2).to(torch.float8_e4m3fn)
    layer.input_scale.data = torch.tensor([2.0, 8.0])
    x = torch.tensor([[16.0, 16.0]]).bfloat16()
    assert layer(x).item() == (16 / 2 + 16 / 8) * 2


def test_inputs_are_clamped_to_the_fp8_range() -> None:
    layer = Fp8Linear(1, 1, smooth=True)
    layer.weight.data = torch.ones(1, 1, 1).to(torch.float8_e4m3fn)
    x = torch.tensor([[1e4], [-1e4], [448.0], [3.0]]).bfloat16()
    assert layer(x).flatten().tolist() == [448.0, -448.0, 448.0, 3.0]


def test_inputs_are_rounded_to_bf16_before_fp8() -> None:
    """1.0628 lies just above the middle of the fp8 values 1 and 1.125. Rounded to bf16 first it is the middle itself,
    1.0625, and a tie goes to the even one, 1."""
    layer = Fp8Linear(1, 1, smooth=True)
    layer.weight.data = torch.ones(1, 1, 1).to(torch.float8_e4m3fn)
    x = torch.tensor([[1.0628]])
    assert x.to(torch.float8_e4m3fn).item() == 1.125
    assert layer(x).item() == 1.0


@pytest.mark.parametrize("smooth", [False, True])
def test_a_well_scaled_layer_is_near_the_unquantised_one(smooth: bool, x: Tensor) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5))
    layer = Fp8Linear(INPUTS, OUTPUTS, smooth=smooth)
    weight_scale = weight.abs().max() / 448
    layer.weight.data = (weight / weight_scale).to(torch.float8_e4m3fn)[None]
    layer.weight_scale.data = weight_scale[None]
    layer.input_scale.data.fill_(0.01)
    if layer.smooth_scale is not None:
        layer.smooth_scale.data.fill_(0.01)
    expected = x.float() @ weight.T
    assert (layer(x).float() - expected).norm() / expected.norm() < 0.05
