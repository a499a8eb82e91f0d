"""From options to plans: everything that can be checked is checked here, before a weight is read.

It knows options, files, and what `--cache` and `--kv-budget` stand for with each model; how a video is denoised is
the engine's business. What cannot be used is an `InputError` with one line that says what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from engine.files import check_folder, check_target
from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.request import Prefix, Request
from engine.reuse.policy import ReuseSettings
from launch.media import read_image, read_video
from launch.memory import Job, vae_bytes
from launch.options import CacheName, Options, ReuseKind, ray_address, together
from models.attention import attention_backend
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.folder import find_files, recognise
from models.magi.presets import POCKET, find_preset, preset_of
from models.magi.sampling import COPY_WEIGHT, MagiSampling
from models.magi.text import SPECIAL, SpecialToken, TextLoading
from models.pocket.text import parse_prompt
from parallel.cluster.config import MagiSource, video_size
from parallel.cluster.messages import VideoOrder
from parallel.cluster.scheduler import VideoSize
from parallel.mesh import Layout, stage_sizes
from parallel.ranks.environment import prompt_cache

_LETTERS = 40  # of a prompt in a name; file systems take 255 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """Which model to load, and how the engine uses it: what every rank must know."""

    name: str  # for people
    source: MagiSource  # what each rank loads its part of
    device: str  # where to, without ranks
    cache: CacheName  # preset of reuse
    reuse: ReuseSettings  # which steps are reused
    kv: KVSettings  # how much of the past is held

    @property
    def config(self) -> MagiConfig:
        """The model's configuration."""
        return self.source.config


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One video, checked: what to load, what to make, and where to put it."""

    options: Options  # that it was made of
    model: ModelPlan
    request: Request
    out: Path  # file to write
    record: Path | None  # folder for a record of the run; None for none

    @property
    def size(self) -> VideoSize:
        """What it takes of its ranks; an `InputError` says why the model cannot make it."""
        model, layout, split = self.model, layout_of(self.options), self.options.split
        return video_size(model.config, self.request, reuse=model.reuse, kv=model.kv, layout=layout, split=split)

    def order(self, video: str) -> VideoOrder:
        """The order to make it, under a name."""
        return VideoOrder(video=video, request=self.request, size=self.size)


def layout_of(options: Options) -> Layout:
    """The ranks that are asked for."""
    return Layout(pp=options.pp, cp=options.cp)


def plan_model(options: Options) -> ModelPlan:
    """Which model to load, and how to use it; what was given of a video is not looked at."""
    name, config = _model(options)
    stage_sizes(config, options.pp, options.split)  # says whether the stages fit
    if (heads := config.model_config.num_query_groups) % options.cp:
        raise InputError(f"--cp {options.cp} does not divide the model's {heads} key heads")
    config = _changed(config, options)
    num_steps = options.steps or config.runtime_config.num_steps
    sampling = MagiSampling(config=config, num_steps=num_steps)  # says whether the steps fit
    if config.runtime_config.t5_pretrained is None or _random(options):
        _check_no_text_options(options, name)
    figures = POCKET_FIGURES if config.runtime_config.t5_pretrained is None else MAGI_1_FIGURES
    reuse = reuse_settings(options, figures, num_steps=num_steps, guided=sampling.guided)
    attention_backend(options.attention)  # says whether it can run here
    random = _random(options)
    if not random:
        _check_weights(options, config, name)
    source = MagiSource(
        config=config,
        random=random,
        weights=None if random else options.weights,
        text=TextLoading(
            tokens=options.special_tokens,
            device=options.t5_device,
            dtype=options.t5_dtype,
            special=_special(options.special),
            negative=options.negative,
            cache=options.prompt_cache or prompt_cache(),
        ),
        copy_weight=COPY_WEIGHT if options.copy_weight is None else options.copy_weight,
        split=options.split,
        precise=options.precision == "reference",
        attention=options.attention,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = options.cache or figures.default
    return ModelPlan(name=name, source=source, device=device, cache=cache, reuse=reuse, kv=kv_settings(options))


def plan_videos(options: Options) -> list[Plan]:
    """A plan for each prompt. No weights are read.

    One prompt's video goes to the file `out`. Of several, the n-th has the seed plus n, a file in the folder `out`, and
    a record in a sub-folder of its own; what it starts from, if anything, is the same for all.
    """
    prompts = options.prompts
    if options.record is not None:
        check_folder(options.record)
    if options.trace is not None:
        check_target(options.trace, suffix=".json", what="trace")
    if len(prompts) == 1:
        out = options.out or Path("video.mp4")
        check_target(out, suffix=".mp4", what="video")
        return plan_requests(options, [out])
    folder, names = options.out or Path("videos"), video_names(prompts)
    if folder.suffix.lower() == ".mp4":
        raise InputError(f"--out {folder} names one video, but there are {len(prompts)} prompts: give a folder")
    check_folder(folder)
    outs = [folder / f"{name}.mp4" for name in names]
    if taken := next((path for path in outs if path.exists() and not path.is_file()), None):
        raise InputError(f"cannot write {taken}: there is something of that name that is not a file")
    plans = plan_requests(options, outs)
    if options.record is None:
        return plans
    return [replace(plan, record=options.record / name) for plan, name in zip(plans, names, strict=True)]


def plan_requests(options: Options, outs: Sequence[Path]) -> list[Plan]:
    """A plan for each prompt, with the seeds of several; `outs` are their files, which are not looked at."""
    if not options.prompts:
        raise InputError("there is no prompt: say what the video shows")
    first = plan_video(options, out=outs[0], at_a_time=together(options, len(options.prompts)))
    text = replace(first.model.source.text, prompts=tuple(options.prompts))
    first = replace(first, model=replace(first.model, source=replace(first.model.source, text=text)))
    plans = []
    for place, (prompt, out) in enumerate(zip(options.prompts, outs, strict=True)):
        _check_prompt(first.model.config, prompt)
        request = replace(first.request, prompt=prompt, seed=options.seed + place)
        plans.append(replace(first, request=request, out=out))
    return plans


def plan_video(options: Options, *, out: Path, at_a_time: int = 1) -> Plan:
    """Check the options of one video, of the first prompt, and read the picture or the clip that it starts from.

    There must be memory for `at_a_time` such videos. The file `out` is not looked at.
    """
    if options.image is not None and options.video is not None:
        raise InputError("--image and --video both say what to start from: give one of them")
    model = plan_model(options)
    config, runtime = model.config, model.config.runtime_config
    request = Request(
        prompt=options.prompts[0],
        chunks=_chunks(options, config),
        height=options.height or runtime.video_size_h,
        width=options.width or runtime.video_size_w,
        num_steps=options.steps or runtime.num_steps,
        seed=options.seed,
    )
    _check_prompt(config, request.prompt)
    plan = Plan(options=options, model=model, request=request, out=out, record=options.record)
    if not runtime.noise2clean_kvrange and model.kv.budget is None:
        raise InputError(
            f"{model.name} looks back at the whole video (noise2clean_kvrange is empty), so that {request.chunks:,} "
            f"chunks hold {plan.size.kv_bytes / 1e9:,.1f} GB of keys and values: give --kv-budget CHUNKS"
        )
    if options.launcher != "ray" or (model.device == "cpu" and not ray_address()):  # whose ranks may be anywhere
        job(plan, at_a_time).check(model.device)
    return replace(plan, request=replace(request, prefix=_prefix(options, request, fps=runtime.fps)))


def job(plan: Plan, videos: int = 1) -> Job:
    """What takes memory when so many such videos are made at a time."""
    model, options = plan.model, plan.options
    if model.source.random:
        folder = None
    else:
        folder = find_files(model.config, options.weights, tokens=options.special_tokens).vae
    return Job(
        config=model.config,
        vae_bytes=vae_bytes(model.config, folder),
        request=plan.request,
        reuse=model.reuse,
        kv=model.kv,
        layout=layout_of(options),
        split=options.split,
        videos=videos,
    )


def slug(text: str) -> str:
    """A text as part of a file name: its small letters and digits, with dashes between them; may be empty."""
    return re.sub(r"[\W_]+", "-", text.lower())[:_LETTERS].strip("-")


def video_names(prompts: Sequence[str]) -> list[str]:
    """Names without endings, such as `00-a-red-circle`: the place, and the prompt's letters and digits."""
    digits = max(2, len(str(len(prompts) - 1)))
    names = []
    for place, prompt in enumerate(prompts):
        words = slug(prompt)
        names.append(f"{place:0{digits}}-{words}" if words else f"{place:0{digits}}")
    return names


