"""The families of models that there are, and which of them is meant."""

from collections.abc import Mapping
from pathlib import Path

from models.errors import InputError
from models.family import Family, ModelConfig, Preset
from models.magi.family import MagiFamily
from models.wan.family import WanFamily

FAMILIES: tuple[Family, ...] = (WanFamily(), MagiFamily())
"""The last one is asked for what no other recognises."""


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return next(family for family in FAMILIES if isinstance(config, family.config_type))


def recognise(folder: Path) -> ModelConfig:
    """The configuration of the model in a downloaded folder. An `InputError` if there is no model in it, or several, or
    one that is not known."""
    if not folder.is_dir():
        raise InputError(f"cannot read the weights: there is no folder {folder}")
    family = next(family for family in FAMILIES if family.holds_model(folder))
    config: ModelConfig = family.recognise(folder)
    return config


def presets() -> Mapping[str, Preset]:
    """All models that can be asked for, by name; those of MAGI-1 first."""
    return {name: preset for family in reversed(FAMILIES) for name, preset in family.presets.items()}


def describe(config: ModelConfig) -> str:
    """What a model is, in words: the preset that it is, or its kind and size."""
    family = family_of(config)
    preset = family.preset_of(config)
    return family.describe(config) if preset is None else f"{preset.name} ({preset.summary})"
