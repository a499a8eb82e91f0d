"""Video files, and the events that fill them: a file appears when it is complete, and one that is not leaves nothing.

Frames are encoded on a thread while later ones are made. Who makes them is not this file's business.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from torch import Tensor

from engine.files import atomic_write, write_errors
from engine.record import Recorder
from launch import __version__
from launch.ending import CommandFailed
from launch.output.display import Display, Summary
from launch.plan import Plan
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import ChunkMade, Event, VideoDone
from parallel.health.exit_codes import FAILED
from parallel.split import stage_sizes

Frames = NDArray[np.uint8] | Tensor  # on the CPU
_SMALL = 256 * 256  # pixels
_ERRORS = (av.FFmpegError,)
_CRF_SMALL, _CRF_LARGE = "12", "17"  # a small clip costs little, and shows every artefact when it is blown up


class VideoWriter:
    """An H.264 video in an MP4 file, as a context: the file appears at `path` when the context ends well.

    It has `fps` frames per second of even height and width.
    """

    def __init__(self, path: Path, *, fps: int, height: int, width: int) -> None:
        self._path, self._fps, self._height, self._width = path, fps, height, width
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            stack.enter_context(self._encoding(stack.enter_context(atomic_write(self._path))))
            self._stack = stack.pop_all()
        return self

    def write(self, frames: Frames) -> None:
        """Encode frames, uint8 [F, height, width, 3]. `InputError` if the disk is full or cannot be written."""
        with write_errors(self._path, kinds=_ERRORS):
            for pixels in np.asarray(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG
                )
                self._container.mux(self._stream.encode(frame))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def _encoding(self, file: BinaryIO) -> Iterator[None]:
        """Hold an encoder open that writes to a file; the video is ended if the context ends well."""
        self._container = av.open(file, "w", format="mp4")  # nothing is written before the first frame
        options = {"crf": _CRF_SMALL if self._height * self._width <= _SMALL else _CRF_LARGE}
        if "AVX512" in torch.backends.cpu.get_cpu_capability():
            # x264's AVX-512 code does not give the same file twice for the same frames; its other code does.
            options["x264-params"] = "asm=AVX2"
        self._stream = self._container.add_stream("libx264", rate=self._fps, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = self._height, self._width, "yuv420p"
        # Say what the conversion from RGB uses: players guess by the size otherwise, and shift the colours.
        self._stream.codec_context.colorspace = Colorspace.SMPTE170M
        self._stream.codec_context.color_range = ColorRange.MPEG
        self._stream.codec_context.thread_count = 1  # the other cores are for the model
        try:
            yield
            with write_errors(self._path, kinds=_ERRORS):
                self._container.mux(self._stream.encode(None))
                self._container.close()
        finally:
            with suppress(OSError, ValueError, *_ERRORS):
                self._container.close()


class BackgroundWriter:
    """Runs a `VideoWriter` on a thread of its own, as a context; at most `depth` blocks of frames wait for it.

    The thread alone touches the file: an interrupt reaches only the main thread, so it cannot hit the clean-up.
    """

    def __init__(self, writer: VideoWriter, *, depth: int = 2) -> None:
        self._writer, self._depth = writer, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="video")
        self._waiting: deque[Future[Any]] = deque()
        self._closed = self.whole = False  # `whole`: the file is there

    def __enter__(self) -> Self:
        self._waiting.append(self._pool.submit(self._writer.__enter__))
        return self

    def write(self, frames: Frames) -> None:
        """Hand frames over, uint8 [F, height, width, 3]; an `InputError` says that earlier ones were not written."""
        self._waiting.append(self._pool.submit(self._writer.write, frames))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > self._depth + 1):
            self._waiting.popleft().result()

    def __exit__(self, *error: Any) -> None:
        """End the file, once: an end that was interrupted goes on, and this waits for it."""
        with self._pool:
            if not self._closed:
                self._closed = True
                if error[0] is not None:
                    for block in self._waiting:
                        block.cancel()
                self._pool.submit(self._end, error).result()

    def _end(self, error: tuple[Any, ...]) -> None:
        """End the file, on the thread, after all that was handed over; without one if that could not be written."""
        failures = [] if error[0] is not None else [block.exception() for block in self._waiting]
        failed = next((failure for failure in failures if failure is not None), None)
        self._writer.__exit__(*(error if failed is None else (type(failed), failed, failed.__traceback__)))
        if failed is not None:
            raise failed
        self.whole = error[0] is None


# ---- the events


@dataclass(slots=True)
class _Video:
    """One video in the making."""

    plan: Plan
    recorder: Recorder | None  # for its record; None for none
    writer: BackgroundWriter | None = None  # None before it begins
    summary: Summary | None = None  # None before its end
    began: float = 0.0
    chunks: int = 0
    frames: int = 0

    @property
    def whole(self) -> bool:
        return self.writer is not None and self.writer.whole


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
        self._folder = plans[0].out.parent if len(plans) > 1 else None  # of several
        self._made_folder = False
        self._ready: float | None = None
        self.making = 0.0  # seconds from the loaded model to the last file

    def __enter__(self) -> Self:
        if self._folder is not None and not self._folder.exists():
            self._folder.mkdir(parents=True)
            self._made_folder = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for video in self._videos:
            if video.writer is not None:
                with suppress(InputError):  # it has been said already
                    video.writer.__exit__(InputError, InputError(), None)
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
            case messages.VideoFailed():
                raise CommandFailed(event.message, status=FAILED, shown_here=True)
            case messages.Admitted():
                self._begin(int(event.video))
            case messages.Progressed():
                self._display.update(event.progress, int(event.video))
            case ChunkMade():
                self._write(self._videos[int(event.video)], event)
            case VideoDone():
                self._end(int(event.video), event)

    def _begin(self, index: int) -> None:
        """Open a video's file; it is open already if the video goes on after a loss."""
        video = self._videos[index]
        if video.writer is not None:
            return
        out, request, fps = video.plan.out, video.plan.request, video.plan.model.config.runtime_config.fps
        video.began = time.monotonic()
        self._display.begin(index, out.stem if self._folder is not None else "")
        writer = VideoWriter(out, fps=fps, height=request.height, width=request.width)
        video.writer = BackgroundWriter(writer)  # known before it begins, so that an interrupt finds it
        video.writer.__enter__()

    def _write(self, video: _Video, chunk: ChunkMade) -> None:
        assert video.writer is not None
        video.writer.write(chunk.frames)
        video.chunks, video.frames = video.chunks + 1, video.frames + len(chunk.frames)

    def _end(self, index: int, done: VideoDone) -> None:
        """A video has all of its chunks: its file and its record appear."""
        video = self._videos[index]
        assert video.writer is not None and self._ready is not None
        video.writer.__exit__(None, None, None)
        video.summary = Summary(
            plan=video.plan,
            frames=video.frames,
            chunks=video.chunks,
            loading=self._ready - self._began,
            making=time.monotonic() - video.began,
            computed=done.computed,
            kv_bytes=done.kv_bytes,
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
        "seed": request.seed,
        "chunks": request.chunks,
        "prefix_frames": 0 if request.prefix is None else len(request.prefix),
        "height": request.height,
        "width": request.width,
        "steps": request.num_steps,
        "window": config.runtime_config.window_size,
        "device": plan.model.device,
        "pp": options.pp,
        "cp": options.cp,
        "layers": list(stage_sizes(config, options.pp, options.split)),
        "cache_preset": plan.model.cache,
        "cache": asdict(plan.model.reuse),
        "kv": asdict(plan.model.kv),
        "computed_fraction": summary.computed,
        "kv_bytes": summary.kv_bytes,
        "seconds": {"loading": summary.loading, "making": summary.making},
    }
