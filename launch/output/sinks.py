"""Videos in the making: each has its file, its progress, and its record; what is not complete leaves nothing behind.

It knows files and the engine's events; who makes the chunks is not its business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from engine.decoder import Chunk
from engine.progress import Progress
from engine.record import Recorder
from launch.output.progress import Display
from launch.output.summary import Summary, peak_memory
from launch.output.video import BackgroundWriter, VideoWriter
from launch.plan import Plan
from launch.recording import record_settings
from models.errors import InputError


@dataclass(slots=True)
class Video:
    """One video in the making; called with the engine's progress."""

    index: int  # its place among the prompts
    plan: Plan  # what it is to be
    trace: Recorder | None  # for its record; None for none
    display: Display  # where progress is shown
    sink: BackgroundWriter | None = None
    began: float = 0.0
    chunks: int = 0
    frames: int = 0
    computed: float = 1.0
    kv_bytes: int = 0

    def __call__(self, progress: Progress) -> None:
        """Take an event of the engine."""
        self.computed, self.kv_bytes = progress.computed_fraction, progress.kv_bytes
        self.display.update(progress, self.index)


class VideoSinks:
    """All videos of a command, as a context: after an error, those that are not complete leave nothing behind.

    Args:
        plans: of the videos, in order.
        display: where progress is shown.
        traces: what is told of each run; None where nothing is.
        loading: seconds that loading the model took.
    """

    def __init__(
        self, plans: Sequence[Plan], display: Display, traces: Sequence[Recorder | None], loading: float
    ) -> None:
        self._display, self._loading = display, loading
        self._several = len(plans) > 1
        self.videos = [
            Video(index, plan, trace, display) for index, (plan, trace) in enumerate(zip(plans, traces, strict=True))
        ]
        self._summaries: dict[int, Summary] = {}
        self._made_folder: Path | None = None
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        folder = self.videos[0].plan.out.parent
        if self._several and not folder.exists():
            folder.mkdir(parents=True)
            self._made_folder = folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for video in self.videos:
            if video.sink is not None:
                with suppress(InputError):  # it has been said already
                    video.sink.__exit__(kind or _Unfinished, error, trace)
                video.sink = None
        if kind is None or not self._several:
            return
        if self._made_folder is not None and not self._summaries:
            with suppress(OSError):
                self._made_folder.rmdir()
        missing = [video.plan.out.name for video in self.videos if video.index not in self._summaries]
        if missing:
            folder = self.videos[0].plan.out.parent
            whole = f"{len(self._summaries)} of {len(self.videos)} videos in {folder} are complete"
            self._display.end(-1, f"{whole}; missing: {', '.join(missing)}")

    @property
    def summaries(self) -> list[Summary]:
        """Of the videos that are complete, in order."""
        return [self._summaries[index] for index in sorted(self._summaries)]

    def begin(self, index: int) -> Video:
        """Open a video's file."""
        video = self.videos[index]
        plan = video.plan
        writer = VideoWriter(
            plan.out, fps=plan.config.runtime_config.fps, height=plan.request.height, width=plan.request.width
        )
        video.began = time.monotonic()
        if self._several:
            self._display.begin(index, plan.out.stem)
        video.sink = BackgroundWriter(writer).__enter__()
        return video

    def write(self, index: int, chunk: Chunk) -> None:
        """Take a chunk."""
        video = self.videos[index]
        assert video.sink is not None and chunk.frames is not None
        video.sink.write(chunk.frames)
        video.chunks, video.frames = video.chunks + 1, video.frames + len(chunk.frames)

    def end(self, index: int) -> None:
        """A video has all of its chunks: its file and its record appear."""
        video = self.videos[index]
        assert video.sink is not None
        sink, video.sink = video.sink, None
        sink.__exit__(None, None, None)
        plan = video.plan
        summary = Summary(
            out=plan.out,
            frames=video.frames,
            fps=plan.config.runtime_config.fps,
            height=plan.request.height,
            width=plan.request.width,
            chunks=video.chunks,
            loading=self._loading,
            making=time.monotonic() - video.began,
            computed=video.computed,
            cache_name=plan.cache_name,
            kv_bytes=video.kv_bytes,
            memory=peak_memory(),
            gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        )
        self._summaries[index] = summary
        if self._several:
            self._display.end(index, f"{plan.out} is complete ({len(self._summaries)} of {len(self.videos)})")
        if plan.record is not None and video.trace is not None:
            video.trace.finish(record_settings(plan, summary)).save(plan.record)


class _Unfinished(Exception):  # noqa: N818 - told to a writer whose video was not completed
    pass
