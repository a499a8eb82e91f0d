"""From a configuration to a loaded model: which text encoder belongs to it.

It knows the models by what their configurations say; a configuration without T5 is magi-pocket's.
"""

from __future__ import annotations

from pathlib import Path

from models.magi.config import MagiConfig
from models.magi.pipeline import Loading, MagiPipeline, load_parts, load_released
from models.pocket.text import PocketEncoder


def load_magi(config: MagiConfig, weights: Path | None, loading: Loading) -> MagiPipeline:
    """Load a released model, or magi-pocket, which has a fixed vocabulary in place of T5.

    Args:
        config: of the model.
        weights: folder in place of the configured one, see `load_released`.
        loading: device, precision, attention.

    Raises:
        InputError: something is missing or damaged.
    """
    if config.runtime_config.t5_pretrained is not None:
        return load_released(config, weights, loading)
    model, autoencoder = load_parts(config, weights, loading)
    return MagiPipeline(config, model, autoencoder, PocketEncoder())
