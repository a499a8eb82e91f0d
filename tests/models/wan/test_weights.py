"""Weights of the causal Wan backbone: the names of both layouts, and real files, whole and damaged."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import Loading
from models.errors import InputError
from models.wan.config import WanShapes, shapes_from_dict
from models.wan.weights import WanWeights, diffusers_name
from tests.models.downloaded import write_shards
from tests.models.wan.small import IMAGE_SHAPES, SHAPES, small_config, small_dit


def of_diffusers(shapes: WanShapes):
    """Diffusers' own model of these shapes, without values, and its config.json."""
    diffusers = pytest.importorskip("diffusers.models.transformers.transformer_skyreels_v2")
    image = shapes.sees_image
    with torch.device("meta"):
        model = diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=shapes.num_heads,
            attention_head_dim=shapes.head_size,
            in_channels=shapes.in_dim,
            out_channels=shapes.out_dim,
            text_dim=shapes.text_dim,
            freq_dim=shapes.freq_dim,
            ffn_dim=shapes.ffn_dim,
            num_layers=shapes.num_layers,
            image_dim=shapes.clip_dim if image else None,
            added_kv_proj_dim=shapes.dim if image else None,
            inject_sample_info=shapes.inject_sample_info,
        )
    return model, json.loads(model.to_json_string())


@pytest.mark.parametrize("shapes", [SHAPES, IMAGE_SHAPES], ids=["t2v", "i2v"])
def test_diffusers_has_the_same_parameters_under_other_names(shapes):
    theirs, values = of_diffusers(shapes)
    ours = small_dit(small_config(shapes)).state_dict()
    assert {diffusers_name(name): tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert shapes_from_dict(values, source="here") == shapes


def write(folder, state, stem="model"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / f"{stem}.safetensors")
    return folder


def layouts(folder, state):
    """The same weights in every way in which they are found."""
    theirs = {diffusers_name(name): tensor for name, tensor in state.items()}
    yield write(folder / "released", state)
    yield write_shards(folder / "shards", state)
    yield write_shards(folder / "other shards", state, stem="diffusion_pytorch_model")
    yield write(folder / "diffusers", theirs, stem="diffusion_pytorch_model")
    yield folder / "released" / "model.safetensors"
    generator = {"generator_ema": {f"model.{name}": tensor for name, tensor in state.items()}, "generator": {}}
    torch.save(generator, folder / "self_forcing_dmd.pt")
    yield folder / "self_forcing_dmd.pt"


def test_all_layouts_give_the_same_model(tmp_path):
    config = small_config()
    model = small_dit(config)
    for source in layouts(tmp_path, model.state_dict()):
        assert len(WanWeights(source).check(config)) == len(model.state_dict())
        whole = WanWeights(source).dit(config)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items()), source
        stage = WanWeights(source).dit(config, Loading(layers=range(1, 3)))
        assert stage.state_dict().keys() == small_dit(config, range(1, 3)).state_dict().keys(), source
        assert torch.equal(stage.head.head.weight, model.head.head.weight)


def test_weights_are_in_the_dtype_of_the_configuration(tmp_path):
    config = small_config(precision=replace(small_config().precision, dtype="bfloat16"))
    write(tmp_path, small_dit(small_config()).state_dict())
    assert {tensor.dtype for tensor in WanWeights(tmp_path).dit(config).state_dict().values()} == {torch.bfloat16}


def _changed(name, change):
    def damage(state):
        state[name] = change(state[name])

    return damage


NAME = "blocks.1.ffn.0.weight"
DAMAGE = {
    "a tensor is missing": (lambda state: state.pop(NAME), f"lacks {NAME}"),
    "a tensor is too many": (lambda state: state.update({"blocks.3.x": torch.ones(1)}), "has blocks.3.x"),
    "another shape": (_changed(NAME, lambda tensor: tensor[:1].clone()), f"{NAME} has shape"),
    "another kind": (_changed(NAME, lambda tensor: tensor.int()), f"{NAME} is .*floating-point"),
    "no number": (_changed(NAME, lambda tensor: tensor * float("nan")), f"{NAME} holds values"),
}


@pytest.mark.parametrize(("damage", "said"), list(DAMAGE.values()), ids=list(DAMAGE))
def test_damaged_weights_are_one_line(tmp_path, damage, said):
    state = {name: tensor.clone() for name, tensor in small_dit(small_config()).state_dict().items()}
    damage(state)
    for source in layouts(tmp_path, state):
        with pytest.raises(InputError, match=None if source.name == "diffusers" else said) as caught:
            WanWeights(source).dit(small_config())
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


NOT_WEIGHTS = {
    "an object": ({"generator_ema": Evil()}, "is refused"),
    "an object beside": ({"generator_ema": {"model.x": torch.ones(1), "y": Evil()}}, "is refused"),
    "a number": ({"model.x": torch.ones(1), "step": 3}, "step is int and no tensor"),
    "a list": ([torch.ones(1)], "no dictionary of tensors"),
    "nothing": ({}, "no dictionary of tensors"),
}


@pytest.mark.parametrize(("held", "said"), list(NOT_WEIGHTS.values()), ids=list(NOT_WEIGHTS))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_pytorch_with_anything_but_tensors_is_refused(tmp_path, held, said, zipped, capsys):
    path = tmp_path / "x.pt"
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=f"x.pt.*{said}") as caught:
        WanWeights(path).dit(small_config())
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"x" * 100, None], ids=["empty", "something else", "cut"])
def test_a_file_of_pytorch_that_is_damaged_is_one_line(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(small_dit(small_config()).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(InputError, match="x.pt") as caught:
        WanWeights(path).dit(small_config())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="absent.pt: No such file"):
        WanWeights(tmp_path / "absent.pt").dit(small_config())
