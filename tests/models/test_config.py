"""Configuration files: the released values are accepted, and anything else is reported in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import InputError
from models.magi.config import MagiConfig
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
    ],
)
def test_values_that_do_not_fit_are_reported(part: str, change: dict[str, Any], problem: str) -> None:
    values = released_values("4.5B_base")
    values[part] |= change
    assert problem in message(values)


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
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="list.json"):
        MagiConfig.from_json(tmp_path / "list.json")
