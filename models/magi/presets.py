"""The models that can be asked for by name: released configurations, sizes, and where their weights are.

Presets are plain data and functions; nothing is read or loaded here. Configuration values: specification part 4.
"""

from collections.abc import Iterator
from functools import partial

from models.errors import InputError
from models.family import Preset
from models.magi.config import MagiConfig

POCKET = "magi-pocket"
_T5_BYTES = 19_000_000_000  # specification 2.1; fp32
_VAE, _POCKET_VAE = 613_755_239, 6_889_319  # parameters of autoencoders (specification 1.1); released ones are in fp32


def find_preset(name: str) -> Preset:
    """The preset of a name; an `InputError` if there is none."""
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_of(config: MagiConfig) -> Preset | None:
    """The preset of a configuration: the one of its sizes and kind."""
    for preset in PRESETS.values():
        known, kind = preset.config(), config.engine_config
        if known.model_config == config.model_config and (kind.distill, kind.fp8_quant) == (
            known.engine_config.distill, known.engine_config.fp8_quant,
        ):  # fmt: skip
            return preset
    return None


def released_config(name: str) -> MagiConfig:
    """The configuration file of a released model, by the name of its folder: `4.5B_base`, `24B_distill_quant` ..."""
    large, distill = name.startswith("24B"), "_distill" in name
    values = {
        "model_config": _model_values(large=large),
        "runtime_config": _runtime_values(name, large=large, distill=distill),
        "engine_config": _engine_values(large=large, distill=distill, quant=name.endswith("_quant")),
    }
    return MagiConfig.from_dict(values, source=f"preset {name}")


def _model_values(*, large: bool) -> dict[str, object]:
    return {
        "model_name": "videodit_ardf",
        "num_layers": 48 if large else 34,
        "hidden_size": 6144 if large else 3072,
        "ffn_hidden_size": 16384 if large else 12288,
        "num_attention_heads": 48 if large else 24,
        "num_query_groups": 8,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-6,
        "apply_layernorm_1p": True,
        "x_rescale_factor": 0.1 if large else 1,
        "half_channel_vae": large,
        "params_dtype": "torch.bfloat16",
        "patch_size": 2,
        "t_patch_size": 1,
        "in_channels": 32 if large else 16,
        "out_channels": 32 if large else 16,
        "cond_hidden_ratio": 0.25,
        "caption_channels": 4096,
        "caption_max_length": 800,
        "xattn_cond_hidden_ratio": 1.0,
        "cond_gating_ratio": 1.0,
        "gated_linear_unit": large,
    }


def _runtime_values(name: str, *, large: bool, distill: bool) -> dict[str, object]:
    large_steps = 16 if distill else 32
    return {
        "cfg_number": 1 if distill else 3,
        "cfg_t_range": [0.0, 0.0217, 0.1, 0.3, 0.999],
        "prev_chunk_scales": [1.5, 1.5, 1.5, 1.0, 1.0],
        "text_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
        "noise2clean_kvrange": [5, 4, 3, 2],
        "clean_chunk_kvrange": 1,
        "clean_t": 0.9999,
        "seed": 1234,
        "num_frames": 96,
        "video_size_h": 720,
        "video_size_w": 1280 if large else 720,
        # The distilled 4.5B files say 64 too; 32, 16, 12 or 8 steps are what distillation is for: --steps 16.
        "num_steps": large_steps if large else 64,
        "window_size": 4,
        "fps": 24,
        "chunk_width": 6,
        "t5_pretrained": "./downloads/t5_pretrained",
        "t5_device": "cuda" if large else "cpu",
        "vae_pretrained": "./downloads/vae",
        "scale_factor": 0.18215,
        "temporal_downsample_factor": 4,
        "load": f"./downloads/{name}",
    }


def _engine_values(*, large: bool, distill: bool, quant: bool) -> dict[str, object]:
    return {
        "distributed_backend": "nccl",
        "distributed_timeout_minutes": 15,
        "pp_size": 1,
        "cp_size": 8 if large else 1,
        "cp_strategy": "cp_ulysses",
        "ulysses_overlap_degree": 1,
        "fp8_quant": quant,
        "distill_nearly_clean_chunk_threshold": 0.3,
        "shortcut_mode": "8,16,16",
        "distill": distill,
        "kv_offload": True,
        "enable_cuda_graph": False,
    }


def _pocket() -> MagiConfig:
    from models.pocket.preset import pocket_config

    return pocket_config()


# Folder, what it is good for, parameters, bytes on disk: the embedders are fp32, the layers bf16 or fp8
_RELEASED = (
    ("4.5B_base", "guidance in three branches, 64 steps", 4_459_898_128, 8_960_177_216),
    ("4.5B_distill", "one pass a step; give --steps 16 or 12 or 8", 4_459_898_128, 8_960_177_216),
    ("4.5B_distill_quant", "distilled, fp8 weights; give --steps 16 or 12 or 8", 4_460_979_760, 5_139_298_496),
    ("24B_base", "the large model: guidance in three branches, 32 steps", 23_899_281_936, 47_876_704_320),
    ("24B_distill", "the large model, one pass a step, 16 steps", 23_899_281_936, 47_876_704_320),
    ("24B_distill_quant", "the large model, distilled, fp8 weights", 23_902_014_382, 26_471_517_880),
)


def _presets() -> Iterator[Preset]:
    yield Preset(
        name=POCKET,
        summary="small and trained here: coloured shapes that move, on a laptop's CPU",
        config=_pocket,
        parameters=3_401_702,
        stored=2 * 3_401_702,
        vae_parameters=_POCKET_VAE,
        others=2 * _POCKET_VAE,
        folder=None,
    )
    for released, summary, parameters, stored in _RELEASED:
        yield Preset(
            name="magi-" + released.lower().removesuffix("_base").replace("_", "-"),
            summary=summary,
            config=partial(released_config, released),
            parameters=parameters,
            stored=stored,
            vae_parameters=_VAE,
            others=4 * _VAE + _T5_BYTES,
            folder=f"ckpt/magi/{released}",  # under sand-ai/MAGI-1
        )


PRESETS = {preset.name: preset for preset in _presets()}
