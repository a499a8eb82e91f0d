"""Where the events of videos go: into files, onto the display and into records. An unfinished video leaves nothing.

It knows files and events; who makes the chunks is not its business.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from engine.record import Recorder
from launch.ending import CommandFailed
from launch.output.display import Display
from launch.output.media import BackgroundWriter, VideoWriter
from launch.output.summary import Summary, peak_memory, record_settings
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

    Args:
        plans: of the videos, in order; events call them by their place, "0" for the first.
        recorders: of their runs; None where no record is wanted.
        display: where progress is shown.
        began: when loading began, by the monotonic clock.
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
        """Put what an event brings where it belongs.

        Raises:
            InputError: a file cannot be written.
            CommandFailed: a video failed.
        """
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
