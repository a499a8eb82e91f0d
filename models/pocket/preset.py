"""magi-pocket as a preset: its configuration, and where its weights lie."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import NULL_TEXT_ROWS
from models.magi.presets import released_config
from models.pocket.clips import SIDE
from models.pocket.text import CAPTION_CHANNELS

WEIGHTS = Path(__file__).parent / "weights"
_RELEASED = released_config("4.5B_distill")
POCKET_DIT = replace(
    _RELEASED.model_config,
    num_layers=6,
    hidden_size=192,
    ffn_hidden_size=768,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=48,
    params_dtype="torch.float32",
    cond_hidden_ratio=0.5,
    caption_channels=CAPTION_CHANNELS,
    caption_max_length=NULL_TEXT_ROWS + 2,
)


def pocket_config() -> MagiConfig:
    """The configuration: the released distilled model's with small widths, 16 steps, and latents of unit variance."""
    return MagiConfig(
        model_config=POCKET_DIT,
        runtime_config=replace(
            _RELEASED.runtime_config,
            video_size_h=SIDE,
            video_size_w=SIDE,
            num_steps=16,
            t5_pretrained=None,
            vae_pretrained=str(WEIGHTS / "vae"),
            scale_factor=1.0,
            load=str(WEIGHTS),
        ),
        engine_config=replace(_RELEASED.engine_config, distributed_backend="gloo", kv_offload=False),
    )


def write_vae_config(folder: Path, config: VaeConfig) -> None:
    """Write the autoencoder's config.json in the released form (specification 1.1)."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": "ViTVAE", "ddconfig": asdict(config), "model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
