"""The models of this family that can be asked for by name. Nothing is read or loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the configuration pulls in torch, which a listing of names must not wait for
    from models.wan.config import WanConfig, WanShapes

_TEXT_BYTES = 11_361_920_418  # of UMT5-XXL in bf16, as released
VAE_PARAMETERS = 126_892_531
_SMALL, _LARGE = (1536, 8960, 12, 30), (5120, 13824, 40, 40)  # channels, those of the MLP, heads, layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One model."""

    name: str  # what it is called on the command line
    summary: str  # what it is good for
    config: Callable[[], WanConfig]  # makes its configuration
    parameters: int  # of the DiT
    folder: str  # where the weights are, on huggingface.co

    @property
    def disk(self) -> int:
        """Bytes of files: the DiT and the autoencoder in fp32, and UMT5."""
        return 4 * (self.parameters + VAE_PARAMETERS) + _TEXT_BYTES


def skyreels_config(*, large: bool, large_frames: bool = False) -> WanConfig:
    """SkyReels-V2 by diffusion forcing: of 14B or of 1.3B, trained for 720p or for 540p."""
    from models.wan.config import SKYREELS, WanConfig, WanRuntime

    runtime = WanRuntime(height=720, width=1280) if large_frames else WanRuntime()
    return WanConfig(shapes=_shapes(large=large, told_fps=not large), precision=SKYREELS, runtime=runtime)


def image_config(*, large_frames: bool = False) -> WanConfig:
    """SkyReels-V2 of 14B that makes a video of an image; it is no diffusion forcing."""
    from dataclasses import replace

    from models.wan.config import IMAGE_TO_VIDEO, SKYREELS, WanConfig

    shapes = replace(_shapes(large=True, told_fps=False), model_type="i2v", in_dim=36)
    runtime = replace(IMAGE_TO_VIDEO, height=720, width=1280) if large_frames else IMAGE_TO_VIDEO
    return WanConfig(shapes=shapes, precision=SKYREELS, runtime=runtime)


def self_forcing_config() -> WanConfig:
    """Self-Forcing, which is a causal Wan 2.1 of 1.3B."""
    from models.wan.config import CAUSAL_WAN, SELF_FORCING, WanConfig

    return WanConfig(shapes=_shapes(large=False, told_fps=False), precision=CAUSAL_WAN, runtime=SELF_FORCING)


def _shapes(*, large: bool, told_fps: bool) -> WanShapes:
    from models.wan.config import WanShapes

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


# Name, what it is good for, configuration, parameters, and where the weights are
_FORCING = "diffusion forcing: groups of frames at noise levels of their own, 50 steps with guidance"
_MODELS: tuple[tuple[str, str, Callable[[], WanConfig], int, str], ...] = (
    ("skyreels-v2-df-1.3b-540p", _FORCING, partial(skyreels_config, large=False), 1_435_525_696, "DF-1.3B-540P"),
    ("skyreels-v2-df-14b-540p", _FORCING, partial(skyreels_config, large=True), 14_288_491_584, "DF-14B-540P"),
    (
        "skyreels-v2-df-14b-720p",
        "the same, for larger frames",
        partial(skyreels_config, large=True, large_frames=True),
        14_288_491_584,
        "DF-14B-720P",
    ),
    (
        "skyreels-v2-i2v-14b-540p",
        "an image to video: 97 frames at once, of a picture that CLIP sees",
        image_config,
        16_394_878_784,
        "I2V-14B-540P",
    ),
    (
        "skyreels-v2-i2v-14b-720p",
        "the same, for larger frames",
        partial(image_config, large_frames=True),
        16_394_878_784,
        "I2V-14B-720P",
    ),
)


def _presets() -> Iterator[Preset]:
    for name, summary, config, parameters, folder in _MODELS:
        where = f"Skywork/SkyReels-V2-{folder}"
        yield Preset(name=name, summary=summary, config=config, parameters=parameters, folder=where)
    yield Preset(
        name="self-forcing-1.3b",
        summary="one chunk after another, in four steps without guidance",
        config=self_forcing_config,
        parameters=1_418_996_800,
        folder="gdhe17/Self-Forcing",
    )


PRESETS = {preset.name: preset for preset in _presets()}
