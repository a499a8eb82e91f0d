"""MAGI-1 from the options of the command line: settings of sampling in place of the model's own, and what loads it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from models.checkpoint import Loading
from models.errors import InputError
from models.family import Choices, ModelLoader
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.folder import ModelFiles, find_files
from models.magi.pipeline import MagiPipeline, load_pipeline, load_stage
from models.magi.presets import find_preset
from models.magi.random_weights import random_dit, random_pipeline
from models.magi.sampling import COPY_WEIGHT
from models.magi.text import SPECIAL, SpecialToken, T5Loading


@dataclass(frozen=True, kw_only=True, slots=True)
class MagiLoader(ModelLoader):
    """Of a MAGI-1 model, or magi-pocket; `weights` in place of the configured folder."""

    config: MagiConfig
    random: bool = False  # weights are random numbers, and no file is read
    text: T5Loading = T5Loading()
    copy_weight: float = COPY_WEIGHT  # as in `MagiSampling`

    @property
    def identity(self) -> list[Any]:
        text = [str(self.text.tokens), self.text.dtype, self.text.special, self.text.negative]
        return [self.config.to_dict(), self.random, str(self.weights), text, self.copy_weight]

    @property
    def settings(self) -> dict[str, Any]:
        weights = None if self.weights is None else str(self.weights.resolve())
        return {
            "weights": "random" if self.random else weights,
            "text": [self.text.special, self.text.negative, self.text.dtype, self.text.tokens],
            "copy_weight": self.copy_weight,
        }

    @property
    def vae(self) -> Path | None:
        return None if self.random else find_files(self.config, self.weights, tokens=self.text.tokens).vae

    def pipeline(self, loading: Loading) -> MagiPipeline:
        if self.random:
            return random_pipeline(self.config, loading, copy_weight=self.copy_weight)
        return load_pipeline(self.config, self.weights, loading, self.text, copy_weight=self.copy_weight)

    def stage(self, loading: Loading) -> MagiDiT:
        return random_dit(self.config, loading) if self.random else load_stage(self.config, self.weights, loading)


def loader_of(config: MagiConfig, choices: Choices) -> MagiLoader:
    """As `Family.loader`."""
    if config.runtime_config.t5_pretrained is None or choices.random:
        _check_no_text_options(choices)
    if not choices.random:
        _files(config, choices)
    return MagiLoader(
        config=config,
        random=choices.random,
        weights=None if choices.random else choices.weights,
        text=T5Loading(
            tokens=choices.special_tokens,
            device=choices.t5_device,
            dtype=choices.t5_dtype,
            special=_special(choices.special),
            negative=choices.negative,
            cache=choices.prompt_cache or choices.usual_cache,
        ),
        copy_weight=COPY_WEIGHT if choices.copy_weight is None else choices.copy_weight,
    )


def changed(config: MagiConfig, options: Choices) -> MagiConfig:
    """The configuration with the sampling settings that were given in place of its own."""
    runtime = config.runtime_config
    guidance = {
        "cfg_t_range": ("--guidance-times", options.guidance_times),
        "prev_chunk_scales": ("--chunk-scales", options.chunk_scales),
        "text_scales": ("--text-scales", options.text_scales),
    }
    given = {key: _numbers(name, text) for key, (name, text) in guidance.items() if text is not None}
    if given and runtime.cfg_number == 1:
        raise InputError(f"{guidance[next(iter(given))][0]} is for models with guidance, this one is distilled")
    if options.sampling is not None:
        raise InputError(f"--sampling is for SkyReels-V2, {options.name} is sampled in one way: leave it out")
    asked = {"fps": options.fps, "window_size": options.window}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if given:
        count = len(given.get("cfg_t_range", runtime.cfg_t_range))
        for key, (name, _) in guidance.items():
            numbers = given.get(key, list(getattr(runtime, key)))
            if len(numbers) not in (1, count):
                raise InputError(f"{name} has {len(numbers)} numbers, but there are {count} times: give 1 or {count}")
            changes[key] = numbers * count if len(numbers) == 1 else numbers
    if not changes:
        return config
    values = config.to_dict()
    values["runtime_config"] |= changes
    return MagiConfig.from_dict(values, source="these options")


def _numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} {text} is not a list of numbers such as 7.5,7.5,0") from None
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} {text} has a number that is not finite")
    return numbers


def _check_no_text_options(choices: Choices) -> None:
    given = (
        "--negative"
        if choices.negative
        else choices.given("special", "special_tokens", "t5_device", "t5_dtype", "prompt_cache")
    )
    if given is not None:
        raise InputError(f"{given} is for models that read prompts with T5, {choices.name} does not: leave it out")


def _special(text: str | None) -> tuple[SpecialToken, ...]:
    """Names of special tokens, of a text such as `HQ,3D`."""
    if text is None:
        return SPECIAL
    known = get_args(SpecialToken)
    names = [] if text == "none" else text.upper().split(",")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--special {text}: {unknown[0]!r} is not known: choose from {', '.join(known)}, or none")
    return tuple(name for name in known if name in names)


def _files(config: MagiConfig, choices: Choices) -> ModelFiles:
    """Where the files are; says at once what is not there. What is in them is checked when they are loaded."""
    load = config.runtime_config.load
    if choices.weights is None and load is not None and not Path(load).is_dir():
        folder = find_preset(choices.name).folder if choices.preset else None
        where = "" if folder is None else f"download {folder} from huggingface.co/sand-ai/MAGI-1 to there, or "
        raise InputError(f"{choices.name} has no weights in {load}: {where}give their folder with --weights")
    return find_files(config, choices.weights, tokens=choices.special_tokens)
