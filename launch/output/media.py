"""Pictures and clips: reading those that a video starts from, and writing the finished ones.

A file that is written is encoded on a thread while later frames are made, and appears when it is complete. That frames
become a prefix is the engine's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import av
import numpy as np
import torch
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from torch import Tensor

from engine.files import atomic_write, write_errors
from models.errors import InputError

Frames = NDArray[np.uint8] | Tensor  # on the CPU
_SMALL = 256 * 256  # pixels
_ERRORS = (av.FFmpegError,)
_CRF_SMALL, _CRF_LARGE = "12", "17"  # a small clip costs little, and shows every artefact when it is blown up
PREFIX_FRAMES = 32
"""How many frames of a clip are continued: the first ones after resampling (specification part 3)."""
_LATENT_FRAMES = 4  # one latent frame stands for four frames
_TEXT = "tty"  # FFmpeg would draw the letters
_TURNS = {90: ("transpose", "cclock"), 180: ("rotate", "PI"), 270: ("transpose", "clock")}  # to undo a rotation tag


# ---- reading


def read_image(path: Path, *, height: int, width: int) -> Tensor:
    """Read an image (or the first frame of a video), stretched to the size, bicubic (specification part 3).

    Returns uint8 [1, height, width, 3]; an `InputError` says why the file cannot be read or decoded.
    """
    return _read(path, "image", fps=None, height=height, width=width, limit=1)


def read_video(path: Path, *, fps: int, height: int, width: int) -> Tensor:
    """Read the start of a video at a frame rate, stretched to the size, bicubic (specification part 3).

    A clip shorter than 32 frames is cut to a multiple of 4, since four frames make one latent frame.

    Returns:
        uint8 [F, height, width, 3], F is 32 or less.

    Raises:
        InputError: the file cannot be read or decoded, or has fewer than 4 frames.
    """
    frames = _read(path, "video", fps=fps, height=height, width=width, limit=PREFIX_FRAMES)
    usable = len(frames) // _LATENT_FRAMES * _LATENT_FRAMES
    if not usable:
        found = f"{len(frames)} frame" + ("s" if len(frames) > 1 else "")
        raise InputError(
            f"the video {path} has only {found} at {fps} per second: at least {_LATENT_FRAMES} are needed, "
            "or give a still picture with --image"
        )
    return frames[:usable]


def _read(path: Path, kind: str, *, fps: int | None, height: int, width: int, limit: int) -> Tensor:
    frames: list[Tensor] = []
    try:
        for frame in _decode(path, fps=fps, height=height, width=width):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == limit:
                break
    except (OSError, ValueError, av.FFmpegError) as error:
        raise InputError(f"cannot read the {kind} {path}: {getattr(error, 'strerror', None) or error}") from None
    if not frames:
        raise InputError(f"cannot read the {kind} {path}: no frame in it can be decoded")
    return torch.stack(frames)


def _decode(path: Path, *, fps: int | None, height: int, width: int) -> Iterator[VideoFrame]:
    with av.open(str(path)) as container:
        if not container.streams.video or container.format.name == _TEXT:
            raise ValueError("there is no picture in it")
        stream, graph = container.streams.video[0], None
        for frame in container.decode(stream):
            if graph is None:
                graph = _graph(frame, stream, fps=fps, height=height, width=width)
            graph.push(frame)
            yield from _pull(graph)
        if graph is not None:
            graph.push(None)
            yield from _pull(graph)


def _graph(first: VideoFrame, stream: av.VideoStream, *, fps: int | None, height: int, width: int) -> Graph:
    """What the released code asks of ffmpeg: upright, at the frame rate, stretched with the bicubic scaler."""
    steps = [_TURNS[first.rotation % 360]] if first.rotation % 360 in _TURNS else []
    if fps is not None:
        steps.append(("fps", str(fps)))
    steps += [("scale", f"{width}:{height}:flags=bicubic"), ("format", "rgb24")]
    graph = Graph()
    last = graph.add_buffer(template=stream, width=first.width, height=first.height, format=first.format)
    for name, settings in steps:
        step = graph.add(name, settings)
        last.link_to(step)
        last = step
    last.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def _pull(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        if isinstance(frame, VideoFrame):
            yield frame


# ---- writing


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

    def __enter__(self) -> Self:
        self._waiting.append(self._pool.submit(self._writer.__enter__))
        return self

    def write(self, frames: Frames) -> None:
        """Hand frames over, uint8 [F, height, width, 3]; an `InputError` says that earlier ones were not written."""
        self._waiting.append(self._pool.submit(self._writer.write, frames))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > self._depth + 1):
            self._waiting.popleft().result()

    def __exit__(self, *error: Any) -> None:
        with self._pool:
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