def _check_prompt(config: MagiConfig, prompt: str) -> None:
    if config.runtime_config.t5_pretrained is None:  # it has a fixed vocabulary
        parse_prompt(prompt)


def _model(options: Options) -> tuple[str, MagiConfig]:
    """Which model is meant, in a word, and its configuration."""
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    if options.config is not None:
        return str(options.config), MagiConfig.from_json(options.config)
    if options.model is None and options.weights is not None and not _random(options):
        config = recognise(options.weights)
        preset = preset_of(config)
        return str(options.weights) if preset is None else preset.name, config
    name = options.model or POCKET
    return name, find_preset(name).config()


def _random(options: Options) -> bool:
    """Random weights are asked for, and not a folder of that name."""
    return options.weights == Path("random") and not Path("random").exists()


def _changed(config: MagiConfig, options: Options) -> MagiConfig:
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
    changes = _given(options, {"fps": "fps", "window": "window_size"})
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


def _check_no_text_options(options: Options, name: str) -> None:
    for option in ("special", "special_tokens", "t5_device", "t5_dtype", "prompt_cache"):
        if getattr(options, option) is not None or options.negative:
            flag = "negative" if options.negative else option.replace("_", "-")
            raise InputError(f"--{flag} is for models that read prompts with T5, {name} does not: leave it out")


