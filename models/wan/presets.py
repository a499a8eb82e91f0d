"""The models of this family that can be asked for by name. Nothing is read or loaded here."""

from dataclasses import replace

from models.family import Preset
from models.wan.config import (
    CAUSAL_WAN,
    IMAGE_TO_VIDEO,
    SELF_FORCING,
    SKYREELS,
    WanConfig,
    WanPrecision,
    WanRuntime,
    WanShapes,
)

_TEXT_BYTES = 11_361_920_418  # of UMT5-XXL in bf16, as released
VAE_PARAMETERS = 126_892_531
_SMALL = WanShapes(model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_LARGE = WanShapes(model_type="t2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TOLD_FPS, _SEES = replace(_SMALL, inject_sample_info=True), replace(_LARGE, model_type="i2v", in_dim=36)
_FORCING = WanRuntime()
_LARGER_FORCING, _LARGER_IMAGE = (replace(one, height=720, width=1280) for one in (_FORCING, IMAGE_TO_VIDEO))


def preset_of(config: WanConfig) -> Preset | None:
    """The preset of a configuration: the one of its shapes and of its videos."""
    for preset in PRESETS.values():
        known = preset.config()
        if (known.shapes, known.runtime) == (config.shapes, config.runtime):
            return preset
    return None


def _preset(
    name: str,
    summary: str,
    parameters: int,
    folder: str,
    shapes: WanShapes,
    runtime: WanRuntime,
    precision: WanPrecision = SKYREELS,
) -> Preset:
    """DiT and autoencoder are stored in fp32; the folder is on huggingface.co."""
    config = WanConfig(shapes=shapes, precision=precision, runtime=runtime)
    return Preset(
        name=name,
        summary=summary,
        config=lambda: config,
        parameters=parameters,
        stored=4 * parameters,
        vae_parameters=VAE_PARAMETERS,
        others=4 * VAE_PARAMETERS + _TEXT_BYTES,
        folder=folder,
    )


_DF = "diffusion forcing: groups of frames at noise levels of their own, 50 steps with guidance"
_I2V = "an image to video: 97 frames at once, of a picture that CLIP sees"
_LARGER, _CHUNKS = "the same, for larger frames", "one chunk after another, in four steps without guidance"
_OF_DF, _OF_I2V = 14_288_491_584, 16_394_878_784  # parameters of 14B
_SKYWORK = "Skywork/SkyReels-V2-"
_PRESETS = (
    _preset("skyreels-v2-df-1.3b-540p", _DF, 1_435_525_696, f"{_SKYWORK}DF-1.3B-540P", _TOLD_FPS, _FORCING),
    _preset("skyreels-v2-df-14b-540p", _DF, _OF_DF, f"{_SKYWORK}DF-14B-540P", _LARGE, _FORCING),
    _preset("skyreels-v2-df-14b-720p", _LARGER, _OF_DF, f"{_SKYWORK}DF-14B-720P", _LARGE, _LARGER_FORCING),
    _preset("skyreels-v2-i2v-14b-540p", _I2V, _OF_I2V, f"{_SKYWORK}I2V-14B-540P", _SEES, IMAGE_TO_VIDEO),
    _preset("skyreels-v2-i2v-14b-720p", _LARGER, _OF_I2V, f"{_SKYWORK}I2V-14B-720P", _SEES, _LARGER_IMAGE),
    _preset("self-forcing-1.3b", _CHUNKS, 1_418_996_800, "gdhe17/Self-Forcing", _SMALL, SELF_FORCING, CAUSAL_WAN),
)
PRESETS = {preset.name: preset for preset in _PRESETS}
