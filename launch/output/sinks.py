"""What is made of the events of videos: their files, progress, summaries and records.

Who makes the videos is not this file's business, nor how a file is written.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import torch

from engine.record import Recorder
from launch import __version__
from launch.ending import CommandFailed
from launch.output.display import Display, Summary
from launch.output.formats import FORMATS
from launch.output.video import BackgroundWriter, VideoWriter
from launch.plan import Plan
from launch.resume.saved import SavedVideo, saved_folder
from models.attention import backend_name
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import ChunkMade, Event, VideoDone, VideoOrder
from parallel.health.exit_codes import FAILED
from parallel.split import stage_sizes


@dataclass(slots=True)
class _Video:
    """One video in the making."""

    plan: Plan
    recorder: Recorder | None  # for its record; None for none
    saved: SavedVideo | None  # None if how far it is is not kept
    kept: int = 0  # chunks that were there
    writer: BackgroundWriter | None = None  # None before it begins
    summary: Summary | None = None  # None before its end
    began: float = 0.0
    chunks: int = 0

    @property
    def whole(self) -> bool:
        return self.writer is not None and self.writer.whole


class VideoSinks:
    """All videos of a command, as a context: after an error, those that are not complete leave nothing behind.

    Events call the videos by the place of their plan, "0" for the first. A recorder is None where no record is wanted.
    Loading began at `began`, by the monotonic clock.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        recorders: Sequence[Recorder | None],
        display: Display,
        began: float,
        stored: Callable[[str, int], None] = lambda video, count: None,  # is told of chunks on the disk, on any thread
    ) -> None:
        self._display, self._began, self._stored, self._stack = display, began, stored, ExitStack()
        self._videos: list[_Video] = []
        for plan, recorder in zip(plans, recorders, strict=True):
            folder = saved_folder(plan)
            saved = None if folder is None else SavedVideo(folder, plan, display.phase)
            self._videos.append(_Video(plan, recorder, saved))
        self._folder = plans[0].out.parent if len(plans) > 1 else None  # of several
        self._made_folder = False
        self._ready: float | None = None
        self.making = 0.0  # seconds from the loaded model to the last file

    def __enter__(self) -> Self:
        if self._folder is not None and not self._folder.exists():
            self._folder.mkdir(parents=True)
            self._made_folder = True
        with self._stack as stack:
            for video in self._videos:
                if video.saved is not None:
                    stack.enter_context(video.saved.taken())
            self._stack = stack.pop_all()
        return self

    def orders(self) -> list[VideoOrder]:
        """What is to be made of each video. The last chunk always is, as the file is made after it."""
        found = []
        for index, video in enumerate(self._videos):
            plan, saved, options = video.plan, video.saved, video.plan.options
            if saved is None:
                found.append(plan.order(str(index)))
                continue
            saved.discard_useless(options.checkpoint_every)
            video.kept = min(saved.segments.count(), plan.size.chunks - 1)
            order = saved.order(str(index), video.kept, every=options.checkpoint_every, extend=options.keep_state)
            found.append(order)
        return found

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for video in self._videos:
            if video.writer is not None:
                with suppress(InputError):  # it has been said already
                    video.writer.__exit__(InputError, InputError(), None)
        self._stack.close()
        if kind is None or self._folder is None:
            return
        if self._made_folder:
            with suppress(OSError):  # there are videos in it
                self._folder.rmdir()
        missing = [video.plan.out.name for video in self._videos if not video.whole]
        if missing:
            count = len(self._videos)
            text = f"{count - len(missing)} of {count} videos in {self._folder} are complete"
            self._display.end(-1, f"{text}; missing: {', '.join(missing)}")

    @property
    def summaries(self) -> list[Summary]:
        """Of the videos that are complete, in order."""
        return [video.summary for video in self._videos if video.summary is not None]

    def handle(self, event: Event) -> None:
        """Put what an event brings where it belongs; `InputError` if a file cannot be written."""
        match event:
            case messages.GangReady() if self._ready is None:
                self._ready = time.monotonic()
                prefix = self._videos[0].plan.request.prefix
                self._display.phase("reading the prompt" + (" and what to start from" if prefix is not None else ""))
            case messages.GangLost():
                self._display.phase(f"starting again: {event.message}")
            case messages.VideoFailed(disk=True):
                raise InputError(event.message)
            case messages.VideoFailed():
                raise CommandFailed(event.message, status=FAILED, shown_here=True)
            case messages.Admitted():
                for line in event.damage:
                    self._display.phase(line)
                self._begin(int(event.video), event.video)
            case messages.Progressed():
                self._display.update(event.progress, int(event.video))
            case ChunkMade():
                video = self._videos[int(event.video)]
                assert video.writer is not None
                video.writer.write(event.frames)
                video.chunks += 1
            case VideoDone():
                self._end(int(event.video), event)

    def _begin(self, index: int, name: str) -> None:
        """Open a video's file; it is open already if the video goes on after a loss."""
        video = self._videos[index]
        if video.writer is not None:
            return
        plan, options = video.plan, video.plan.options
        video.began = time.monotonic()
        self._display.begin(index, plan.out.stem if self._folder is not None else "")
        writer = VideoWriter(
            plan.out,
            fps=plan.model.config.figures.fps,
            form=FORMATS[plan.suffix],
            keep_partial=options.keep_partial,
            preview=plan.out.with_suffix(".png") if options.preview else None,
            segments=None if video.saved is None else video.saved.segments,
            begin=video.kept,
            on_stored=partial(self._stored, name),
        )
        video.writer = BackgroundWriter(writer)  # known before it begins, so that an interrupt finds it
        video.writer.__enter__()

    def _end(self, index: int, done: VideoDone) -> None:
        """A video has all of its chunks: its file and its record appear."""
        video = self._videos[index]
        assert video.writer is not None and self._ready is not None
        video.writer.__exit__(None, None, None)
        if video.saved is not None:
            video.saved.finish(keep=video.plan.options.keep_state)
        video.summary = Summary(
            plan=video.plan,
            frames=video.writer.frames,
            chunks=video.chunks,
            loading=self._ready - self._began,
            making=time.monotonic() - video.began,
            computed=done.computed,
            kv_bytes=done.kv_bytes,
            kv_host_bytes=done.kv_host_bytes,
            memory=peak_memory(),
            gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        )
        self.making = time.monotonic() - self._ready
        whole = f"{video.plan.out} is complete ({len(self.summaries)} of {len(self._videos)})"
        self._display.end(index, whole if self._folder is not None else "")
        if video.plan.record is not None and video.recorder is not None:
            video.recorder.finish(record_settings(video.summary)).save(video.plan.record)


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
        "script": [{"chunk": chunk, "prompt": prompt} for chunk, prompt in request.script],
        "negative_prompt": request.negative,
        "fps": config.figures.fps,
        "seed": request.seed,
        "chunks": request.chunks,
        "prefix_frames": 0 if request.prefix is None else len(request.prefix),
        "height": request.height,
        "width": request.width,
        "steps": request.num_steps,
        "window": config.figures.window,
        "device": plan.model.device,
        "attention": backend_name(plan.options.attention),
        "pp": options.pp,
        "cp": options.cp,
        "layers": list(stage_sizes(config, options.pp, options.split)),
        "cache_preset": plan.model.cache,
        "cache": asdict(plan.model.reuse),
        "kv": asdict(plan.model.kv),
        "computed_fraction": summary.computed,
        "kv_bytes": summary.kv_bytes,
        "kv_host_bytes": summary.kv_host_bytes,
        "seconds": {"loading": summary.loading, "making": summary.making},
    }
