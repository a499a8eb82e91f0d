"""Videos that play while they are written: a file appears when it is whole, and until then what there is of it.

`NAME.partial.mp4` stands beside the file and grows by a fragment for each chunk. At the end the file is made of it, and
it goes; a video that is not finished leaves nothing, unless that is to be kept. Frames are encoded on a thread while
later ones are made.
"""

import io
import os
import select
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import av
import numpy as np

from engine.files import Damaged, part_of, partial_of, write_errors
from launch.ending import CommandFailed
from launch.output.formats import MP4, Format
from launch.output.names import STREAM
from launch.output.preview import Preview
from launch.output.segments import FragmentStream, Frames, decode, encode_segment, pixels
from launch.resume.saved import SegmentFiles
from models.errors import InputError
from parallel.health.exit_codes import NO_OUTPUT

_ERRORS = (av.FFmpegError,)
_OUTPUT = 1  # the descriptor; what is printed within Ray goes elsewhere
_POLL = 0.2  # seconds between two looks whether a reader that has stopped is still waited for


class VideoWriter:
    """A video file, as a context: it appears at `path` when the context ends well, in its `form`.

    It has `fps` frames per second of even height and width. The path `-` is standard output: it gets the stream alone.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: int,
        form: Format = MP4,
        keep_partial: bool = False,  # what was made of a video that is not finished stays, if there is a chunk
        preview: Path | None = None,  # a picture of what is there, renewed with every chunk
        segments: SegmentFiles | None = None,  # where each chunk is kept, for another process to go on
        begin: int = 0,  # chunks that are there
        on_stored: Callable[[int], None] = lambda count: None,  # is told how many there are
    ) -> None:
        self._path, self._fps, self._form, self._keep = path, fps, form, keep_partial
        self._preview = None if preview is None else Preview(preview)
        self._segments, self._begin, self._on_stored = segments, begin, on_stored
        self._stack, self._stopped = ExitStack(), False
        self.fragments: FragmentStream  # what was written so far

    def __enter__(self) -> Self:
        with self._stack as stack:
            sink: Callable[[bytes], object] = self._to_output
            if self._path != STREAM:
                sink = partial(_append, stack.enter_context(self._partial()))
            self.fragments = FragmentStream(sink)
            for index in range(self._begin):
                self._add_kept(index)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: Frames) -> None:
        """Encode a chunk's frames, uint8 [F, height, width, 3]; an `InputError` if they cannot be written."""
        with write_errors(self._path, kinds=_ERRORS):
            segment = encode_segment(frames, self._form.codec, self._fps)
            if self._segments is not None:
                self._segments.write(self.fragments.fragments, segment)
            self.fragments.add(segment)
        self._on_stored(self.fragments.fragments)
        if self._preview is not None:
            self._preview.add(np.asarray(frames)[0])

    def _add_kept(self, index: int) -> None:
        """Go on after a chunk that is there; an `InputError` if it has come to harm since that was seen."""
        assert self._segments is not None
        try:
            segment = self._segments.read(index)
        except Damaged as damage:
            raise InputError(f"{damage}; run the same command again, which makes it again") from None
        with write_errors(self._path, kinds=_ERRORS):
            self.fragments.add(segment)
            if self._preview is not None:
                self._preview.add(pixels(next(decode([io.BytesIO(segment)]))))

    def stop(self) -> None:
        """Wait for nobody who reads standard output any more. May be called by any thread."""
        self._stopped = True

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def _partial(self) -> Iterator[BinaryIO]:
        """What there is, in a hidden file of this process alone, with a visible name that players can open."""
        shown, whole = partial_of(self._path), False
        part = part_of(shown)
        with write_errors(self._path, kinds=_ERRORS):
            file = part.open("w+b", buffering=0)
        with file:
            _show(part, shown, stays=self._keep)
            try:
                yield file
                with write_errors(self._path, kinds=_ERRORS):
                    self._form.finish(lambda: [_rewound(file)], self._path, self._fps)
                whole = True
            finally:
                with suppress(OSError):
                    if whole or not self._keep or not self.fragments.fragments:
                        _hide(file, shown)
                    part.unlink(missing_ok=True)

    def _to_output(self, data: bytes) -> None:
        """Write to standard output. Whoever reads it may stop, and must not keep this process from ending."""
        rest = memoryview(data)
        while rest and not self._stopped:
            if select.select([], [_OUTPUT], [], _POLL)[1]:
                try:
                    rest = rest[os.write(_OUTPUT, rest[: select.PIPE_BUF]) :]
                except OSError as error:
                    text = f"cannot write the video to standard output: {error.strerror}"
                    raise CommandFailed(text, status=NO_OUTPUT, shown_here=True) from None


def _append(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _rewound(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


def _show(part: Path, shown: Path, *, stays: bool) -> None:
    """Give a file its visible name, which `stays` without the hidden one or not; some disks can have none."""
    with suppress(OSError):
        shown.unlink(missing_ok=True)
        if stays:
            os.link(part, shown)
        else:
            shown.symlink_to(part.name)


def _hide(file: BinaryIO, shown: Path) -> None:
    """Remove a file's visible name, unless another one has taken it."""
    if os.path.samestat(shown.stat(), os.fstat(file.fileno())):
        shown.unlink()


class BackgroundWriter:
    """Runs a `VideoWriter` on a thread of its own, as a context; at most `depth` blocks of frames wait for it.

    The thread alone touches the file: an interrupt reaches only the main thread, so it cannot hit the clean-up.
    """

    def __init__(self, writer: VideoWriter, *, depth: int = 2) -> None:
        self._writer, self._depth = writer, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="video")
        self._pool.submit(bool)  # an interrupt while the thread starts has a second one started: not beside a file
        self._waiting: deque[Future[Any]] = deque()
        self._closed = self.whole = False  # `whole`: the file is there

    @property
    def frames(self) -> int:
        """Of the file, once it is whole."""
        return self._writer.fragments.frames

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
        if error[0] is not None:
            self._writer.stop()
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
