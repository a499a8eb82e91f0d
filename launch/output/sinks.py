"""Where the events of videos go: files, display, records and summaries. An unfinished video leaves nothing.

It knows files and events; who makes the chunks is not its business.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from engine.record import Recorder
from launch import __version__
from launch.ending import CommandFailed
from launch.options import Options
from launch.output.display import Display
from launch.output.media import BackgroundWriter, VideoWriter
from launch.plan import Plan
from models.errors import InputError
from parallel.cluster.messages import (
    Admitted,
    ChunkMade,
    Event,
    GangLost,
    GangReady,
    Progressed,
    VideoDone,
    VideoFailed,
)
from parallel.health.errors import FAILED
from parallel.topology.split import stage_sizes
from parallel.trace.counters import RankCounters

_TRANSFERS = {
    "nccl": "over NCCL",
    "host": "through host memory, as not every rank has a GPU of its own",
    "gloo": "over gloo",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What was made and what it cost."""

    plan: Plan  # that it was made of; its `out` is the file
    frames: int  # frames in it
    chunks: int  # chunks made
    loading: float  # seconds to load the model
    making: float  # seconds from the loaded model, or from the video's own start, to the finished file
    computed: float  # computed chunk-steps as a share of all
    kv_bytes: int  # size of the KV buffers; on ranks, of the leader's part
    memory: int  # peak of the process, bytes; on ranks, of the leader
    gpu_memory: int | None  # peak of tensors on the GPU, bytes; None without one
    ranks: str | None = None  # a line on the ranks that made it; None for this process alone

    def text(self) -> str:
        """Three lines for people, and one more for ranks."""
        return summary_text([self], making=self.making)

    def headline(self) -> str:
        """What was made, in a line."""
        size = f"{self.plan.request.width}x{self.plan.request.height}"
        seconds = self.frames / self.plan.model.config.runtime_config.fps
        return f"{self.plan.out}: {self.frames} frames of {size}, {seconds:.1f} s of video"


def summary_text(summaries: Sequence[Summary], *, making: float) -> str:
    """One video's summary, or a line for each of several and what they cost together, in `making` seconds."""
    last, chunks = summaries[-1], sum(one.chunks for one in summaries)
    if len(summaries) == 1:
        made, making = "made", last.making
    else:
        made = f"{len(summaries)} videos made"
    cost = f"{made} in {making:.1f} s, {making / chunks:.2f} s per chunk, after {last.loading:.1f} s of loading"
    computed = sum(one.computed * one.chunks for one in summaries) / chunks
    steps = f"{computed:.0%} of the steps computed ({last.plan.options.cache}); {_memory(last)}"
    return "\n".join([*(one.headline() for one in summaries), cost, steps])


def rank_line(options: Options, counters: Sequence[RankCounters]) -> str:
    """A line on the ranks that made videos."""
    first = sorted((one for one in counters if one.cp_rank == 0), key=lambda one: one.stage)
    layers = ",".join(str(one.layers[1] - one.layers[0]) for one in first)
    loading = [one.load_seconds for one in counters]
    return (
        f"{len(counters)} rank{'s' if len(counters) > 1 else ''}, pp {options.pp} x cp {options.cp}, layers {layers}; "
        f"weights {', '.join(_size(one.weight_bytes) for one in counters)}, "
        f"loaded in {min(loading):.1f} to {max(loading):.1f} s; tensors moved {_TRANSFERS[counters[0].transfer]}"
    )