def _special(text: str | None) -> tuple[SpecialToken, ...]:
    """Names of special tokens, of a text such as `HQ,3D`."""
    if text is None:
        return SPECIAL
    known = get_args(SpecialToken)
    names = [] if text == "none" else text.upper().split(",")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--special {text}: {unknown[0]!r} is not known: choose from {', '.join(known)}, or none")
    return tuple(name for name in known if name in names)


def _chunks(options: Options, config: MagiConfig) -> int:
    """Length in chunks; seconds are rounded up, as the released code rounds frames (specification 7.1)."""
    if options.seconds is not None and options.chunks is not None:
        raise InputError("--seconds and --chunks both say how long the video is: give one of them")
    if options.chunks is not None:
        return options.chunks
    runtime = config.runtime_config
    chunk_frames = runtime.chunk_width * runtime.temporal_downsample_factor
    if options.seconds is None:
        return math.ceil(runtime.num_frames / chunk_frames)
    # To a thousandth of a frame, so that 2.1 s at 10 frames per second is 21 frames and not a hair more.
    return math.ceil(round(options.seconds * runtime.fps, 3) / chunk_frames)


def _check_weights(options: Options, config: MagiConfig, name: str) -> None:
    """Say at once what of the files is not there; what is in them is checked when they are loaded."""
    load = config.runtime_config.load
    if options.weights is None and load is not None and not Path(load).is_dir():
        folder = None if options.config is not None else find_preset(name).folder
        where = "" if folder is None else f"download {folder} from huggingface.co/sand-ai/MAGI-1 to there, or "
        raise InputError(f"{name} has no weights in {load}: {where}give their folder with --weights")
    find_files(config, options.weights, tokens=options.special_tokens)


def _prefix(options: Options, request: Request, *, fps: int) -> Prefix | None:
    height, width = request.height, request.width
    if options.image is not None:
        return Prefix(frames=read_image(options.image, height=height, width=width))
    if options.video is not None:
        return Prefix(frames=read_video(options.video, fps=fps, height=height, width=width))
    return None


# ---- presets of reuse, and the KV buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFigures:
    """What the presets of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    default: CacheName  # what holds where no preset is asked for
    reuse: ReuseKind  # stands in for a step that is left out; docs/reuse.md has the figures
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated in place of that; 1 never


# As published (FlowCache, below Eq. 8). Extrapolation was measured on magi-pocket only.
MAGI_1_FIGURES = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01, default="none", reuse="residual")
# Thresholds for 16 steps; benchmarks.quality measures what they mean.
POCKET_FIGURES = ReuseFigures(
    warmup_steps=3, slow=0.0629, fast=0.0994, teacache=0.0657, default="flowcache-slow", reuse="extrapolate"
)
# Options that change a figure of a preset, and that figure.
_CHANGES = {"cache_threshold": "threshold", "cache_warmup": "warmup_steps"} | {
    name: name for name in ("reuse", "extrapolate_from", "distance")
}


def reuse_preset(name: CacheName, figures: ReuseFigures) -> ReuseSettings:
    """What a name of `--cache` stands for with a model's figures.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both.
    """
    if name == "none":
        return ReuseSettings()
    return ReuseSettings(
        policy=name.partition("-")[0],
        threshold={"flowcache-slow": figures.slow, "flowcache-fast": figures.fast}.get(name, figures.teacache),
        warmup_steps=figures.warmup_steps,
        reuse=figures.reuse,
        extrapolate_from=figures.extrapolate_from,
        clean_pass=False,
        copy_pass=False,
    )


def reuse_settings(options: Options, figures: ReuseFigures, *, num_steps: int, guided: bool) -> ReuseSettings:
    """The preset that was asked for, with what was given on top of it; a model with guidance has no copy pass."""
    changes = _given(options, _CHANGES)
    cache = options.cache or figures.default
    if cache == "none" and changes:
        names = " and ".join("--" + option.replace("_", "-") for option, name in _CHANGES.items() if name in changes)
        raise InputError(f"--cache none reuses nothing: leave out {names}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
    settings = reuse_preset(cache, figures)
    warmup = options.cache_warmup
    if warmup is not None and settings.policy == "flowcache" and warmup >= num_steps:  # teacache counts all ticks
        raise InputError(f"--cache-warmup {warmup} computes all {num_steps} steps: give less, or --cache none")
    passes = _given(options, {"clean_pass": "clean_pass", "copy_pass": "copy_pass"})
    return replace(settings, **changes, **passes)


def kv_settings(options: Options) -> KVSettings:
    """How much of the past is held, and how it is cut down. An `InputError` says which options do not fit."""
    chosen = _given(options, {"kv_retention": "retention", "kv_queries": "queries"})
    if options.kv_budget is None and chosen:
        name = f"--kv-{next(iter(chosen))}"
        raise InputError(f"{name} says how the past is compressed: give --kv-budget CHUNKS with it, or leave it out")
    return KVSettings(budget=options.kv_budget, selection=SelectionSettings(**chosen))


def _given(options: Options, names: Mapping[str, str]) -> dict[str, Any]:
    """Values of those options that were given, under other names."""
    values = {name: getattr(options, option) for option, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}
