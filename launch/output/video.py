"""AsyncSave a video file: encoded on a thread while later frames are made, and there only when it is complete.

It knows frames and files. A file is written under a hidden name beside its target and renamed at the end, so that
nothing half-written ever stands under the name that was asked for.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from launch.output.files import file_errors, part_of

_SMALL = 256 * 256  # pixels
_CRF_SMALL, _CRF_LARGE = "12", "17"  # a small clip costs little, and shows every artefact when it is blown up


class VideoWriter:
    """An H.264 video in an MP4 file, as a context: the file appears when the context ends well.

    Args:
        path: where the finished file appears.
        fps: frames per second.
        height, width: of every frame, even numbers.
    """

    def __init__(self, path: Path, *, fps: int, height: int, width: int) -> None:
        self._path, self._part = path, part_of(path)
        self._fps, self._height, self._width = fps, height, width

    def __enter__(self) -> Self:
        with file_errors(self._path, av.FFmpegError):
            self._file = self._part.open("wb")
        self._container = av.open(self._file, "w", format="mp4")  # nothing is written before the first frame
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
        return self

    def write(self, frames: Tensor) -> None:
        """Encode frames, uint8 [F, height, width, 3].

        Raises:
            InputError: the disk is full or cannot be written.
        """
        with file_errors(self._path, av.FFmpegError):
            for pixels in frames.cpu().numpy():
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG
                )
                self._container.mux(self._stream.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with file_errors(self._path, av.FFmpegError):
                    self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)

    def _discard(self) -> None:
        """Close and remove what is left; nothing is after a good end."""
        for close in (self._container.close, self._file.close):
            with contextlib.suppress(OSError, ValueError, av.FFmpegError):
                close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


class BackgroundWriter:
    """Runs a `VideoWriter` on a thread of its own, with a short queue in front, as a context.

    The thread alone touches the file: an interrupt reaches only the main thread, so it cannot hit the clean-up.

    Args:
        writer: opened, fed and ended on the thread.
        depth: how many blocks of frames may wait; `write` blocks beyond that.
    """

    def __init__(self, writer: VideoWriter, *, depth: int = 2) -> None:
        self._writer = writer
        self._queue: queue.Queue[Tensor | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="video")

    def __enter__(self) -> Self:
        self._done: Future[None] = self._pool.submit(self._run)
        return self

    def write(self, frames: Tensor) -> None:
        """Hand frames over, uint8 [F, height, width, 3].

        Raises:
            InputError: the thread could not write; said at the next call after it happened.
        """
        self._put(frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        try:
            self._put(None)
            self._done.result()
        except _Stopped:
            pass
        finally:
            self._pool.shutdown()

    def _put(self, frames: Tensor | None) -> None:
        while not self._done.done():
            try:
                self._queue.put(frames, timeout=0.1)
                return
            except queue.Full:
                continue
        self._done.result()

    def _run(self) -> None:
        with self._writer as writer:
            while True:
                frames = self._queue.get()
                if self._stop.is_set():
                    raise _Stopped
                if frames is None:
                    return
                writer.write(frames)


class _Stopped(Exception):  # noqa: N818 - not an error: the way out of the writer's context without a file
    """The video is not wanted any more."""
