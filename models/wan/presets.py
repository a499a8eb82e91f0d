"""The models of this family that can be asked for by name. Nothing is read or loaded here."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from models.family import Preset
from models.wan.config import CAUSAL_WAN, IMAGE_TO_VIDEO, SELF_FORCING, SKYREELS, WanConfig, WanRuntime, WanShapes

_TEXT_BYTES = 11_361_920_418  # of UMT5-XXL in bf16, as released
VAE_PARAMETERS = 126_892_531
_SMALL, _LARGE = (1536, 8960, 12, 30), (5120, 13824, 40, 40)  # channels, those of the MLP, heads, layers


def skyreels_config(*, large: bool, large_frames: bool = False) -> WanConfig:
    """SkyReels-V2 by diffusion forcing: of 14B or of 1.3B, trained for 720p or for 540p."""
    runtime = WanRuntime(height=720, width=1280) if large_frames else WanRuntime()
    return WanConfig(shapes=_shapes(large=large, told_fps=not large), precision=SKYREELS, runtime=runtime)


def image_config(*, large_frames: bool = False) -> WanConfig:
    """SkyReels-V2 of 14B that makes a video of an image; it is no diffusion forcing."""
    shapes = replace(_shapes(large=True, told_fps=False), model_type="i2v", in_dim=36)
    runtime = replace(IMAGE_TO_VIDEO, height=720, width=1280) if large_frames else IMAGE_TO_VIDEO
    return WanConfig(shapes=shapes, precision=SKYREELS, runtime=runtime)


def self_forcing_config() -> WanConfig:
    """Self-Forcing, which is a causal Wan 2.1 of 1.3B."""
    return WanConfig(shapes=_shapes(large=False, told_fps=False), precision=CAUSAL_WAN, runtime=SELF_FORCING)


def _shapes(*, large: bool, told_fps: bool) -> WanShapes:
    dim, hidden, heads, layers = _LARGE if large else _SMALL
    return WanShapes(
        model_type="t2v", dim=dim, ffn_dim=hidden, num_heads=heads, num_layers=layers, inject_sample_info=told_fps
    )


def preset_of(config: WanConfig) -> Preset | None:
    """The preset of a configuration: the one of its shapes and of its videos."""
    for preset in PRESETS.values():
        known = preset.config()
        if (known.shapes, known.runtime) == (config.shapes, config.runtime):
            return preset
    return None


def _preset(name: str, summary: str, config: Callable[[], WanConfig], parameters: int, folder: str) -> Preset:
    """DiT and autoencoder are stored in fp32; the folder is on huggingface.co."""
    return Preset(
        name=name,
        summary=summary,
        config=config,
        parameters=parameters,
        stored=4 * parameters,
        vae_parameters=VAE_PARAMETERS,
        others=4 * VAE_PARAMETERS + _TEXT_BYTES,
        folder=folder,
    )


_FORCING = "diffusion forcing: groups of frames at noise levels of their own, 50 steps with guidance"
_IMAGE = "an image to video: 97 frames at once, of a picture that CLIP sees"
_LARGER, _CHUNKS = "the same, for larger frames", "one chunk after another, in four steps without guidance"
_DF, _SMALL_DF, _I2V = partial(skyreels_config, large=True), partial(skyreels_config, large=False), image_config
_LARGER_DF, _LARGER_I2V = partial(_DF, large_frames=True), partial(_I2V, large_frames=True)
_OF_DF, _OF_I2V = 14_288_491_584, 16_394_878_784  # parameters of 14B
_PRESETS = (
    _preset("skyreels-v2-df-1.3b-540p", _FORCING, _SMALL_DF, 1_435_525_696, "Skywork/SkyReels-V2-DF-1.3B-540P"),
    _preset("skyreels-v2-df-14b-540p", _FORCING, _DF, _OF_DF, "Skywork/SkyReels-V2-DF-14B-540P"),
    _preset("skyreels-v2-df-14b-720p", _LARGER, _LARGER_DF, _OF_DF, "Skywork/SkyReels-V2-DF-14B-720P"),
    _preset("skyreels-v2-i2v-14b-540p", _IMAGE, _I2V, _OF_I2V, "Skywork/SkyReels-V2-I2V-14B-540P"),
    _preset("skyreels-v2-i2v-14b-720p", _LARGER, _LARGER_I2V, _OF_I2V, "Skywork/SkyReels-V2-I2V-14B-720P"),
    _preset("self-forcing-1.3b", _CHUNKS, self_forcing_config, 1_418_996_800, "gdhe17/Self-Forcing"),
)
PRESETS = {preset.name: preset for preset in _PRESETS}
