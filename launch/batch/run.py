"""Many videos on many gangs: `flowcache batch`. Whole videos are kept, those that were begun go on.

It puts the batch file, the folder of videos, the cluster and the display together; each of them is elsewhere.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field, replace

import av

from engine.files import Damaged, DiskFull, write_errors
from launch.batch.file import BatchItem, read_batch
from launch.batch.folder import OutputFolder
from launch.cluster import on_ray
from launch.ending import check_signals, unwinding_signals
from launch.generate import Backend, make_videos
from launch.options import BatchOptions, parse_size
from launch.output.display import BatchDisplay, Row, State, summary
from launch.output.segments import encode_segment
from launch.saved import SavedVideo
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import Event, VideoOrder
from parallel.health.exit_codes import BAD_INPUT, FAILED, OK

_ENCODERS = 4  # threads, at most


def run_batch(options: BatchOptions, *, say: Callable[[str], None]) -> int:
    """Make the videos of a batch file, with progress on standard error and lines for people to `say`.

    The exit status is 0 if all videos are there, 1 if some are not. An `InputError` says why none can be made.
    """
    began = time.monotonic()
    with OutputFolder(options.out) as folder:
        items, problems = read_batch(options.file, options.base, options.out)
        for message in problems.values():
            say(message)
        if not items:
            if problems:
                return BAD_INPUT
            raise InputError(f"{options.file} has no lines: write a JSON object for each video")
        batch = _Batch(options, folder, items, say)
        with BatchDisplay() as display, unwinding_signals():
            batch.make(display)
        say(summary(batch.rows, seconds=time.monotonic() - began, restarts=batch.restarts))
    failed = any(row.state is State.FAILED for row in batch.rows)
    return FAILED if problems or failed else OK


@dataclass(slots=True)
class _Video(Row):
    """A video of the batch, and what it is made with."""

    item: BatchItem
    saved: SavedVideo
    began: float | None = None
    share: float = 0.0
    storing: deque[futures.Future[None]] = field(default_factory=deque)  # chunks that are encoded
    stored: set[int] = field(default_factory=set)  # of those, that are on the disk beyond the first `chunks_done`
    made: bool = False  # its last chunk has come
    ending: futures.Future[None] | None = None
    damaged: bool = False  # a chunk was, when all were there


class _Batch:
    """The videos that are still to be made, and what is shown of all of them."""

    def __init__(
        self, options: BatchOptions, folder: OutputFolder, items: list[BatchItem], say: Callable[[str], None]
    ) -> None:
        self._options, self._folder, self._say = options, folder, say
        self.rows: list[Row] = []  # all videos, by line
        self.restarts = 0  # of gangs
        self._videos: dict[str, _Video] = {}  # those to make
        self._pool = futures.ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1), thread_name_prefix="encode")
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self._cancel: Callable[[str], None] = lambda video: None
        for item in items:
            video = self._video(item)
            self.rows.append(video)
            if item.digest in folder.done:
                video.state, video.chunks_done = State.KEPT, video.chunks
                if not options.base.keep_state:
                    video.saved.remove()
                if item.digest not in folder.recorded:
                    self._record(video)
            else:
                self._videos[item.digest] = video
                video.saved.discard_useless(options.base.checkpoint_every)

    def make(self, display: BatchDisplay) -> None:
        """Make what is missing."""
        display.update(self.rows)
        with self._pool:
            try:
                while queued := [video for video in self._videos.values() if video.state is State.QUEUED]:
                    for video in queued:
                        video.chunks_done = video.saved.segments.count()
                        video.made = video.chunks_done >= video.chunks
                    if waiting := [video for video in queued if not video.made]:
                        self._make(waiting, display)
                    self._settle(wait=True)  # which queues a video again if a chunk of it is damaged
                    display.update(self.rows)
            except (KeyboardInterrupt, SystemExit):
                self._stopping.set()
                self._pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                self._settle(wait=not self._stopping.is_set())
                display.update(self.rows)

    def _make(self, waiting: list[_Video], display: BatchDisplay) -> None:
        options, plans = self._options, [video.item.plan for video in waiting]
        kv_bytes = None if options.kv_memory is None else parse_size(options.kv_memory)
        if (count := len(waiting)) < options.gangs:
            self._say(f"of --gangs {options.gangs} no more than {count} can have work: one for each video to make")
        with on_ray(plans, gangs=options.gangs, kv_bytes=kv_bytes, max_restarts=options.max_restarts) as backend:
            self._cancel = backend.cancel

            def handle(event: Event) -> None:
                self._handle(backend, event)
                self._settle(wait=False)
                display.update(self.rows)

            make_videos(backend, [self._order(video) for video in waiting], handle)
            self._settle(wait=True)  # whatever becomes of the cluster now

    def _video(self, item: BatchItem) -> _Video:
        options, plan = self._options, item.plan
        folder = (options.checkpoints or options.out / ".checkpoints") / item.digest

        def say(text: str) -> None:
            self._say(f"line {item.line}: {text}")

        return _Video(
            line=item.line,
            title=plan.request.prompt,
            state=State.QUEUED,
            chunks=plan.size.chunks,
            item=item,
            saved=SavedVideo(folder, plan, say),
        )

    def _order(self, video: _Video) -> VideoOrder:
        item, base = video.item, self._options.base
        every, extend = base.checkpoint_every, base.keep_state
        order = video.saved.order(item.digest, video.chunks_done, every=every, extend=extend)
        return replace(order, priority=item.priority)

    def _handle(self, backend: Backend, event: Event) -> None:
        match event:
            case messages.GangDown():
                self._say(f"{event.gang} is given up: {event.message}")
            case messages.GangLost():
                self._say(f"{event.gang} was lost: {event.message}")
                for name in event.videos:
                    lost = self._videos[name]
                    lost.state, lost.gang, lost.restarts = State.RESTARTING, None, lost.restarts + 1
            case messages.Restarted():
                self.restarts += 1
            case messages.ChunkMade():
                self._keep(backend, event)
            case messages.Admitted():
                self._begin(self._videos[event.video], event)
            case messages.Progressed():
                self._progress(self._videos[event.video], event)
            case messages.VideoFailed():
                self._fail(self._videos[event.video], InputError(event.message))
            case messages.VideoDone():
                video = self._videos[event.video]
                video.computed, video.made = event.computed, True

    def _begin(self, video: _Video, event: messages.Admitted) -> None:
        for line in event.damage:
            self._say(line)
        video.began = video.began or time.monotonic()
        video.state, video.gang = State.RUNNING, event.gang

    def _keep(self, backend: Backend, chunk: messages.ChunkMade) -> None:
        """Have a chunk encoded and written beside the loop, which has other gangs to listen to."""
        video = self._videos[chunk.video]
        video.storing.append(self._pool.submit(self._store, backend, video, chunk))

    def _store(self, backend: Backend, video: _Video, chunk: messages.ChunkMade) -> None:
        if self._stopping.is_set():
            raise futures.CancelledError
        plan = video.item.plan
        with write_errors(plan.out, kinds=(av.FFmpegError,)):
            segment = encode_segment(chunk.frames, plan.form.codec, plan.model.config.runtime_config.fps)
        video.saved.segments.write(chunk.index, segment)
        with self._lock:  # chunks of one video may be encoded on several threads
            video.stored.add(chunk.index)
            while video.chunks_done in video.stored:
                video.stored.remove(video.chunks_done)
                video.chunks_done += 1
            backend.stored(chunk.video, video.chunks_done)

    def _progress(self, video: _Video, event: messages.Progressed) -> None:
        now, share = time.monotonic(), event.progress.tick / event.progress.ticks
        if not video.share:
            video.began, video.share = now, share
        done = share - video.share
        video.computed = event.progress.computed_fraction
        video.seconds_left = None if done <= 0 or video.began is None else (now - video.began) * (1 - share) / done

    def _settle(self, *, wait: bool) -> None:
        """Take note of chunks that are on the disk, and of videos that are complete, or could not be."""
        self._look()
        while wait and (busy := [one for video in self._videos.values() for one in _under_way(video)]):
            futures.wait(busy, 0.2, return_when=futures.FIRST_COMPLETED)
            check_signals()
            self._look()

    def _look(self) -> None:
        for name, video in self._videos.items():
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
                finish, plan = video.saved.segments.finish, video.item.plan
                fps = plan.model.config.runtime_config.fps
                video.ending = self._pool.submit(finish, plan.form, plan.out, video.chunks, fps, self._stopping)
            if video.ending is not None and video.ending.done():
                self._end(video, video.ending)

    def _end(self, video: _Video, ending: futures.Future[None]) -> None:
        video.ending = None
        try:
            ending.result()
        except futures.CancelledError:
            return
        except Damaged as error:
            if video.damaged:  # a second time its disk is not to be trusted
                self._fail(video, InputError(str(error)))
            else:
                video.state, video.damaged = State.QUEUED, True
            return
        except InputError as error:
            self._fail(video, error)
            return
        video.saved.finish(keep=self._options.base.keep_state)
        video.state, video.seconds_left = State.DONE, None
        self._record(video)

    def _fail(self, video: _Video, error: InputError) -> None:
        """Go on without a video; a full disk is raised, as it is one for all of them."""
        if isinstance(error, DiskFull):
            raise error
        video.state, video.error = State.FAILED, str(error)
        self._record(video)

    def _record(self, video: _Video) -> None:
        seconds = 0.0 if video.began is None else time.monotonic() - video.began
        self._folder.record(video, name=video.item.plan.out.name, seconds=seconds)


def _under_way(video: _Video) -> list[futures.Future[None]]:
    return [*video.storing, *([] if video.ending is None else [video.ending])]
