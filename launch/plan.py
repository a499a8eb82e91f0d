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
from typing import Any

import torch

from engine.files import check_folder, check_target
from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.request import Prefix, Request
from engine.reuse.policy import ReuseSettings
from launch.media import read_image, read_video
from launch.options import CacheName, Options, ReuseKind, together
from models.attention import attention_backend
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.presets import find_preset
from models.magi.sampling import MagiSampling
from models.pocket.text import parse_prompt
from parallel.cluster.config import MagiSource, video_size
from parallel.cluster.messages import VideoOrder
from parallel.cluster.scheduler import VideoSize
from parallel.mesh import Layout, stage_sizes

_LETTERS = 40  # of a prompt in a name; file systems take 255 bytes
_STREAMS = 4  # copies of the hidden states that a layer holds at once: input, normed, attention's, output
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
DEFAULT_MODEL = "magi-pocket"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """Which model to load, and how the engine uses it: what every rank must know."""

    name: str  # for people
    source: MagiSource  # what each rank loads its part of
    device: str  # where to, without ranks
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
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    name = str(options.config or options.model or DEFAULT_MODEL)
    config = find_preset(name).config() if options.config is None else MagiConfig.from_json(options.config)
    stage_sizes(config, options.pp, options.split)  # says whether the stages fit
    if (heads := config.model_config.num_query_groups) % options.cp:
        raise InputError(f"--cp {options.cp} does not divide the model's {heads} key heads")
    num_steps = options.steps or config.runtime_config.num_steps
    sampling = MagiSampling(config=config, num_steps=num_steps)  # says whether the steps fit
    reuse = reuse_settings(options, num_steps=num_steps, guided=sampling.guided)
    attention_backend(options.attention)  # says whether it can run here
    _check_weights(options, config, name)
    source = MagiSource(
        config=config,
        weights=options.weights,
        split=options.split,
        precise=options.precision == "reference",
        attention=options.attention,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ModelPlan(name=name, source=source, device=device, reuse=reuse, kv=kv_settings(options))


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
    if model.device == "cpu" and options.launcher != "ray":  # whose ranks may be anywhere
        what = f"a video of {request.width}x{request.height} pixels and {request.chunks:,} chunks"
        check_memory(what if at_a_time == 1 else f"{what}, {at_a_time} at a time,", at_a_time * bytes_needed(plan))
    return replace(plan, request=replace(request, prefix=_prefix(options, request, fps=runtime.fps)))


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
    """Say at once that there are no weights; what is in the folder is checked when they are loaded."""
    if options.weights is not None:
        if not options.weights.is_dir():
            raise InputError(f"cannot read the weights: there is no folder {options.weights}")
        return
    load = config.runtime_config.load
    if load is None or Path(load).is_dir():
        return
    source = None if options.config is not None else find_preset(name).folder
    where = "" if source is None else f"download {source} from huggingface.co/sand-ai/MAGI-1 to there, or "
    raise InputError(f"{name} has no weights in {load}: {where}give their folder with --weights")


def _prefix(options: Options, request: Request, *, fps: int) -> Prefix | None:
    height, width = request.height, request.width
    if options.image is not None:
        return Prefix(frames=read_image(options.image, height=height, width=width))
    if options.video is not None:
        return Prefix(frames=read_video(options.video, fps=fps, height=height, width=width))
    return None


# ---- memory


def free_bytes() -> int | None:
    """Bytes of memory that this process may still take, swap included; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        free = sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def bytes_needed(plan: Plan) -> int:
    """Bytes that a video takes on the rank that holds most layers: its KV, and what a pass through a layer works with.

    A rough lower bound, since weights and the autoencoder come on top.
    """
    request, config = plan.request, plan.model.config
    model = config.model_config
    width = _STREAMS * model.hidden_size + model.ffn_hidden_size
    working = config.chunk_tokens(request.height, request.width) * width * model.dtype.itemsize
    return plan.size.kv_bytes + math.ceil(working / plan.options.cp)


def check_memory(what: str, needed: int) -> None:
    """See that the machine has so many bytes of memory; if not, an `InputError` says both figures."""
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{what} needs {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            "ask for a smaller --height and --width, or a --kv-budget"
        )


# ---- presets of reuse, and the KV buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFigures:
    """What the presets of one model are made of."""

    warmup_steps: int  # m, a chunk's first steps, which are computed
    slow: float  # threshold of `flowcache-slow`
    fast: float  # threshold of `flowcache-fast`
    teacache: float  # threshold of `teacache`
    reuse: ReuseKind = "extrapolate"  # stands in for a step that is left out; docs/reuse.md has the figures
    extrapolate_from: float = 1.0  # share of the threshold above which a step is extrapolated in place of that; 1 never


_MAGI_1 = ReuseFigures(warmup_steps=5, slow=0.01, fast=0.015, teacache=0.01)  # FlowCache, below Eq. 8

# Models with figures of their own, and not those of MAGI-1. magi-pocket's thresholds are for 16 steps;
# benchmarks.quality measures what they mean.
REUSE_FIGURES = {"magi-pocket": ReuseFigures(warmup_steps=3, slow=0.0629, fast=0.0994, teacache=0.0657)}
# Options that change a figure of a preset, and that figure.
_CHANGES = {"cache_threshold": "threshold", "cache_warmup": "warmup_steps"} | {
    name: name for name in ("reuse", "extrapolate_from")
}


def reuse_preset(name: CacheName, model: str | None) -> ReuseSettings:
    """What a name of `--cache` stands for.

    The published runs with reuse leave out the clean pass and the copy pass, and so do the presets; a run without
    reuse has both. A configuration file (`model` None) is one of MAGI-1.
    """
    if name == "none":
        return ReuseSettings()
    figures = REUSE_FIGURES.get(model or "", _MAGI_1)
    return ReuseSettings(
        policy=name.partition("-")[0],
        threshold={"flowcache-slow": figures.slow, "flowcache-fast": figures.fast}.get(name, figures.teacache),
        warmup_steps=figures.warmup_steps,
        reuse=figures.reuse,
        extrapolate_from=figures.extrapolate_from,
        clean_pass=False,
        copy_pass=False,
    )


def reuse_settings(options: Options, *, num_steps: int, guided: bool) -> ReuseSettings:
    """The preset that was asked for, with what was given on top of it; a model with guidance has no copy pass."""
    changes = _given(options, _CHANGES)
    if options.cache == "none" and changes:
        names = " and ".join("--" + option.replace("_", "-") for option, name in _CHANGES.items() if name in changes)
        raise InputError(f"--cache none reuses nothing: leave out {names}, or choose another --cache")
    if options.copy_pass and guided:
        raise InputError("--copy-pass is for distilled models, this one has guidance: leave it out")
    settings = reuse_preset(options.cache, None if options.config is not None else options.model or DEFAULT_MODEL)
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
