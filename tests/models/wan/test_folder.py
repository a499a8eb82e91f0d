"""Folders as they are downloaded: which model they hold, loading it whole and by stages, and what is damaged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import Loading
from models.config import checked
from models.errors import InputError
from models.text import TextLoading
from models.wan.config import CAUSAL_WAN, IMAGE_TO_VIDEO, SELF_FORCING, SKYREELS, WanConfig
from models.wan.folder import find_files, holds_model, recognise
from models.wan.pipeline import load_pipeline, load_stage, random_dit, random_pipeline
from models.wan.presets import PRESETS, preset_of
from tests.models.wan.damage import DAMAGE, damaged
from tests.models.wan.downloaded import FORCING_SHAPES, LAYOUTS, SMALL_VAE, of_diffusers
from tests.models.wan.small import IMAGE_SHAPES, SHAPES, small_config, small_dit


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
    elif "image" in layout:
        assert config == WanConfig(shapes=IMAGE_SHAPES, precision=SKYREELS, runtime=IMAGE_TO_VIDEO)
    else:
        assert config == WanConfig(shapes=SHAPES, precision=SKYREELS)
    single = replace(config, precision=replace(config.precision, dtype="float32"))
    pipeline = load_pipeline(single, folder, Loading(), TextLoading(dtype="float32", prompts=("a cat sits",)))
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


@pytest.mark.parametrize(("layout", "damage", "said"), list(DAMAGE.values()), ids=list(DAMAGE))
def test_damage_is_one_line(folders, tmp_path, layout, damage, said):
    folder = damaged(folders[layout], tmp_path / layout, damage)
    with pytest.raises(InputError, match=said) as caught:
        load_pipeline(recognise(folder), folder, Loading(), TextLoading(prompts=("a cat",)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_presets_are_themselves_and_travel_as_plain_values():
    for name, preset in PRESETS.items():
        config = preset.config()
        assert preset_of(config) is PRESETS[name]
        assert checked(WanConfig, json.loads(json.dumps(config.to_dict())), source=name) == config


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