def _memory(summary: Summary) -> str:
    """What was held; figures of a process are those of the leader where there are ranks."""
    peak = _size(summary.memory)
    if summary.gpu_memory is not None:
        peak += f", on the GPU {_size(summary.gpu_memory)}"
    text = f"keys and values {_size(summary.kv_bytes)}, peak memory {peak}"
    return text if summary.ranks is None else f"on the leader {text}\n{summary.ranks}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def peak_memory() -> int:
    """Largest size that this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kilobytes elsewhere


def record_settings(summary: Summary) -> dict[str, Any]:
    """Settings and totals of a finished run, as plain JSON values; docs/records.md lists them."""
    plan = summary.plan
    request, options, config = plan.request, plan.options, plan.model.config
    return {
        "version": __version__,
        "model": plan.model.name,
        "prompt": request.prompt,
        "seed": request.seed,
        "chunks": request.chunks,
        "prefix_frames": 0 if request.prefix is None else len(request.prefix.frames),
        "height": request.height,
        "width": request.width,
        "steps": request.num_steps,
        "window": config.runtime_config.window_size,
        "device": str(plan.model.loading.device),
        "pp": options.pp,
        "cp": options.cp,
        "layers": list(stage_sizes(config, options.pp, options.split)),
        "cache_preset": options.cache.value,
        "cache": asdict(plan.model.reuse),
        "kv": asdict(plan.model.kv),
        "computed_fraction": summary.computed,
        "kv_bytes": summary.kv_bytes,
        "seconds": {"loading": summary.loading, "making": summary.making},
    }


# ---- the events


@dataclass(slots=True)
class _Video:
    """One video in the making."""

    plan: Plan
    recorder: Recorder | None  # for its record; None for none
    writer: BackgroundWriter | None = None
    began: float = 0.0
    chunks: int = 0
    frames: int = 0


class VideoSinks:
    """All videos of a command, as a context: after an error, those that are not complete leave nothing behind.

    Events call the videos by the place of their plan, "0" for the first. A recorder is None where no record is wanted.
    Loading began at `began`, by the monotonic clock.
    """

    def __init__(
        self, plans: Sequence[Plan], recorders: Sequence[Recorder | None], display: Display, began: float
    ) -> None:
        self._display, self._began = display, began
        self._videos = [_Video(plan, recorder) for plan, recorder in zip(plans, recorders, strict=True)]
        self._several = len(plans) > 1
        self._summaries: dict[int, Summary] = {}
        self._made_folder: Path | None = None
        self._ready: float | None = None
        self.making = 0.0  # seconds from the loaded model to the last file

    def __enter__(self) -> Self:
        folder = self._videos[0].plan.out.parent
        if self._several and not folder.exists():
            folder.mkdir(parents=True)
            self._made_folder = folder
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for video in self._videos:
            if video.writer is not None:
                with suppress(InputError):  # it has been said already
                    video.writer.__exit__(kind or InputError, None, None)
                video.writer = None
        if kind is None or not self._several:
            return
        if self._made_folder is not None and not self._summaries:
            with suppress(OSError):
                self._made_folder.rmdir()
        missing = [video.plan.out.name for index, video in enumerate(self._videos) if index not in self._summaries]
        if missing:
            folder = self._videos[0].plan.out.parent
            whole = f"{len(self._summaries)} of {len(self._videos)} videos in {folder} are complete"
            self._display.end(-1, f"{whole}; missing: {', '.join(missing)}")

    @property
    def summaries(self) -> list[Summary]:
        """Of the videos that are complete, in order."""
        return [self._summaries[index] for index in sorted(self._summaries)]

    def handle(self, event: Event) -> None:
        """Put what an event brings where it belongs; `InputError` if a file cannot be written."""
        match event:
            case GangReady() if self._ready is None:
                self._ready = time.monotonic()
                prefix = self._videos[0].plan.request.prefix
                self._display.phase("reading the prompt" + (" and what to start from" if prefix is not None else ""))
            case GangLost():
                self._display.phase(f"starting again: {event.message}")
            case VideoFailed():
                raise CommandFailed(event.message, status=FAILED, shown_here=True)
            case Admitted():
                self._begin(int(event.video))
            case Progressed():
                self._display.update(event.progress, int(event.video))
            case ChunkMade():
                self._write(int(event.video), event)
            case VideoDone():
                self._end(int(event.video), event)

    def _begin(self, index: int) -> None:
        """Open a video's file; it is open already if the video goes on after a loss."""
        video = self._videos[index]
        if video.writer is not None:
            return
        plan = video.plan
        fps = plan.model.config.runtime_config.fps
        writer = VideoWriter(plan.out, fps=fps, height=plan.request.height, width=plan.request.width)
        video.began = time.monotonic()
        self._display.begin(index, plan.out.stem if self._several else "")
        video.writer = BackgroundWriter(writer).__enter__()

    def _write(self, index: int, chunk: ChunkMade) -> None:
        video = self._videos[index]
        assert video.writer is not None
        video.writer.write(chunk.frames)
        video.chunks, video.frames = video.chunks + 1, video.frames + len(chunk.frames)

    def _end(self, index: int, done: VideoDone) -> None:
        """A video has all of its chunks: its file and its record appear."""
        video = self._videos[index]
        assert video.writer is not None and self._ready is not None
        writer, video.writer = video.writer, None
        writer.__exit__(None, None, None)
        plan = video.plan
        summary = Summary(
            plan=plan,
            frames=video.frames,
            chunks=video.chunks,
            loading=self._ready - self._began,
            making=time.monotonic() - video.began,
            computed=done.computed,
            kv_bytes=done.kv_bytes,
            memory=peak_memory(),
            gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        )
        self._summaries[index], self.making = summary, time.monotonic() - self._ready
        whole = f"{plan.out} is complete ({len(self._summaries)} of {len(self._videos)})"
        self._display.end(index, whole if self._several else "")
        if plan.record is not None and video.recorder is not None:
            video.recorder.finish(record_settings(summary)).save(plan.record)
