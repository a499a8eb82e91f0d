"""SkyReels-V2 and Self-Forcing as the commands see them: what each method does is said in `models/family.py`; and what
loads them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.checkpoint import Loading
from models.errors import InputError
from models.family import Choices, ModelLoader, Part, ReuseFigures
from models.protocols import Sampling
from models.text import TextLoading
from models.wan import folder as folders
from models.wan import presets as known
from models.wan import weights
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.image import check_image
from models.wan.pipeline import WanPipeline, load_pipeline, load_stage, random_dit, random_pipeline
from models.wan.sampling.changes import KEPT_STEPS, POLYNOMIALS
from models.wan.sampling.method import sampling_of
from models.wan.text import check_text
from models.wan.vae import WanVaeFiles
from models.wan.weights import WanWeights

_LARGE_DIM = 5120  # channels of the model whose fit is that of 14B
_OF_MAGI = (
    *("window", "guidance_times", "chunk_scales", "text_scales", "special", "special_tokens", "negative"),
    *("copy_weight", "precision"),
)
_IN_STEP = {"chunk_width": 1, "stagger": 0}  # as SkyReels-V2 is run in step


@dataclass(frozen=True, kw_only=True, slots=True)
class WanLoader(ModelLoader):
    """Of a model of this family; without `weights` they are random numbers."""

    config: WanConfig

    @property
    def identity(self) -> list[Any]:
        return [self.config.to_dict(), str(self.weights), self.text.dtype]

    @property
    def settings(self) -> dict[str, Any]:
        weights = "random" if self.weights is None else str(self.weights.resolve())
        return {"weights": weights, "text": self.text.dtype}

    @property
    def vae(self) -> Path | None:
        return None if self.weights is None else folders.find_files(self.config, self.weights).vae

    def pipeline(self, loading: Loading) -> WanPipeline:
        if self.weights is None:
            return random_pipeline(self.config, loading)
        return load_pipeline(self.config, self.weights, loading, self.text)

    def stage(self, loading: Loading) -> WanDiT:
        if self.weights is None:
            return random_dit(self.config, loading)
        return load_stage(self.config, self.weights, loading)


class WanFamily:
    """A `Family`."""

    config_type = WanConfig
    presets, preset_of = known.PRESETS, staticmethod(known.preset_of)
    holds_model, recognise = staticmethod(folders.holds_model), staticmethod(folders.recognise)
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

    def changed(self, config: WanConfig, choices: Choices) -> WanConfig:
        if (option := choices.given(*_OF_MAGI)) is not None:
            raise InputError(f"{option} is for MAGI-1, {choices.name} has no such setting: leave it out")
        changes: dict[str, Any] = {} if choices.fps is None else {"fps": choices.fps}
        if choices.sampling is not None:
            if config.runtime.method != "diffusion forcing":
                raise InputError(
                    f"--sampling is for diffusion forcing, {choices.name} is sampled in one way: leave it out"
                )
            changes |= {"sampling": choices.sampling} | (_IN_STEP if choices.sampling == "window" else {})
        return replace(config, runtime=replace(config.runtime, **changes))

    def loader(self, config: WanConfig, choices: Choices) -> WanLoader:
        if choices.random:
            if (option := choices.given("t5_device", "t5_dtype", "prompt_cache")) is not None:
                raise InputError(f"{option} is for models that read prompts, random weights do not: leave it out")
            return WanLoader(config=config, weights=None)
        if choices.weights is None:
            where = f"download {known.PRESETS[choices.name].folder} from huggingface.co, and " if choices.preset else ""
            raise InputError(f"{choices.name} has no weights here: {where}give their folder with --weights")
        text = TextLoading(
            device=choices.t5_device, dtype=choices.t5_dtype, cache=choices.prompt_cache or choices.usual_cache
        )
        return WanLoader(config=config, weights=choices.weights, text=text)

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
