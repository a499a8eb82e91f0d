"""From options to a video file: plan, load, generate, and encode meanwhile; a record of the run if one is wanted.

It knows files and the engine's front; how a video is denoised is the engine's business.
"""

from __future__ import annotations

import time

import torch

from engine.engine import Engine, Progress
from engine.record import RunTrace
from launch.plan import Options, Plan, plan_video
from launch.progress import Display, open_display
from launch.recording import record_settings
from launch.summary import Summary, peak_memory
from launch.video import BackgroundWriter, VideoWriter
from models.errors import InputError
from models.loading import load_magi

__all__ = ["generate_video"]


def generate_video(options: Options) -> Summary:
    """Make the video that the options ask for, with progress on standard error.

    Raises:
        InputError: something given cannot be used, or the disk or the GPU is full. There is no file then, unless it is
            the record alone that could not be written.
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


class _Watch:
    """Passes events on to a display and remembers the last one."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.computed, self.kv_bytes = 1.0, 0

    def __call__(self, progress: Progress) -> None:
        self.computed, self.kv_bytes = progress.computed_fraction, progress.kv_bytes
        self._display.update(progress)


def _run(plan: Plan, display: Display) -> Summary:
    request, fps = plan.request, plan.config.runtime_config.fps
    began = time.monotonic()
    display.phase(f"loading {plan.name}")
    engine = Engine(load_magi(plan.config, plan.weights, plan.loading), plan.cache, plan.kv)
    loaded = time.monotonic()
    display.phase("reading the prompt" if request.prefix is None else "reading the prompt and what to start from")
    writer = VideoWriter(plan.out, fps=fps, height=request.height, width=request.width)
    watch, trace = _Watch(display), None if plan.record is None else RunTrace()
    chunks = frames = 0
    with BackgroundWriter(writer) as sink:
        for chunk in engine.generate(request, watch, trace):
            sink.write(chunk.frames)
            chunks, frames = chunks + 1, frames + len(chunk.frames)
    summary = Summary(
        out=plan.out,
        frames=frames,
        fps=fps,
        height=request.height,
        width=request.width,
        chunks=chunks,
        loading=loaded - began,
        making=time.monotonic() - loaded,
        computed=watch.computed,
        cache_name=plan.cache_name,
        kv_bytes=watch.kv_bytes,
        memory=peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )
    if plan.record is not None and trace is not None:
        trace.finish(record_settings(plan, summary)).save(plan.record)
    return summary
