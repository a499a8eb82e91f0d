"""The DiT with what follows from its weights worked out before, and with its regions compiled: the same results."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from models.attention import attention_backend
from models.checkpoint import Loading
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import random_dit
from models.protocols import Caption, PassCondition
from tests.engine.tiny import tiny_config


class OwnView:
    """A chunk that attends to itself."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.kv = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return attention_backend("sdpa")(q, *self.kv)


def config(dtype: str, *, gated: bool = False) -> MagiConfig:
    values = tiny_config(guided=gated).to_dict()
    values["model_config"] |= {"params_dtype": dtype, "num_layers": 3}
    return MagiConfig.from_dict(values, source="test")


@torch.no_grad()
def hidden_states(model: MagiDiT) -> Tensor:
    generator, shapes = torch.Generator().manual_seed(0), model.config
    caption = torch.randn(5, shapes.caption_channels, generator=generator)
    hidden = torch.randn(1, 32, shapes.hidden_size, generator=generator).to(shapes.dtype)
    told = model.modulation(PassCondition(times=(0.5,), distill=8.0)), model.text(Caption(caption.to(model.device)))
    return model.layers(hidden.to(model.device), *told, model.positions(6, (2, 8, 8)), OwnView())


def storages(tensors: Mapping[str, Tensor]) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()})


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_a_fused_model_computes_what_its_weights_say(dtype: str) -> None:
    model = random_dit(config(dtype), Loading())
    plain = MagiDiT(model.config)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain.load_state_dict(stored, assign=True)
    torch.testing.assert_close(hidden_states(model), hidden_states(plain.requires_grad_(False)), rtol=1e-5, atol=1e-5)
    assert storages(model.state_dict()) == storages(stored) - 3 * 3  # one for four projections, and not one more


@pytest.mark.parametrize("change", ["load", "move"])
def test_weights_that_change_are_not_fused_any_more(change: str) -> None:
    model, other = random_dit(config("torch.float32"), Loading()), MagiDiT(config("torch.float32").model_config)
    for parameter in other.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    before = hidden_states(model)
    if change == "load":
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(hidden_states(model), hidden_states(other))
    else:
        model.double().float()
        torch.testing.assert_close(hidden_states(model), before)
        assert storages(model.state_dict()) == len(model.state_dict())


@pytest.mark.slow
def test_compiled_regions_compute_what_they_say_and_are_shared_by_all_layers() -> None:
    of_model = config("torch.bfloat16", gated=True)
    expected, compiled = (hidden_states(random_dit(of_model, Loading(compiled=which))) for which in (False, True))
    # They round at the same places, and only sums within a norm may differ.
    torch.testing.assert_close(compiled, expected, rtol=2**-7, atol=2**-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_compiled_regions_on_a_gpu_compute_what_they_say() -> None:
    ways = (Loading(device="cuda", compiled=which) for which in (False, True))
    expected, compiled = (hidden_states(random_dit(config("torch.bfloat16"), way)).float() for way in ways)
    assert (compiled - expected).norm() <= 7e-3 * expected.norm()  # what bf16 leaves open in two layers
