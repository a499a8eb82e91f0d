"""SkyReels-V2 and Self-Forcing as the commands see them; what each method does is said in `models/family.py`."""

from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError
from models.family import Part, ReuseFigures
from models.protocols import Sampling
from models.wan import folder as folders
from models.wan import loader as loading
from models.wan import presets as known
from models.wan import weights
from models.wan.config import WanConfig
from models.wan.image import check_image
from models.wan.sampling.changes import KEPT_STEPS, POLYNOMIALS
from models.wan.sampling.method import sampling_of
from models.wan.text import check_text
from models.wan.vae import WanVaeFiles
from models.wan.weights import WanWeights

_LARGE_DIM = 5120  # channels of the model whose fit is that of 14B


class WanFamily:
    """A `Family`."""

    config_type = WanConfig
    presets, preset_of = known.PRESETS, staticmethod(known.preset_of)
    holds_model, recognise = staticmethod(folders.holds_model), staticmethod(folders.recognise)
    changed, loader = staticmethod(loading.changed), staticmethod(loading.loader_of)
    stage_bytes = staticmethod(weights.stage_bytes)
    notes = (
        "Weights of SkyReels-V2: the folder above on huggingface.co, as it is, or that of diffusers; of Self-Forcing "
        "its file in a folder with Wan 2.1's autoencoder and encoder in wan_models/Wan2.1-T2V-1.3B. Autoencoder and "
        "UMT5 (11 GB) need pip install 'flowcache-engine[wan]'."
    )

    def describe(self, config: WanConfig) -> str:
        shapes = config.shapes
        return f"a causal Wan of {shapes.num_layers} layers and {shapes.dim} channels, by {config.runtime.method}"

    def parts(self, config: WanConfig, folder: Path, tokens: Path | None) -> Iterator[Part]:
        dit = folders.dit_source(folder)
        yield Part(name="DiT", where=dit, check=lambda: WanWeights(dit).check(config))
        files = folders.find_files(config, folder)
        yield Part(name="autoencoder", where=files.vae, check=WanVaeFiles(files.vae).check)
        yield Part(name="UMT5", where=files.text, check=lambda: check_text(files.text, files.tokenizer))
        if (image := files.image) is not None:
            yield Part(name="CLIP", where=image, check=lambda: check_image(image))

    def reuse_figures(self, config: WanConfig) -> ReuseFigures | None:
        """As `Family`: of SkyReels-V2 as published, with the fit of its size; none of Self-Forcing, whose steps are
        few, and of images to video."""
        if config.runtime.method != "diffusion forcing":
            return None
        size = "14B" if config.shapes.dim >= _LARGE_DIM else "1.3B"
        return ReuseFigures(
            warmup_steps=KEPT_STEPS[True],
            slow=0.1,
            fast=0.15,
            teacache=0.2,
            default="none",
            reuse="residual",
            distance="condition",
            polynomial=POLYNOMIALS[size, True],
            clean_pass=False,
        )

    def check_prompt(self, config: WanConfig, prompt: str) -> None:
        """As `Family`: it reads all."""

    def check_negative(self, config: WanConfig) -> None:
        """As `Family`: it is read where there is guidance."""
        if config.runtime.guidance <= 1:
            raise InputError("a negative prompt: this model has no guidance that could read it, leave it out")

    def vae_bytes(self, config: WanConfig, vae: Path | None) -> int:
        """As `Family`. It is fp32."""
        if vae is None:
            return 4 * known.VAE_PARAMETERS
        stored = WanVaeFiles(vae).check()
        return 4 * sum(entry.size for entry in stored.values())

    def sampling(
        self, config: WanConfig, num_steps: int, *, clean_pass: bool, copy_pass: bool, given: int = 0, ends: int = 0
    ) -> Sampling:
        return sampling_of(config, num_steps, clean_pass=clean_pass, given=given, ends=ends)
