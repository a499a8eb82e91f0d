"""magi-pocket as a preset: its configuration, and where its weights lie."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from models.magi.config import EngineConfig, MagiConfig, ModelConfig, RuntimeConfig, VaeConfig
from models.magi.dit import NULL_TEXT_ROWS
from models.pocket.clips import SIDE
from models.pocket.text import CAPTION_CHANNELS

WEIGHTS = Path(__file__).parent / "weights"
POCKET_DIT = ModelConfig(
    model_name="videodit_ardf",
    num_layers=6,
    hidden_size=192,
    ffn_hidden_size=768,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=48,
    layernorm_epsilon=1e-6,
    apply_layernorm_1p=True,
    x_rescale_factor=1,
    half_channel_vae=False,
    params_dtype="torch.float32",
    patch_size=2,
    t_patch_size=1,
    in_channels=16,
    out_channels=16,
    cond_hidden_ratio=0.5,
    caption_channels=CAPTION_CHANNELS,
    caption_max_length=NULL_TEXT_ROWS + 2,
    xattn_cond_hidden_ratio=1.0,
    cond_gating_ratio=1.0,
    gated_linear_unit=False,
)


def pocket_config() -> MagiConfig:
    """The configuration: a distilled-style model of 16 steps and one pass, with latents of unit variance."""
    return MagiConfig(
        model_config=POCKET_DIT,
        runtime_config=RuntimeConfig(
            cfg_number=1,
            cfg_t_range=(0.0, 0.0217, 0.1, 0.3, 0.999),
            prev_chunk_scales=(1.5, 1.5, 1.5, 1.0, 1.0),
            text_scales=(7.5, 7.5, 7.5, 0.0, 0.0),
            noise2clean_kvrange=(5, 4, 3, 2),
            clean_chunk_kvrange=1,
            clean_t=0.9999,
            seed=1234,
            num_frames=96,
            video_size_h=SIDE,
            video_size_w=SIDE,
            num_steps=16,
            window_size=4,
            fps=24,
            chunk_width=6,
            t5_pretrained=None,
            t5_device="cpu",
            vae_pretrained=str(WEIGHTS / "vae"),
            scale_factor=1.0,
            temporal_downsample_factor=4,
            load=str(WEIGHTS),
        ),
        engine_config=EngineConfig(
            distributed_backend="gloo",
            distributed_timeout_minutes=15,
            pp_size=1,
            cp_size=1,
            cp_strategy="cp_ulysses",
            ulysses_overlap_degree=1,
            fp8_quant=False,
            distill_nearly_clean_chunk_threshold=0.3,
            shortcut_mode="8,16,16",
            distill=True,
            kv_offload=False,
            enable_cuda_graph=False,
        ),
    )


def write_vae_config(folder: Path, config: VaeConfig) -> None:
    """Write the autoencoder's config.json in the released form (specification 1.1)."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": "ViTVAE", "ddconfig": asdict(config), "model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
