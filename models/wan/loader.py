"""A model of this family from the options of the command line, and what loads it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.checkpoint import Loading
from models.errors import InputError
from models.family import Choices, ModelLoader
from models.text import TextLoading
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.folder import find_files
from models.wan.pipeline import WanPipeline, load_pipeline, load_stage
from models.wan.presets import PRESETS
from models.wan.random_weights import random_dit, random_pipeline

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
        return None if self.weights is None else find_files(self.config, self.weights).vae

    def pipeline(self, loading: Loading) -> WanPipeline:
        if self.weights is None:
            return random_pipeline(self.config, loading)
        return load_pipeline(self.config, self.weights, loading, self.text)

    def stage(self, loading: Loading) -> WanDiT:
        if self.weights is None:
            return random_dit(self.config, loading)
        return load_stage(self.config, self.weights, loading)


def changed(config: WanConfig, choices: Choices) -> WanConfig:
    """As `Family.changed`."""
    if (option := choices.given(*_OF_MAGI)) is not None:
        raise InputError(f"{option} is for MAGI-1, {choices.name} has no such setting: leave it out")
    changes: dict[str, Any] = {} if choices.fps is None else {"fps": choices.fps}
    if choices.sampling is not None:
        if config.runtime.method != "diffusion forcing":
            raise InputError(f"--sampling is for diffusion forcing, {choices.name} is sampled in one way: leave it out")
        changes |= {"sampling": choices.sampling} | (_IN_STEP if choices.sampling == "window" else {})
    return replace(config, runtime=replace(config.runtime, **changes))


def loader_of(config: WanConfig, choices: Choices) -> WanLoader:
    """As `Family.loader`."""
    if choices.random:
        if (option := choices.given("t5_device", "t5_dtype", "prompt_cache")) is not None:
            raise InputError(f"{option} is for models that read prompts, random weights do not: leave it out")
        return WanLoader(config=config, weights=None)
    if choices.weights is None:
        where = f"download {PRESETS[choices.name].folder} from huggingface.co, and " if choices.preset else ""
        raise InputError(f"{choices.name} has no weights here: {where}give their folder with --weights")
    text = TextLoading(
        device=choices.t5_device, dtype=choices.t5_dtype, cache=choices.prompt_cache or choices.usual_cache
    )
    return WanLoader(config=config, weights=choices.weights, text=text)
