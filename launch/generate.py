"""From options to a video file: check everything that can be checked, load, generate, and encode meanwhile.

It knows files, presets and the engine's front; how a video is denoised is the engine's business.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.engine import Engine
from engine.request import Prefix, Request
from launch.media import read_image, read_video
from launch.presets import find_preset
from launch.progress import Display, open_display
from launch.video import BackgroundWriter, VideoWriter, check_target
from models.attention import attention_backend
from models.errors import InputError
from models.magi.config import MagiConfig
from models.loading import Loading, load_magi
from models.magi.sampling import MagiSampling
from models.pocket.words import parse_prompt

__all__ = ["DEFAULT_MODEL", "Options", "Plan", "Summary", "generate_video", "plan_video"]

DEFAULT_MODEL = "magi-pocket"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What was given on the command line; None where nothing was."""

    prompt: str
    out: Path
    seed: int = 0
    model: str | None = None
    seconds: float | None = None
    chunks: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    image: Path | None = None
    video: Path | None = None
    config: Path | None = None
    weights: Path | None = None
    attention: str = "sdpa"
    precise: bool = True
    threads: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Checked options: what to load, what to make, and where to put it.

    Attributes:
        name: of the model, for people.
        config: of the model.
        weights: folder in place of the configured one.
        request: the video.
        out: the file.
        loading: device, precision, attention.
    """

    name: str
    config: MagiConfig
    weights: Path | None
    request: Request
    out: Path
    loading: Loading


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What was made and what it cost.

    Attributes:
        out: the file.
        frames: frames in it.
        fps: frames per second.
        height: pixels.
        width: pixels.
        chunks: chunks made.
        loading: seconds to load the model.
        making: seconds from the loaded model to the finished file.
        memory: peak of the process, bytes.
        gpu_memory: peak of tensors on the GPU, bytes; None without one.
    """

    out: Path
    frames: int
    fps: int
    height: int
    width: int
    chunks: int
    loading: float
    making: float
    memory: int
    gpu_memory: int | None

    def text(self) -> str:
        """Two lines for people."""
        peak = f"{self.memory / 1e9:.2f} GB"
        if self.gpu_memory is not None:
            peak += f", on the GPU {self.gpu_memory / 1e9:.2f} GB"
        return (
            f"{self.out}: {self.frames} frames of {self.width}x{self.height}, {self.frames / self.fps:.1f} s of video\n"
            f"made in {self.making:.1f} s, {self.making / self.chunks:.2f} s per chunk, "
            f"after {self.loading:.1f} s of loading; peak memory {peak}"
        )


def plan_video(options: Options) -> Plan:
    """Check options, and read the picture or the clip that the video starts from. No weights are read.

    Raises:
        InputError: something cannot be used.
    """
    if options.config is not None and options.model is not None:
        raise InputError("--model and --config both name a model: give one of them")
    if options.image is not None and options.video is not None:
        raise InputError("--image and --video both say what to start from: give one of them")
    check_target(options.out)
    config = _config(options)
    runtime = config.runtime_config
    request = Request(
        prompt=options.prompt,
        chunks=_chunks(options, config),
        height=runtime.video_size_h if options.height is None else options.height,
        width=runtime.video_size_w if options.width is None else options.width,
        num_steps=runtime.num_steps if options.steps is None else options.steps,
        seed=options.seed,
    )
    MagiSampling(config=config, num_steps=request.num_steps)  # says whether the steps fit
    attention_backend(options.attention)  # says whether it can run here
    if runtime.t5_pretrained is None:
        parse_prompt(options.prompt)
    _check_weights(options, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(
        name=_name(options),
        config=config,
        weights=options.weights,
        request=replace(request, prefix=_prefix(options, request, fps=runtime.fps)),
        out=options.out,
        loading=Loading(device=device, precise=options.precise, attention=options.attention),
    )


def generate_video(options: Options) -> Summary:
    """Make the video that the options ask for, with progress on standard error.

    Raises:
        InputError: something given cannot be used, or the disk or the GPU is full. There is no file then.
    """
    plan = plan_video(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with open_display() as display:
            return _run(plan, display)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{plan.name} at {plan.request.width}x{plan.request.height} does not fit into the GPU's memory: "
            "ask for a smaller --height and --width, or for a quantised model"
        ) from None


def _run(plan: Plan, display: Display) -> Summary:
    request, fps = plan.request, plan.config.runtime_config.fps
    began = time.monotonic()
    display.phase(f"loading {plan.name}")
    pipeline = load_magi(plan.config, plan.weights, plan.loading)
    loaded = time.monotonic()
    display.phase("reading the prompt" if request.prefix is None else "reading the prompt and what to start from")
    writer = VideoWriter(plan.out, fps=fps, height=request.height, width=request.width)
    chunks = frames = 0
    with BackgroundWriter(writer) as sink:
        for chunk in Engine(pipeline).generate(request, display.update):
            sink.write(chunk.frames)
            chunks, frames = chunks + 1, frames + len(chunk.frames)
    return Summary(
        out=plan.out,
        frames=frames,
        fps=fps,
        height=request.height,
        width=request.width,
        chunks=chunks,
        loading=loaded - began,
        making=time.monotonic() - loaded,
        memory=_peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def _config(options: Options) -> MagiConfig:
    if options.config is not None:
        return MagiConfig.from_json(options.config)
    return find_preset(options.model or DEFAULT_MODEL).config()


def _name(options: Options) -> str:
    return str(options.config) if options.config is not None else options.model or DEFAULT_MODEL


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
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise InputError(f"a video of {options.seconds:g} seconds has no frames: ask for more than 0")
    # To a thousandth of a frame, so that 2.1 s at 10 frames per second is 21 frames and not a hair more.
    return math.ceil(round(options.seconds * runtime.fps, 3) / chunk_frames)


def _check_weights(options: Options, config: MagiConfig) -> None:
    """Say at once that there are no weights; what is in the folder is checked when they are loaded."""
    if options.weights is not None:
        if not options.weights.is_dir():
            raise InputError(f"cannot read the weights: there is no folder {options.weights}")
        return
    load = config.runtime_config.load
    if load is None or Path(load).is_dir():
        return
    source = None if options.config is not None else find_preset(options.model or DEFAULT_MODEL).folder
    where = "" if source is None else f"download {source} from huggingface.co/sand-ai/MAGI-1 to there, or "
    raise InputError(f"{_name(options)} has no weights in {load}: {where}give their folder with --weights")


def _prefix(options: Options, request: Request, *, fps: int) -> Prefix | None:
    size = {"height": request.height, "width": request.width}
    if options.image is not None:
        return Prefix(frames=read_image(options.image, **size))
    if options.video is not None:
        return Prefix(frames=read_video(options.video, fps=fps, **size))
    return None


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kilobytes elsewhere
