"""The causal Wan backbone: stages, parts of a chunk, and what is made once (figures of the published code: goldens)."""

from dataclasses import replace

import pytest
import torch

from models.attention import attention_backend
from models.protocols import Caption, PassCondition
from models.wan.config import CAUSAL_WAN, SKYREELS
from models.wan.dit import WanDiT
from tests.models.wan.small import IMAGE_SHAPES, SHAPES, small_config, small_dit

GRID = (3, 4, 6)
CONDITION = PassCondition(times=(999.0, 700.0, 20.0), fps=24)
PRECISIONS = {"skyreels": SKYREELS, "skyreels fp32": replace(SKYREELS, dtype="float32"), "causal wan": CAUSAL_WAN}


class Own:
    """A chunk attends to itself, as a `KVView`; what is stored is kept."""

    def __init__(self, others=None):
        self.pairs, self.others, self.attention = {}, others, attention_backend()

    def store(self, layer, k, v):
        self.pairs[layer] = k, v

    def attend(self, layer, q):
        return self.attention(q, *(self.others or self.pairs)[layer])


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(model, hidden, condition, first_frame, view, tokens=slice(None)):
    told = model.modulation(condition), model.text(caption(model.config)), model.positions(first_frame, GRID, tokens)
    return model.layers(hidden, *told, view)


def caption(config):
    return Caption(normal(1, 7, config.shapes.text_dim), normal(2, 257, 40) if config.shapes.sees_image else None)


def latent(config):
    return normal(3, 1, config.shapes.in_dim, *GRID)


@pytest.mark.parametrize("shapes", [SHAPES, IMAGE_SHAPES], ids=["t2v", "i2v"])
@pytest.mark.parametrize("precision", list(PRECISIONS.values()), ids=list(PRECISIONS))
@torch.no_grad()
def test_stages_in_a_row_compute_what_the_whole_does(shapes, precision):
    config = small_config(shapes, precision)
    whole, stages = small_dit(config), [small_dit(config, part) for part in (range(0, 1), range(1, 3))]
    assert whole.kv.layers == range(3) and stages[1].kv.layers == range(1, 3)
    once, several = Own(), Own()
    hidden = stages[0].patches(latent(config))
    expected = run(whole, whole.patches(latent(config)), CONDITION, 5, once)
    for stage in stages:
        assert hidden.dtype == config.dtype
        hidden = run(stage, hidden, CONDITION, 5, several)
    assert torch.equal(hidden, expected)
    assert several.pairs.keys() == once.pairs.keys() == set(range(3))
    velocity = stages[1].velocity(hidden, GRID, CONDITION)
    assert velocity.dtype == torch.float32 and velocity.shape == (1, 16, *GRID)
    assert torch.equal(velocity, whole.velocity(expected, GRID, CONDITION)) and velocity.std() > 0.01
    for k, v in several.pairs.values():
        assert k.dtype == v.dtype == config.dtype and k.shape == v.shape == (1, 18, 4, 12)


@pytest.mark.parametrize("times", [(999.0, 700.0, 20.0), (700.0, 700.0, 700.0), (700.0,)], ids=str)
@torch.no_grad()
def test_parts_of_a_chunk_compute_what_the_whole_does(times):
    """As the ranks of context parallelism: each has some tokens, and attends to the keys of all."""
    config, condition = small_config(), PassCondition(times=times)
    model, once = small_dit(config), Own()
    hidden = model.patches(latent(config))
    expected = run(model, hidden, condition, 0, once)
    parts = [slice(0, 5), slice(5, 18)]
    made = [run(model, hidden[:, part], condition, 0, Own(once.pairs), part) for part in parts]
    torch.testing.assert_close(torch.cat(made, dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_time_is_that_time_for_every_frame():
    config = small_config()
    model, hidden = small_dit(config), small_dit(config).patches(latent(config))
    one, each, other = (
        run(model, hidden, PassCondition(times=times), 0, Own())
        for times in ((700.0,), (700.0,) * 3, (700.0, 700.0, 600.0))
    )
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)  # a product of three rows, as published, and of one
    assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_model_that_is_not_told_of_frames_per_second_ignores_them():
    for shapes, differs in ((SHAPES, True), (replace(SHAPES, inject_sample_info=False), False)):
        model = small_dit(small_config(shapes))
        (_, first), (_, other), (_, third) = (
            model.embed_condition(PassCondition(times=(5.0,), fps=fps)) for fps in (16, 24, 30)
        )
        assert torch.equal(other, third) and torch.equal(first, other) != differs


SIZES = {
    "1.3B": (
        {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "inject_sample_info": True},
        1_435_525_696,
        830,
    ),
    "14B": ({"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}, 14_288_491_584, 1_095),
    "14B of an image": (
        {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "model_type": "i2v", "in_dim": 36},
        16_394_878_784,
        1_303,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "parameters", "tensors"), list(SIZES.values()), ids=list(SIZES))
def test_released_sizes(values, parameters, tensors):
    shapes = replace(SHAPES, **({"freq_dim": 256, "text_dim": 4096, "inject_sample_info": False} | values))
    with torch.device("meta"):
        state = WanDiT(small_config(shapes)).state_dict()
    assert (sum(tensor.numel() for tensor in state.values()), len(state)) == (parameters, tensors)
