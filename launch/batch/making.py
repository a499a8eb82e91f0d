"""Videos on their way from an order to a file: chunks and checkpoints on the disk, and the encoding at the end.

It is told what happens on the gangs, and says when a video has ended. Where the videos come from, and who else wants to
know of them, is the business of others.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engine.checkpoint.files import CheckpointConfig, discard
from engine.files import Damaged
from launch.batch.folder import ChunkFiles
from launch.ending import check_signals
from launch.generate import Backend
from launch.options import GangOptions, Options
from launch.output.display import Row, State
from launch.plan import Plan
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import Event, VideoOrder


@dataclass(kw_only=True, slots=True)
class Video(Row):
    """A video that is made, and what it is made with."""

    name: str  # of its order
    plan: Plan  # checked; its `out` is the file to write
    priority: int  # higher goes first
    files: ChunkFiles
    checkpoints: Path  # folder of all, with one for each layout in it
    began: float | None = None
    share: float = 0.0
    ending: futures.Future[None] | None = None
    damaged: bool = False  # a chunk was, when all were there


class Making:
    """The videos that are made, by name, and those that have ended.

    `ended` is called with each that has: its file is there, or with the error why it is not.
    """

    def __init__(
        self,
        options: GangOptions,
        base: Options,
        ended: Callable[[Video, InputError | None], None],
        say: Callable[[str], None],  # takes lines for people
    ) -> None:
        self._options, self._base, self._ended, self._say = options, base, ended, say
        self.videos: dict[str, Video] = {}
        self.restarts = 0  # of gangs
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Encode no more: what is not complete stays as it is."""
        self._stopping.set()

    def close(self) -> None:
        """Wait for what is encoded, unless that was stopped."""
        self.settle(wait=not self._stopping.is_set())
        self._pool.shutdown()

    def add(self, video: Video) -> None:
        """A video to make. Of what earlier runs have left of it, chunks and whole checkpoints of this layout stay."""
        self.videos[video.name] = video
        own, wanted = self._own_checkpoints(video), bool(self._options.checkpoint_every)
        others = [path for path in video.checkpoints.glob("*") if path != own or not wanted]
        for path in others:
            shutil.rmtree(path, ignore_errors=True)
        discard(own, whole=False)
        if others and wanted:
            anew = "computed again from its first chunk on, as its checkpoints are of another --pp or --split"
            self._say(f"line {video.line} is {anew}; the chunks that are finished are kept")

    def order(self, video: Video) -> VideoOrder:
        """The order to make what is missing of a video."""
        every = self._options.checkpoint_every
        checkpoint = CheckpointConfig(folder=self._own_checkpoints(video), every=every) if every else None
        order = video.plan.order(video.name)
        return replace(order, checkpoint=checkpoint, stored=video.chunks_done, priority=video.priority)

    def handle(self, backend: Backend, event: Event) -> None:
        """Take note of what has happened."""
        match event:
            case messages.GangDown():
                self._say(f"{event.gang} is given up: {event.message}")
            case messages.GangLost():
                self._say(f"{event.gang} was lost: {event.message}")
                for name in event.videos:
                    lost = self.videos[name]
                    lost.state, lost.gang, lost.restarts = State.RESTARTING, None, lost.restarts + 1
            case messages.Restarted():
                self.restarts += 1
            case messages.ChunkMade():
                self._keep(backend, event)
            case messages.Admitted():
                self._begin(self.videos[event.video], event)
            case messages.Progressed():
                self._progress(self.videos[event.video], event)
            case messages.VideoFailed():
                self._end(self.videos[event.video], InputError(event.message))
            case messages.VideoDone():
                video = self.videos[event.video]
                video.computed = event.computed
                self.end_if_complete(video)

    def end_if_complete(self, video: Video) -> bool:
        """Begin to encode a video all of whose chunks are there."""
        if video.chunks_done < video.chunks:
            return False
        plan = video.plan
        fps = plan.model.config.runtime_config.fps
        video.ending = self._pool.submit(video.files.encode, plan.out, video.chunks, fps, self._stopping)
        return True

    def settle(self, *, wait: bool = False) -> list[Video]:
        """Take note of videos that are encoded, or could not be; returns those of which a chunk is to be made again."""
        again = []
        while wait and futures.wait([video.ending for video in self.videos.values() if video.ending], 0.2).not_done:
            check_signals()
        for video in list(self.videos.values()):
            if video.ending is not None and video.ending.done() and self._settle(video, video.ending):
                again.append(video)
        return again

    def clean(self, video: Video) -> None:
        """The video is there, or not wanted: what it is made of is not needed any more."""
        video.files.remove()
        shutil.rmtree(video.checkpoints, ignore_errors=True)
        if self._options.checkpoints is None:
            with suppress(OSError):
                video.checkpoints.parent.rmdir()  # unless there are those of others

    def _own_checkpoints(self, video: Video) -> Path:
        """Those of this layout: each rank goes on with its own layers alone."""
        base = self._base
        return video.checkpoints / (f"pp{base.pp}" if base.split is None else f"pp{base.pp}-{base.split}")

    def _begin(self, video: Video, event: messages.Admitted) -> None:
        for line in event.damage:
            self._say(line)
        video.began = video.began or time.monotonic()
        video.state, video.gang = State.RUNNING, event.gang

    def _keep(self, backend: Backend, chunk: messages.ChunkMade) -> None:
        video = self.videos[chunk.video]
        try:
            video.files.write(chunk.index, chunk.frames)
            video.chunks_done = chunk.index + 1
        except InputError as error:
            self._end(video, error)
            backend.cancel(chunk.video)

    def _progress(self, video: Video, event: messages.Progressed) -> None:
        now, share = time.monotonic(), event.progress.tick / event.progress.ticks
        if not video.share:
            video.began, video.share = now, share
        done = share - video.share
        video.computed = event.progress.computed_fraction
        video.seconds_left = None if done <= 0 or video.began is None else (now - video.began) * (1 - share) / done

    def _settle(self, video: Video, ending: futures.Future[None]) -> bool:
        """The encoding of a video is over; True if a chunk of it is to be made again."""
        video.ending = None
        try:
            ending.result()
        except futures.CancelledError:
            return False
        except InputError as error:
            self._end(video, error)
            return False
        except Damaged as error:
            if video.damaged:  # a second time its disk is not to be trusted
                self._end(video, InputError(str(error)))
                return False
            video.state, video.damaged = State.QUEUED, True
            return True
        self.clean(video)
        video.state, video.seconds_left = State.DONE, None
        self._ended(video, None)
        return False

    def _end(self, video: Video, error: InputError) -> None:
        video.state, video.error = State.FAILED, str(error)
        self._ended(video, error)
