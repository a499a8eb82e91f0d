"""Videos on their way from an order to a file: chunks and checkpoints on the disk, and the file at the end.

It is told what happens on the gangs, and says when a video has ended. Where the videos come from, and who else wants to
know of them, is the business of others.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field, replace
from typing import Self

import av

from engine.files import Damaged, DiskFull, write_errors
from launch.ending import check_signals
from launch.generate import Backend
from launch.options import Options
from launch.output.display import Row, State
from launch.output.formats import FORMATS
from launch.output.segments import encode_segment
from launch.plan import Plan
from launch.resume.saved import SavedVideo
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import Event, VideoOrder

_ENCODERS = 4  # threads, at most


@dataclass(kw_only=True, slots=True)
class Video(Row):
    """A video that is made, and what it is made with."""

    name: str  # of its order
    plan: Plan  # checked; its `out` is the file to write
    priority: int  # higher goes first
    saved: SavedVideo
    state: State = State.QUEUED
    began: float | None = None
    share: float = 0.0
    storing: deque[futures.Future[None]] = field(default_factory=deque)  # chunks that are encoded
    stored: set[int] = field(default_factory=set)  # of those, that are on the disk beyond the first `chunks_done`
    made: bool = False  # its last chunk has come
    ending: futures.Future[None] | None = None
    damaged: bool = False  # a chunk was, when all were there

    @classmethod
    def queued(cls, name: str, plan: Plan, saved: SavedVideo, *, line: int, priority: int) -> Self:
        """One that waits to be made."""
        title, chunks = plan.request.prompt, plan.size.chunks
        return cls(name=name, plan=plan, saved=saved, line=line, priority=priority, title=title, chunks=chunks)

    @property
    def under_way(self) -> list[futures.Future[None]]:
        """What is written of it at this moment."""
        return [*self.storing, *([] if self.ending is None else [self.ending])]


class Making:
    """The videos that are made, by name, and those that have ended.

    `ended` is called with each that has: its file is there, or with the error why it is not.
    """

    def __init__(
        self,
        base: Options,
        ended: Callable[[Video, InputError | None], None],
        say: Callable[[str], None],  # takes lines for people
    ) -> None:
        self._base, self._ended, self._say = base, ended, say
        self.videos: dict[str, Video] = {}
        self.restarts = 0  # of gangs
        self._pool = futures.ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1), thread_name_prefix="encode")
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self._cancel: Callable[[str], None] = lambda video: None

    def stop(self) -> None:
        """Encode no more: what is not complete stays as it is."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for what is encoded, unless that was stopped."""
        self.settle(wait=not self._stopping.is_set())
        self._pool.shutdown()

    def add(self, video: Video) -> None:
        """A video to make. Of what earlier runs have left of it, chunks and whole checkpoints of this layout stay."""
        self.videos[video.name] = video
        video.saved.discard_useless(self._base.checkpoint_every)

    def begin(self, video: Video) -> VideoOrder | None:
        """Count the chunks that are there; returns the order to make what is missing, None if nothing is."""
        video.chunks_done = video.saved.segments.count()
        video.made = video.chunks_done >= video.chunks
        if video.made:
            return None
        every, extend = self._base.checkpoint_every, self._base.keep_state
        order = video.saved.order(video.name, video.chunks_done, every=every, extend=extend)
        return replace(order, priority=video.priority)

    def handle(self, backend: Backend, event: Event) -> None:
        """Take note of what has happened."""
        self._cancel = backend.cancel
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
            case messages.ChunkMade():  # encoded and written beside the loop, which has other gangs to listen to
                video = self.videos[event.video]
                video.storing.append(self._pool.submit(self._store, backend, video, event))
            case messages.Admitted():
                self._begin(self.videos[event.video], event)
            case messages.Progressed():
                self._progress(self.videos[event.video], event)
            case messages.VideoFailed():
                kind = DiskFull if event.disk else InputError
                self._fail(self.videos[event.video], kind(event.message))
            case messages.VideoDone():
                video = self.videos[event.video]
                video.computed, video.made = event.computed, True

    def settle(self, *, wait: bool = False) -> list[Video]:
        """Take note of chunks that are on the disk, and of videos that are complete, or could not be.

        Returns those of which a chunk is to be made again.
        """
        again = self._look()
        while wait and (busy := [one for video in self.videos.values() for one in video.under_way]):
            futures.wait(busy, 0.2, return_when=futures.FIRST_COMPLETED)
            check_signals()
            again += self._look()
        return again

    def _begin(self, video: Video, event: messages.Admitted) -> None:
        for line in event.damage:
            self._say(line)
        video.began = video.began or time.monotonic()
        video.state, video.gang = State.RUNNING, event.gang

    def _store(self, backend: Backend, video: Video, chunk: messages.ChunkMade) -> None:
        if self._stopping.is_set() or video.state is State.FAILED:
            raise futures.CancelledError
        plan = video.plan
        with write_errors(plan.out, kinds=(av.FFmpegError,)):
            segment = encode_segment(chunk.frames, FORMATS[plan.suffix].codec, plan.model.config.figures.fps)
        video.saved.segments.write(chunk.index, segment)
        with self._lock:  # chunks of one video may be encoded on several threads
            video.stored.add(chunk.index)
            while video.chunks_done in video.stored:
                video.stored.remove(video.chunks_done)
                video.chunks_done += 1
            backend.stored(chunk.video, video.chunks_done)

    def _progress(self, video: Video, event: messages.Progressed) -> None:
        now, share = time.monotonic(), event.progress.tick / event.progress.ticks
        if not video.share:
            video.began, video.share = now, share
        done = share - video.share
        video.computed = event.progress.computed_fraction
        video.seconds_left = None if done <= 0 or video.began is None else (now - video.began) * (1 - share) / done

    def _look(self) -> list[Video]:
        again = []
        for name, video in list(self.videos.items()):
            while video.storing and video.storing[0].done():
                try:
                    video.storing.popleft().result()
                except futures.CancelledError:
                    continue
                except InputError as error:
                    self._fail(video, error)
                    self._cancel(name)
            if video.made and not video.storing and video.state is not State.FAILED and not self._stopping.is_set():
                video.made = False
                finish, plan = video.saved.segments.finish, video.plan
                form, fps = FORMATS[plan.suffix], plan.model.config.figures.fps
                video.ending = self._pool.submit(finish, form, plan.out, video.chunks, fps, self._stopping)
            if video.ending is not None and video.ending.done() and self._end(video, video.ending):
                again.append(video)
        return again

    def _end(self, video: Video, ending: futures.Future[None]) -> bool:
        """The file is there, or cannot be; True if a chunk of it is to be made again."""
        video.ending = None
        try:
            ending.result()
        except futures.CancelledError:
            return False
        except Damaged as error:
            if video.damaged:  # a second time its disk is not to be trusted
                self._fail(video, InputError(str(error)))
                return False
            video.state, video.damaged = State.QUEUED, True
            return True
        except InputError as error:
            self._fail(video, error)
            return False
        video.state, video.seconds_left = State.DONE, None
        self._ended(video, None)
        return False

    def _fail(self, video: Video, error: InputError) -> None:
        if video.state is State.FAILED:
            return
        video.state, video.error = State.FAILED, str(error)
        self._ended(video, error)
