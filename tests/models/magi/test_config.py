"""Configuration files: the released values are accepted, and anything else is reported in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import Loading
from models.config import checked
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.sampling import MagiSampling
from models.magi.vae import ViTVAE
from tests.models.released import RELEASED, released_config, released_values


def message(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        MagiConfig.from_dict(values, source="some.json")
    text = str(caught.value)
    assert text.startswith("some.json: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", RELEASED)
def test_released_values_survive_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(released_values(name)))
    config = MagiConfig.from_json(path)
    assert config == released_config(name)
    assert config.to_dict() == released_values(name)


def test_derived_sizes() -> None:
    small, large = (released_config(name).model_config for name in ("4.5B_base", "24B_base"))
    assert (small.cond_size, large.cond_size) == (768, 1536)
    assert (small.latent_channels, large.latent_channels) == (16, 16)
    assert small.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["model_config", "runtime_config", "engine_config"])
def test_an_unknown_key_is_named(part: str) -> None:
    values = released_values("4.5B_base")
    values[part]["window"] = 4
    assert f"{part}.window: unknown key" in message(values)


def test_every_key_is_needed() -> None:
    whole = released_values("4.5B_base")
    for part, section in whole.items():
        for key in section:
            rest = {name: value for name, value in section.items() if name != key}
            assert f"{part}.{key}: key is missing" in message(whole | {part: rest})
        assert f"{part}: key is missing" in message({name: value for name, value in whole.items() if name != part})


def test_a_fourth_object_is_named() -> None:
    assert "extra_config: unknown key" in message(released_values("4.5B_base") | {"extra_config": {}})


@pytest.mark.parametrize(("name", "number", "needed"), [("4.5B_base", 1, 3), ("24B_distill", 3, 1)])
def test_wrong_guidance_is_reported(name: str, number: int, needed: int) -> None:
    values = released_values(name)
    values["runtime_config"]["cfg_number"] = number
    assert f"cfg_number must be {needed} for this kind of model" in message(values)


def test_a_quantised_model_is_always_distilled_in_its_guidance() -> None:
    values = released_values("4.5B_base")
    values["engine_config"]["fp8_quant"] = True
    assert "cfg_number must be 1" in message(values)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("model_config", {"num_query_groups": 7}, "multiple of num_query_groups"),
        ("model_config", {"kv_channels": 64}, "must equal hidden_size"),
        ("model_config", {"params_dtype": "float32"}, "params_dtype"),
        ("runtime_config", {"text_scales": [7.5]}, "must have the same length"),
        ("runtime_config", {"num_steps": "many"}, "runtime_config.num_steps"),
        ("runtime_config", {"clean_chunk_kvrange": 0}, "clean_chunk_kvrange must be -1, or 1 or more"),
        ("runtime_config", {"cfg_t_range": [], "prev_chunk_scales": [], "text_scales": []}, "cfg_t_range"),
        ("runtime_config", {"cfg_t_range": [math.nan] * 5}, "cfg_t_range.0: Input should be a finite number"),
        ("model_config", {"half_channel_vae": True, "in_channels": 17}, "in_channels must be even"),
        ("model_config", {"out_channels": 8}, "out_channels"),
        ("model_config", {"cond_hidden_ratio": 1e-6}, "conditioning ratio"),
    ],
)
def test_values_that_do_not_fit_are_reported(part: str, change: dict[str, Any], problem: str) -> None:
    values = released_values("4.5B_base")
    values[part] |= change
    said = message(values)
    assert problem in said and "Value error" not in said


@pytest.mark.parametrize("value", [7, None, [], "x"])
def test_a_part_that_is_no_object_is_said_in_our_words(value: object) -> None:
    said = message(released_values("4.5B_base") | {"model_config": value})
    assert "model_config" in said and "instance of" not in said


@pytest.mark.parametrize("value", [0, -1, 10**12])
@pytest.mark.parametrize(
    ("part", "field"),
    [
        *(("model_config", field) for field in ("num_layers", "num_query_groups", "num_attention_heads", "patch_size")),
        *(("runtime_config", field) for field in ("chunk_width", "window_size")),
        *(("runtime_config", field) for field in ("fps", "num_steps", "video_size_h", "video_size_w", "num_frames")),
    ],
)
def test_a_figure_beyond_reason_is_named_with_its_bound(part: str, field: str, value: int) -> None:
    values = released_values("4.5B_base")
    values[part][field] = value
    bound = "less than or equal to" if value > 0 else "greater than or equal to"
    assert f"{part}.{field}: Input should be {bound}" in message(values)


ABSURD = st.integers() | st.integers(-(10**20), 10**20) | st.integers(0, 100) | st.floats() | st.just(10**5000)


@settings(deadline=10_000, max_examples=300)
@given(data=st.data())
def test_absurd_figures_are_refused_or_can_be_planned_with(data: st.DataObject) -> None:
    """Whatever stands in a numeric field, the file is refused in one line, or makes figures that can be used."""
    values = released_values(data.draw(st.sampled_from(list(RELEASED))))
    fields = [(part, key) for part, section in values.items() for key, held in section.items() if is_number(held)]
    for part, key in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3)):
        values[part] |= {key: data.draw(ABSURD)}
    try:
        config = MagiConfig.from_dict(values, source="some.json")
        sampling = MagiSampling(config=config, num_steps=config.runtime_config.num_steps)
    except InputError as error:
        assert "\n" not in str(error)
        return
    run = config.runtime_config
    assert config.chunk_tokens(run.video_size_h, run.video_size_w) >= 0
    assert sampling.step_passes(run.num_steps - 1, oldest=True, text_needed=True)
    assert sampling.clean_passes(0, prefix=True, text_needed=True)
    with torch.device("meta"):
        MagiDiT(config.model_config, Loading(layers=range(1)), fp8=config.engine_config.fp8_quant)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@settings(deadline=10_000, max_examples=100)
@given(data=st.data())
def test_absurd_figures_of_an_autoencoder_are_refused_or_can_be_built(data: st.DataObject) -> None:
    known = {"z_chans": 16, "embed_dim": 64, "depth": 1, "num_heads": 4, "qkv_bias": True, "ln_in_attn": True}
    numbers = [
        "video_size",
        "video_length",
        "patch_size",
        "patch_length",
        "in_chans",
        "embed_dim",
        "depth",
        "mlp_ratio",
    ]
    values = known | {"conv_last_layer": True, "use_final_proj": data.draw(st.booleans())}
    for key in data.draw(
        st.lists(st.sampled_from([*numbers, "depth", "num_heads", "mlp_ratio"]), min_size=1, max_size=3)
    ):
        values[key] = data.draw(ABSURD)
    try:
        config = checked(VaeConfig, values, source="config.json")
    except InputError as error:
        assert "\n" not in str(error)
        return
    if config.depth <= 20:
        with torch.device("meta"):
            ViTVAE(config)


def test_several_problems_are_counted() -> None:
    values = released_values("4.5B_base")
    values["engine_config"] |= {"a": 1, "b": 2}
    assert "(and 1 more problem" in message(values)


def test_a_missing_file_and_a_broken_one_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the configuration .*: No such file"):
        MagiConfig.from_json(tmp_path / "no.json")
    (tmp_path / "broken.json").write_text('{"model_config": ')
    with pytest.raises(InputError, match="broken.json is not JSON"):
        MagiConfig.from_json(tmp_path / "broken.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="deep.json is not JSON"):
        MagiConfig.from_json(tmp_path / "deep.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="list.json"):
        MagiConfig.from_json(tmp_path / "list.json")
