"""What is kept of a video on disk while it is made, so that it can go on: its finished chunks, and its checkpoints.

A folder belongs to one video, and its name is a digest of all that the video depends on. In it are `segments`, a file
with a checksum for each finished chunk, a folder of checkpoints for each layout of ranks, and for a finished video that
may become longer `video.json`, which says how it was made.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from engine.checkpoint.files import CheckpointConfig, discard, newest
from engine.files import (
    Damaged,
    atomic_write,
    read_sealed,
    remove_folder,
    remove_stale_parts,
    write_errors,
    write_sealed,
)
from launch.model.resolve import layout_of
from launch.option_fields import values_of
from launch.options import threads_of_a_rank
from launch.output.formats import FORMATS, Format
from launch.output.segments import count_frames
from launch.plan import Plan
from models.errors import InputError
from parallel.cluster.messages import VideoOrder

DIGEST_LENGTH = 12
"""Hexadecimal digits of a video's name: 48 bits, so that even 100,000 videos do not meet."""
MANIFEST = "video.json"
_DIGEST_FORM = 2  # to be raised when the same options begin to make another video
_HEADER_BYTES = 100_000  # of a segment, and more


def video_digest(plan: Plan, threads: int, repeat: int = 0) -> str:
    """Of all that the video depends on, as far as the command line can know it, and `repeat` equal ones before it.

    A rank computes with so many CPU `threads`, another number of which makes other bits. What was not given is filled
    in: a default that is written out changes nothing.
    """
    model, source, request = plan.model, plan.model.source, plan.request
    asked = asdict(replace(request, prefix=None, end=None))
    del asked["end"]
    what = {
        "form": _DIGEST_FORM,
        "repeat": repeat,
        "request": asked,
        "prefix": _digest(request.prefix),
        **({} if request.end is None else {"end": _digest(request.end)}),
        "model": model.config.to_dict(),
        **source.loader.settings,
        "cp": plan.options.cp,  # sums are taken in another order; pp and split change nothing
        "threads": threads,
        "attention": source.attention,
        "precise": source.precise,
        "compiled": source.compiled,
        "cache": asdict(model.reuse),
        "kv": model.kv.identity(),
    }
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def _digest(frames: Tensor | None) -> str | None:
    return None if frames is None else hashlib.sha256(frames.numpy().tobytes()).hexdigest()


