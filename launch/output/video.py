"""Writing a video file: encoded on a thread while later frames are made, and there only when it is complete.

It knows frames and files; `engine/files.py` makes a file appear whole.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from torch import Tensor

from engine.files import atomic_write, write_errors

Frames = NDArray[np.uint8] | Tensor  # on the CPU
_SMALL = 256 * 256  # pixels
_ERRORS = (av.FFmpegError,)
_CRF_SMALL, _CRF_LARGE = "12", "17"  # a small clip costs little, and shows every artefact when it is blown up


class VideoWriter:
    """An H.264 video in an MP4 file, as a context: the file appears when the context ends well.

    Args:
        path: where the finished file appears.
        fps: frames per second.
        height, width: of every frame, even numbers.
    """

    def __init__(self, path: Path, *, fps: int, height: int, width: int) -> None:
        self._path, self._fps, self._height, self._width = path, fps, height, width

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            file = stack.enter_context(atomic_write(self._path))
            stack.enter_context(self._encoding(file))
            self._stack = stack.pop_all()
        return self

    def write(self, frames: Frames) -> None:
        """Encode frames, uint8 [F, height, width, 3].

        Raises:
            InputError: the disk is full or cannot be written.
        """
        with write_errors(self._path, kinds=_ERRORS):
            for pixels in np.asarray(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG
                )
                self._container.mux(self._stream.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

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
    """Runs a `VideoWriter` on a thread of its own, with a short queue in front, as a context.

    The thread alone touches the file: an interrupt reaches only the main thread, so it cannot hit the clean-up.

    Args:
        writer: opened, fed and ended on the thread.
        depth: how many blocks of frames may wait; `write` blocks beyond that.
    """

    def __init__(self, writer: VideoWriter, *, depth: int = 2) -> None:
        self._writer = writer
        self._queue: queue.Queue[Frames | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="video")

    def __enter__(self) -> Self:
        self._done: Future[None] = self._pool.submit(self._run)
        return self

    def write(self, frames: Frames) -> None:
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

    def _put(self, frames: Frames | None) -> None:
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
