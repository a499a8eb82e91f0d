"""Many videos on many gangs: `flowcache batch`. Whole videos are kept, those that were begun go on.

It puts the batch file, the folder of videos, the cluster and the display together; each of them is elsewhere.
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
from engine.files import Damaged, DiskFull
from launch.batch.file import BatchItem, read_batch
from launch.batch.folder import ChunkFiles, OutputFolder
from launch.cluster import on_ray
from launch.ending import check_signals, unwinding_signals
from launch.generate import Backend, make_videos
from launch.options import BatchOptions, parse_size
from launch.output.display import BatchDisplay, Row, State, summary
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import Event, VideoOrder
from parallel.health.exit_codes import BAD_INPUT, FAILED, OK


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
    files: ChunkFiles
    checkpoints: Path  # folder of all, with one for each layout in it
    began: float | None = None
    share: float = 0.0
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
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._stopping = threading.Event()
        for item in items:
            video = self._video(item)
            self.rows.append(video)
            if item.digest in folder.done:
                video.state, video.chunks_done = State.KEPT, video.chunks
                self._clean(video)
                if item.digest not in folder.recorded:
                    self._record(video)
            else:
                self._videos[item.digest] = video
                self._discard_useless(video)

    def make(self, display: BatchDisplay) -> None:
        """Make what is missing."""
        display.update(self.rows)
        with self._pool:
            try:
                while queued := [video for video in self._videos.values() if video.state is State.QUEUED]:
                    for video in queued:
                        video.chunks_done = video.files.count()
                    if waiting := [video for video in queued if not self._end_if_complete(video)]:
                        self._make(waiting, display)
                    self._settle(wait=True)  # which queues a video again if a chunk of it is damaged
                    display.update(self.rows)
            except (KeyboardInterrupt, SystemExit):
                self._stopping.set()
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

            def handle(event: Event) -> None:
                self._handle(backend, event)
                self._settle(wait=False)
                display.update(self.rows)

            make_videos(backend, [self._order(video) for video in waiting], handle)
            self._settle(wait=True)  # whatever becomes of the cluster now

    def _video(self, item: BatchItem) -> _Video:
        options, plan = self._options, item.plan
        request, runtime = plan.request, plan.model.config.runtime_config
        files = ChunkFiles(
            folder=options.out / f".{item.digest}.parts",
            frames=runtime.chunk_width * runtime.temporal_downsample_factor,
            height=request.height,
            width=request.width,
            say=self._say,
        )
        return _Video(
            line=item.line,
            title=plan.request.prompt,
            state=State.QUEUED,
            chunks=plan.size.chunks,
            item=item,
            files=files,
            checkpoints=((options.checkpoints or options.out / ".checkpoints") / item.digest).absolute(),
        )

    def _order(self, video: _Video) -> VideoOrder:
        item, every = video.item, self._options.checkpoint_every
        checkpoint = CheckpointConfig(folder=self._own_checkpoints(video), every=every) if every else None
        order = item.plan.order(item.digest)
        return replace(order, checkpoint=checkpoint, stored=video.chunks_done, priority=item.priority)

    def _own_checkpoints(self, video: _Video) -> Path:
        """Those of this layout: each rank goes on with its own layers alone."""
        base = self._options.base
        return video.checkpoints / (f"pp{base.pp}" if base.split is None else f"pp{base.pp}-{base.split}")

    def _discard_useless(self, video: _Video) -> None:
        """Make room before it is needed: of what earlier runs have left, whole checkpoints of this layout stay."""
        own, wanted = self._own_checkpoints(video), bool(self._options.checkpoint_every)
        others = [path for path in video.checkpoints.glob("*") if path != own or not wanted]
        for path in others:
            shutil.rmtree(path, ignore_errors=True)
        discard(own, whole=False)
        if others and wanted:
            anew = "computed again from its first chunk on, as its checkpoints are of another --pp or --split"
            self._say(f"line {video.line} is {anew}; the chunks that are finished are kept")

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
                video.computed = event.computed
                self._end_if_complete(video)

    def _begin(self, video: _Video, event: messages.Admitted) -> None:
        for line in event.damage:
            self._say(line)
        video.began = video.began or time.monotonic()
        video.state, video.gang = State.RUNNING, event.gang

    def _keep(self, backend: Backend, chunk: messages.ChunkMade) -> None:
        video = self._videos[chunk.video]
        try:
            video.files.write(chunk.index, chunk.frames)
            video.chunks_done = chunk.index + 1
        except InputError as error:
            self._fail(video, error)
            backend.cancel(chunk.video)

    def _progress(self, video: _Video, event: messages.Progressed) -> None:
        now, share = time.monotonic(), event.progress.tick / event.progress.ticks
        if not video.share:
            video.began, video.share = now, share
        done = share - video.share
        video.computed = event.progress.computed_fraction
        video.seconds_left = None if done <= 0 or video.began is None else (now - video.began) * (1 - share) / done

    def _end_if_complete(self, video: _Video) -> bool:
        """Begin to encode a video all of whose chunks are there."""
        if video.chunks_done < video.chunks:
            return False
        plan = video.item.plan
        fps = plan.model.config.runtime_config.fps
        video.ending = self._pool.submit(video.files.encode, plan.out, video.chunks, fps, self._stopping)
        return True

    def _settle(self, *, wait: bool) -> None:
        """Take note of videos that are encoded, or could not be."""
        while wait and futures.wait([video.ending for video in self._videos.values() if video.ending], 0.2).not_done:
            check_signals()
        for video in self._videos.values():
            if (ending := video.ending) is None or not ending.done():
                continue
            video.ending = None
            try:
                ending.result()
            except futures.CancelledError:
                continue
            except InputError as error:
                if isinstance(error, Damaged) and not video.damaged:  # a second time its disk is not to be trusted
                    video.state, video.damaged = State.QUEUED, True
                else:
                    self._fail(video, error)
                continue
            self._clean(video)
            video.state, video.seconds_left = State.DONE, None
            self._record(video)

    def _clean(self, video: _Video) -> None:
        """The video is there: what it was made of is not needed any more."""
        video.files.remove()
        shutil.rmtree(video.checkpoints, ignore_errors=True)
        if self._options.checkpoints is None:
            with suppress(OSError):
                video.checkpoints.parent.rmdir()  # unless there are those of others

    def _fail(self, video: _Video, error: InputError) -> None:
        """Go on without a video; a full disk is raised, as it is one for all of them."""
        if isinstance(error, DiskFull):
            raise error
        video.state, video.error = State.FAILED, str(error)
        self._record(video)

    def _record(self, video: _Video) -> None:
        seconds = 0.0 if video.began is None else time.monotonic() - video.began
        self._folder.record(video, name=video.item.plan.out.name, seconds=seconds)