def _threads(plan: Plan) -> int:
    """CPU threads of a rank of `generate`."""
    options, ranks = plan.options, layout_of(plan.options).world_size
    if options.launcher == "ray":
        return threads_of_a_rank(options)
    return options.threads or (torch.get_num_threads() if ranks == 1 else max(1, (os.cpu_count() or 1) // ranks))


def saved_folder(plan: Plan) -> Path | None:
    """Where `generate` keeps how far a video is; None if that is not asked for."""
    options = plan.options
    root = options.checkpoint or (plan.out.with_suffix(".state") if options.keep_state else None)
    return None if root is None else root / video_digest(plan, _threads(plan))


def segment_name(index: int) -> str:
    """The file of a chunk in the folder of a video's segments."""
    return f"{index:06}.mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentFiles:
    """The chunks of one video, in files with a checksum. One that is damaged is deleted, for it to be made again."""

    folder: Path  # made when there is a chunk
    frames: int  # of a chunk, at most: the first one after a clip has fewer
    height: int
    width: int
    say: Callable[[str], None]  # called with a line about a damaged file

    def count(self) -> int:
        """Chunks that are there and whole, from the first on without a gap; all are read."""
        for index in itertools.count():
            path = self._file(index)
            if not os.path.lexists(path):
                return index
            try:
                self.read(index)
            except Damaged as damage:
                self.say(f"{damage}; it was deleted, and what comes from it on is made again")
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                return index
        raise AssertionError

    def write(self, index: int, segment: bytes) -> None:
        """Keep a chunk; an `InputError` says that the disk is full or cannot be written."""
        path = self._file(index)
        with write_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, segment)

    def read(self, index: int) -> bytes:
        """A chunk's segment; a Damaged if it is not as it was written, or not of this video."""
        path = self._file(index)
        segment = read_sealed(path, self.frames * self.height * self.width * 4 + _HEADER_BYTES)
        try:
            frames = count_frames(segment)
            with av.open(io.BytesIO(segment), "r", format="mp4") as container:
                size = container.streams.video[0].height, container.streams.video[0].width
        except (ValueError, LookupError, OSError, av.FFmpegError) as error:
            raise Damaged(path, f"it holds no segment: {error}") from None
        if size != (self.height, self.width) or not 0 < frames <= self.frames:
            raise Damaged(path, f"it holds {frames} frames of {size[1]}x{size[0]}, which are none of this video")
        return segment

    def finish(self, form: Format, path: Path, chunks: int, fps: int, stop: threading.Event) -> None:
        """Make the video file of all chunks. It appears when it is complete; errors as in `write`.

        A Damaged says which file has come to harm since it was written; `count` deletes it. A CancelledError if it is
        to `stop`: there is no file then.
        """

        def segments() -> Iterator[io.BytesIO]:
            for index in range(chunks):
                if stop.is_set():
                    raise CancelledError
                yield io.BytesIO(self.read(index))

        with write_errors(path, kinds=(av.FFmpegError,)):
            form.finish(segments, path, fps)

    def keep(self, count: int) -> None:
        """Delete all but the first so many."""
        for index in itertools.takewhile(lambda index: self._file(index).exists(), itertools.count(count)):
            self._file(index).unlink()

    def _file(self, index: int) -> Path:
        return self.folder / segment_name(index)


class SavedVideo:
    """The folder of one video."""

    def __init__(self, folder: Path, plan: Plan, say: Callable[[str], None]) -> None:
        request, known = plan.request, plan.model.config.figures
        self.folder, self._plan, self._say = folder.absolute(), plan, say
        self.segments = SegmentFiles(
            folder=self.folder / f"segments-{FORMATS[plan.suffix].codec.name}",
            frames=known.chunk_frames,
            height=request.height,
            width=request.width,
            say=say,
        )

    @property
    def checkpoints(self) -> Path:
        """Those of this layout: each rank goes on with its own layers alone."""
        options = self._plan.options
        return self.folder / (f"pp{options.pp}" if options.split is None else f"pp{options.pp}-{options.split}")

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, no other process has the folder; an `InputError` if one has."""
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise InputError(f"another process makes the video of {self.folder}: wait for its end") from None
        finally:
            os.close(descriptor)

    def discard_useless(self, every: int) -> None:
        """Make room before it is needed: of what earlier runs have left, whole checkpoints of this layout stay."""
        others = [path for path in self.folder.glob("pp*") if path != self.checkpoints or not every]
        for path in others:
            shutil.rmtree(path, ignore_errors=True)
        discard(self.checkpoints, whole=False)
        remove_stale_parts(self.segments.folder)
        if others and every:
            anew = "computed again from its first chunk on, as its checkpoints are of another --pp or --split"
            self._say(f"{anew}; the chunks that are finished are kept")

    def order(self, video: str, stored: int, *, every: int, extend: bool) -> VideoOrder:
        """The order to make what is missing: all but the `stored` chunks. Its folder is made; errors as in `taken`."""
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        config = CheckpointConfig(folder=self.checkpoints, every=every, extend=extend) if every else None
        return replace(self._plan.order(video), checkpoint=config, stored=stored, confirmed=True)

    def finish(self, *, keep: bool) -> None:
        """The video is there. What it was made of goes, but for what a longer one goes on from if that is to `keep`."""
        if not keep:
            self.remove()
            return
        found = newest(self.checkpoints)
        for path in self.checkpoints.glob("*"):
            if found is None or path != found.folder:
                shutil.rmtree(path, ignore_errors=True)
        self.segments.keep(0 if found is None else found.counts["chunks"])
        with atomic_write(self.folder / MANIFEST) as file:
            file.write(json.dumps({"options": self._values()}, indent=1).encode())

    def _values(self) -> dict[str, Any]:
        """The options that make this one video."""
        plan, request, known = self._plan, self._plan.request, self._plan.model.config.figures
        chunk = known.chunk_frames / known.fps
        own = replace(
            plan.options,
            prompts=[request.prompt],
            script=None,
            prompt_at=[f"{first * chunk:.6f}s {prompt}" for first, prompt in request.script] or None,
            seed=request.seed,
            seconds=None,
            chunks=request.chunks,
            out=f"{plan.out.absolute()}{'' if plan.suffix else '/'}",
        )
        return values_of(own)

    def remove(self) -> None:
        """Delete the folder, and the one around it unless there are those of others."""
        remove_folder(self.folder)
        with suppress(OSError):
            self.folder.parent.rmdir()
