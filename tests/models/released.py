"""Configuration values for the tests: the released ones (specification part 4) and a tiny model of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"

_SMALL: dict[str, Any] = {"num_layers": 34, "hidden_size": 3072, "ffn_hidden_size": 12288, "num_attention_heads": 24}
_LARGE: dict[str, Any] = {
    "num_layers": 48,
    "hidden_size": 6144,
    "ffn_hidden_size": 16384,
    "num_attention_heads": 48,
    "x_rescale_factor": 0.1,
    "half_channel_vae": True,
    "in_channels": 32,
    "out_channels": 32,
    "gated_linear_unit": True,
}
_MODEL = {
    "model_name": "videodit_ardf",
    "num_query_groups": 8,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-6,
    "apply_layernorm_1p": True,
    "x_rescale_factor": 1,
    "half_channel_vae": False,
    "params_dtype": "torch.bfloat16",
    "patch_size": 2,
    "t_patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "cond_hidden_ratio": 0.25,
    "caption_channels": 4096,
    "caption_max_length": 800,
    "xattn_cond_hidden_ratio": 1.0,
    "cond_gating_ratio": 1.0,
    "gated_linear_unit": False,
}
_RUNTIME = {
    "cfg_t_range": [0.0, 0.0217, 0.1, 0.3, 0.999],
    "prev_chunk_scales": [1.5, 1.5, 1.5, 1.0, 1.0],
    "text_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
    "noise2clean_kvrange": [5, 4, 3, 2],
    "clean_chunk_kvrange": 1,
    "clean_t": 0.9999,
    "seed": 1234,
    "num_frames": 96,
    "window_size": 4,
    "fps": 24,
    "chunk_width": 6,
    "scale_factor": 0.18215,
    "temporal_downsample_factor": 4,
    "t5_pretrained": "./downloads/t5_pretrained",
    "vae_pretrained": "./downloads/vae",
}
_ENGINE = {
    "distributed_backend": "nccl",
    "distributed_timeout_minutes": 15,
    "pp_size": 1,
    "cp_strategy": "cp_ulysses",
    "ulysses_overlap_degree": 1,
    "distill_nearly_clean_chunk_threshold": 0.3,
    "shortcut_mode": "8,16,16",
    "kv_offload": True,
    "enable_cuda_graph": False,
}
_TINY = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "caption_channels": 24,
    "caption_max_length": 60,
}
RELEASED: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "4.5B_base": (_SMALL, 64, (720, 720)),
    "4.5B_distill": (_SMALL, 64, (720, 720)),
    "4.5B_distill_quant": (_SMALL, 64, (720, 720)),
    "24B_base": (_LARGE, 32, (720, 1280)),
    "24B_distill": (_LARGE, 16, (720, 1280)),
    "24B_distill_quant": (_LARGE, 16, (720, 1280)),
}


def released_values(name: str) -> dict[str, Any]:
    """A released configuration file, decoded."""
    sizes, steps, (height, width) = RELEASED[name]
    distill, large = "distill" in name, name.startswith("24B")
    runtime: dict[str, Any] = {
        "cfg_number": 1 if distill else 3,
        "num_steps": steps,
        "video_size_h": height,
        "video_size_w": width,
    }
    runtime |= {"t5_device": "cuda" if large else "cpu", "load": f"./downloads/{name}"}
    engine = {"cp_size": 8 if large else 1, "distill": distill, "fp8_quant": name.endswith("quant")}
    return {
        "model_config": _MODEL | sizes,
        "runtime_config": _RUNTIME | runtime,
        "engine_config": _ENGINE | engine,
    }


def released_config(name: str) -> MagiConfig:
    """A released configuration, checked."""
    return MagiConfig.from_dict(released_values(name), source=name)


def tiny_config(name: str = "4.5B_base", **shapes: object) -> MagiConfig:
    """A released configuration with a tiny model in it; `shapes` go over it."""
    values = released_values(name)
    values["model_config"] |= _TINY | shapes
    return MagiConfig.from_dict(values, source=f"tiny {name}")


def random_weights(config: MagiConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for every key of the checkpoint, in the dtypes that the released files are said to have (5.2)."""
    generator = torch.Generator().manual_seed(seed)
    model = MagiDiT(config.model_config, fp8=config.engine_config.fp8_quant)
    weights = {}
    for name, declared in model.state_dict().items():
        values = 0.1 * torch.randn(declared.shape, generator=generator)
        if name.endswith("_scale"):
            values = values.abs() + 0.5
        block = name.startswith("videodit_blocks.layers.") and not name.endswith("_scale")
        dtype = declared.dtype if declared.dtype == torch.float8_e4m3fn else torch.bfloat16 if block else torch.float32
        weights[name] = values.to(dtype)
    return weights
