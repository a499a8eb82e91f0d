"""MAGI-1 as the commands see it: what each method does is said in `models/family.py`; and what loads it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from models.checkpoint import Loading
from models.errors import InputError
from models.family import Choices, ModelLoader, Part, ReuseFigures
from models.magi import folder as folders
from models.magi import presets as known
from models.magi import weights
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import (
    MagiPipeline,
    load_pipeline,
    load_stage,
    random_dit,
    random_pipeline,
    vae_config,
    vae_dtype,
)
from models.magi.sampling import COPY_WEIGHT, MagiSampling
from models.magi.text import SPECIAL, T5_FOLDER, SpecialToken, SpecialTokens, T5Loading, check_t5
from models.magi.weights import Checkpoint, vae_parameters
from models.pocket.words import parse_prompt

# As published (FlowCache, below Eq. 8). Extrapolation was measured on magi-pocket only.
MAGI_1_FIGURES = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01, default="none", reuse="residual")
# Thresholds for 16 steps; benchmarks.quality measures what they mean.
POCKET_FIGURES = ReuseFigures(
    warmup_steps=3, slow=0.061, fast=0.0895, teacache=0.0657, default="flowcache-slow", reuse="extrapolate"
)


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
        return None if self.random else folders.find_files(self.config, self.weights, tokens=self.text.tokens).vae

    def pipeline(self, loading: Loading) -> MagiPipeline:
        if self.random:
            return random_pipeline(self.config, loading, copy_weight=self.copy_weight)
        return load_pipeline(self.config, self.weights, loading, self.text, copy_weight=self.copy_weight)

    def stage(self, loading: Loading) -> MagiDiT:
        return random_dit(self.config, loading) if self.random else load_stage(self.config, self.weights, loading)


class MagiFamily:
    """A `Family`."""

    config_type = MagiConfig
    presets, preset_of = known.PRESETS, staticmethod(known.preset_of)
    recognise = staticmethod(folders.recognise)
    stage_bytes = staticmethod(weights.stage_bytes)
    notes = (
        "Weights of MAGI-1: huggingface.co/sand-ai/MAGI-1. Download the folder above, ckpt/vae and ckpt/t5, and name "
        "the first with --weights; flowcache inspect says what is missing. special_tokens.npz, of the MAGI-1 code's "
        "example/assets, is found in a checkout around it, or goes into the folder. T5 (19 GB) needs "
        "pip install 'flowcache-engine[t5]'; it is read before the model, and let go; a gang of batch holds it."
    )

    def describe(self, config: MagiConfig) -> str:
        model, engine = config.model_config, config.engine_config
        kind = ("distilled" if engine.distill else "base") + (", fp8 weights" if engine.fp8_quant else "")
        return f"a MAGI-1 model of {model.num_layers} layers and {model.hidden_size} channels, {kind}"

    def holds_model(self, folder: Path) -> bool:
        return folder.is_dir()

    def parts(self, config: MagiConfig, folder: Path, tokens: Path | None) -> Iterator[Part]:
        dit = folders.dit_folder(config, folder)
        yield Part(name="DiT", where=dit, check=lambda: Checkpoint(dit).check_dit(config))
        files = folders.find_files(config, folder, tokens=tokens)
        yield Part(name="autoencoder", where=files.vae, check=Checkpoint(files.vae).check_vae)
        if files.t5 is not None:
            t5 = files.t5 / T5_FOLDER
            yield Part(name="T5", where=t5, check=lambda: check_t5(t5))
        if (special := files.tokens) is not None:
            yield Part(name="special tokens", where=special, check=lambda: _check_tokens(special, config))

    def changed(self, config: MagiConfig, choices: Choices) -> MagiConfig:
        runtime = config.runtime_config
        guidance = {
            "cfg_t_range": ("--guidance-times", choices.guidance_times),
            "prev_chunk_scales": ("--chunk-scales", choices.chunk_scales),
            "text_scales": ("--text-scales", choices.text_scales),
        }
        given = {key: _numbers(name, text) for key, (name, text) in guidance.items() if text is not None}
        if given and runtime.cfg_number == 1:
            raise InputError(f"{guidance[next(iter(given))][0]} is for models with guidance, this one is distilled")
        if choices.sampling is not None:
            raise InputError(f"--sampling is for SkyReels-V2, {choices.name} is sampled in one way: leave it out")
        asked = {"fps": choices.fps, "window_size": choices.window}
        changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if given:
            count = len(given.get("cfg_t_range", runtime.cfg_t_range))
            for key, (name, _) in guidance.items():
                numbers = given.get(key, list(getattr(runtime, key)))
                if len(numbers) not in (1, count):
                    raise InputError(
                        f"{name} has {len(numbers)} numbers, but there are {count} times: give 1 or {count}"
                    )
                changes[key] = numbers * count if len(numbers) == 1 else numbers
        if not changes:
            return config
        values = config.to_dict()
        values["runtime_config"] |= changes
        return MagiConfig.from_dict(values, source="these options")

    def loader(self, config: MagiConfig, choices: Choices) -> MagiLoader:
        if config.runtime_config.t5_pretrained is None or choices.random:
            _check_no_text_options(choices)
        if not choices.random:
            _check_files(config, choices)
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

    def reuse_figures(self, config: MagiConfig) -> ReuseFigures:
        return POCKET_FIGURES if config.runtime_config.t5_pretrained is None else MAGI_1_FIGURES

    def check_prompt(self, config: MagiConfig, prompt: str) -> None:
        """As `Family`: magi-pocket has a fixed vocabulary."""
        if config.runtime_config.t5_pretrained is None:
            parse_prompt(prompt)

    def check_negative(self, config: MagiConfig) -> None:
        """As `Family`: what stands for "no text" was learned."""
        raise InputError("a negative prompt: MAGI-1 and magi-pocket read none, leave it out")

    def vae_bytes(self, config: MagiConfig, vae: Path | None) -> int:
        described = vae_config(config) if vae is None else Checkpoint(vae).vae_config()
        return vae_parameters(described) * vae_dtype(config).itemsize

    def sampling(
        self, config: MagiConfig, num_steps: int, *, clean_pass: bool, copy_pass: bool, given: int = 0, ends: int = 0
    ) -> MagiSampling:
        return MagiSampling(config=config, num_steps=num_steps, clean_pass=clean_pass, copy_pass=copy_pass)


def _check_tokens(path: Path, config: MagiConfig) -> str:
    SpecialTokens.from_npz(path, channels=config.model_config.caption_channels)
    return "quality and duration"


def _numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} {text} is not a list of numbers such as 7.5,7.5,0") from None
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} {text} has a number that is not finite")
    return numbers


def _check_no_text_options(choices: Choices) -> None:
    given = choices.given("negative", "special", "special_tokens", "t5_device", "t5_dtype", "prompt_cache")
    if given is not None:
        raise InputError(f"{given} is for models that read prompts with T5, {choices.name} does not: leave it out")


def _special(text: str | None) -> tuple[SpecialToken, ...]:
    """Names of special tokens, of a text such as `HQ,3D`."""
    if text is None:
        return SPECIAL
    tokens = get_args(SpecialToken)
    names = [] if text == "none" else text.upper().split(",")
    if unknown := [name for name in names if name not in tokens]:
        raise InputError(f"--special {text}: {unknown[0]!r} is not known: choose from {', '.join(tokens)}, or none")
    return tuple(name for name in tokens if name in names)


def _check_files(config: MagiConfig, choices: Choices) -> None:
    """Say at once which files are not there. What is in them is checked when they are loaded."""
    load = config.runtime_config.load
    if choices.weights is None and load is not None and not Path(load).is_dir():
        folder = known.find_preset(choices.name).folder if choices.preset else None
        where = "" if folder is None else f"download {folder} from huggingface.co/sand-ai/MAGI-1 to there, or "
        raise InputError(f"{choices.name} has no weights in {load}: {where}give their folder with --weights")
    folders.find_files(config, choices.weights, tokens=choices.special_tokens)
