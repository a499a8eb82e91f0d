"""Folders as they are downloaded: which model they hold, loading it whole and by stages, and what is damaged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import Loading
from models.errors import InputError
from models.wan.config import CAUSAL_WAN, SELF_FORCING, SKYREELS, WanConfig
from models.wan.folder import find_files, holds_model, recognise
from models.wan.pipeline import WanTextLoading, load_pipeline, load_stage
from models.wan.presets import PRESETS, preset_of
from models.wan.random import random_dit, random_pipeline
from tests.models.wan.downloaded import FORCING_SHAPES, SMALL_VAE, of_diffusers, released, self_forcing
from tests.models.wan.small import IMAGE_SHAPES, SHAPES, small_config, small_dit

LAYOUTS = {"released": released, "diffusers": of_diffusers, "self-forcing": self_forcing}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {name: lay_out(root / name) for name, lay_out in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_downloaded_folder_is_recognised_and_loads_whole_and_by_stages(folders, layout):
    folder = folders[layout]
    assert holds_model(folder)
    config = recognise(folder)
    if layout == "self-forcing":
        assert config == WanConfig(shapes=FORCING_SHAPES, precision=CAUSAL_WAN, runtime=SELF_FORCING)
    else:
        assert config == WanConfig(shapes=SHAPES, precision=SKYREELS)
    single = replace(config, precision=replace(config.precision, dtype="float32"))
    pipeline = load_pipeline(single, folder, Loading(), WanTextLoading(dtype="float32", prompts=("a cat sits",)))
    expected = small_dit(small_config(config.shapes))
    assert all(torch.equal(part, expected.state_dict()[name]) for name, part in pipeline.model.state_dict().items())
    stage = load_stage(single, folder, Loading(layers=range(1, 2)))
    assert stage.kv.layers == range(1, 2) and torch.equal(stage.blocks["1"].modulation, expected.blocks["1"].modulation)
    captions = pipeline.captions("a cat sits")
    assert captions.text.shape == captions.null.shape == (512, SHAPES.text_dim)
    assert captions.text[0].any() and not captions.text[10:].any() and not torch.equal(captions.text, captions.null)
    frames = pipeline.autoencoder.stream()(torch.zeros(1, 16, 2, 2, 2))
    assert frames.shape == (5, 16, 16, 3)
    assert pipeline.autoencoder.encode(frames).shape == (1, 16, 2, 2, 2)


def test_parts_may_lie_beside_the_model(folders, tmp_path):
    folder = tmp_path / "SkyReels-V2-DF-14B-720P"
    folder.mkdir()
    for path in folders["released"].iterdir():
        keeps = path.suffix in (".json", ".safetensors")
        ((folder if keeps else tmp_path) / path.name).symlink_to(path)
    assert find_files(recognise(folder), folder).vae == tmp_path / "Wan2.1_VAE.pth"
    assert recognise(folder).runtime.height == 720


def test_a_model_that_sees_an_image_needs_clip(tmp_path):
    folder = of_diffusers(tmp_path, IMAGE_SHAPES)
    config = recognise(folder)
    assert config.shapes == IMAGE_SHAPES and find_files(config, folder).image == folder / "image_encoder"
    (folder / "image_encoder").rename(folder / "elsewhere")
    with pytest.raises(InputError, match="no CLIP image encoder"):
        find_files(config, folder)


def _json(path, **values):
    def damage(folder):
        held = json.loads((folder / path).read_text()) | values
        (folder / path).write_text(json.dumps({key: value for key, value in held.items() if value != "gone"}))

    return damage


def _gone(path):
    return lambda folder: (folder / path).rename(folder / "elsewhere")


def _cut(path, size=200):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:size])


def _two_generators(folder):
    (folder / "checkpoints" / "other.pt").write_bytes(b"x")


SHARD = "model-00001-of-00002.safetensors"
DAMAGE = {
    "no description": ("released", _gone("config.json"), "holds no model: it needs config.json"),
    "no JSON": ("released", lambda folder: (folder / "config.json").write_text('{"model_type'), "is not JSON"),
    "an unknown key": ("released", _json("config.json", magic=1), "magic: unknown key"),
    "a key that is missing": ("released", _json("config.json", dim="gone"), "dim: key is missing"),
    "a number out of bounds": ("released", _json("config.json", num_layers=100_000), "num_layers: "),
    "no number": ("released", _json("config.json", eps=float("nan")), "eps: "),
    "heads that do not fit": ("released", _json("config.json", num_heads=5), "multiple of num_heads"),
    "another model": ("released", _json("config.json", model_type="llama"), "model_type: "),
    "more layers than weights": ("released", _json("config.json", num_layers=4), "lacks blocks.3."),
    "fewer layers than weights": ("released", _json("config.json", num_layers=2), "has blocks.2."),
    "another width": ("released", _json("config.json", ffn_dim=65), "has shape"),
    "a shard is missing": ("released", _gone(SHARD), f"{SHARD}: No such file"),
    "a shard is cut": ("released", _cut(SHARD, 40_000), f"{SHARD} is truncated"),
    "a shard is something else": ("released", _cut(SHARD, 5), "no complete|not a complete safetensors"),
    "no index": ("released", _gone("model.safetensors.index.json"), "no weights in"),
    "no autoencoder": ("released", _gone("Wan2.1_VAE.pth"), "is not complete: no Wan2.1_VAE.pth in "),
    "no encoder": ("released", _gone("models_t5_umt5-xxl-enc-bf16.pth"), "no models_t5_umt5-xxl-enc-bf16.pth in "),
    "no vocabulary": ("released", _gone("google/umt5-xxl/spiece.model"), "lacks spiece.model"),
    "an autoencoder that is cut": ("released", _cut("Wan2.1_VAE.pth"), "Wan2.1_VAE.pth is no complete file"),
    "an encoder that is cut": ("released", _cut("models_t5_umt5-xxl-enc-bf16.pth"), "enc-bf16.pth is no complete"),
    "another class": ("diffusers", _json("vae/config.json", _class_name="X"), "only 'AutoencoderKLWan'"),
    "another norm": ("diffusers", _json("transformer/config.json", qk_norm="layer"), "qk_norm is 'layer'"),
    "a word of its own": ("diffusers", _json("transformer/config.json", magic=2), "magic: unknown key"),
    "no number of heads": ("diffusers", _json("transformer/config.json", num_attention_heads="gone"), "key is missing"),
    "no folder vae": ("diffusers", _gone("vae"), "no autoencoder .a folder with config.json. in"),
    "no tokenizer": ("diffusers", _gone("tokenizer"), "no folder tokenizer in"),
    "no text encoder": ("diffusers", _gone("text_encoder"), "no UMT5 encoder"),
    "two generators": ("self-forcing", _two_generators, "holds other.pt and self_forcing_dmd.pt"),
    "a generator that is cut": ("self-forcing", _cut("checkpoints/self_forcing_dmd.pt"), "is no complete file"),
}


@pytest.mark.parametrize(("layout", "damage", "said"), list(DAMAGE.values()), ids=list(DAMAGE))
def test_damage_is_one_line(folders, tmp_path, layout, damage, said):
    folder = tmp_path / layout
    for path in folders[layout].rglob("*"):  # copies of what may be changed
        target = folder / path.relative_to(folders[layout])
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(InputError, match=said) as caught:
        load_pipeline(recognise(folder), folder, Loading(), WanTextLoading(prompts=("a cat",)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_presets_are_themselves_and_travel_as_plain_values():
    for name, preset in PRESETS.items():
        config = preset.config()
        assert preset_of(config) is PRESETS[name]
        assert WanConfig.from_dict(json.loads(json.dumps(config.to_dict())), source=name) == config


def test_random_weights_are_the_same_in_every_layout():
    config = small_config(precision=SKYREELS)
    pipeline = random_pipeline(config, Loading(), vae=SMALL_VAE)
    stage = random_dit(config, Loading(layers=range(2, 3)))
    whole = pipeline.model.state_dict()
    assert all(torch.equal(part, whole[name]) for name, part in stage.state_dict().items())
    assert pipeline.captions("a cat").text.shape == (512, SHAPES.text_dim)
    assert pipeline.autoencoder.stream()(torch.randn(1, 16, 1, 2, 2)).float().std() > 1
    with pytest.raises(InputError, match="there is no folder"):
        load_stage(config, Path("absent"), Loading())
