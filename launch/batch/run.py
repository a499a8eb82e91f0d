"""Many videos on many gangs: `flowcache batch`. Whole videos are kept, those that were begun go on.

It puts the batch file, the folder of videos, the cluster and the display together; each of them is elsewhere.
"""

import time
from collections.abc import Callable, Mapping

from engine.files import DiskFull
from launch.batch.file import BatchItem, read_batch
from launch.batch.folder import OutputFolder
from launch.batch.making import Making, Video
from launch.cluster import on_ray
from launch.ending import unwinding_signals
from launch.generate import make_videos
from launch.model.resolve import plan_model
from launch.options import BatchOptions, parse_size
from launch.output.display import BatchDisplay, Row, State, summary
from launch.resume.saved import SavedVideo
from models.errors import InputError
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
        say(summary(batch.rows, seconds=time.monotonic() - began, restarts=batch.making.restarts))
    failed = any(row.state is State.FAILED for row in batch.rows)
    return FAILED if problems or failed else OK


class _Batch:
    """The videos that are still to be made, and what is shown of all of them."""

    def __init__(
        self, options: BatchOptions, folder: OutputFolder, items: list[BatchItem], say: Callable[[str], None]
    ) -> None:
        self._options, self._folder, self._say = options, folder, say
        self.rows: list[Row] = []  # all videos, by line
        self.making = Making(options.base, self._ended, say)
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
                self.making.add(video)

    def make(self, display: BatchDisplay) -> None:
        """Make what is missing."""
        display.update(self.rows)
        making = self.making
        try:
            while queued := [video for video in making.videos.values() if video.state is State.QUEUED]:
                orders = {video.name: order for video in queued if (order := making.begin(video)) is not None}
                if orders:
                    self._make(orders, display)
                making.settle(wait=True)  # which queues a video again if a chunk of it is damaged
                display.update(self.rows)
        except (KeyboardInterrupt, SystemExit):
            making.stop()
            raise
        finally:
            making.close()
            display.update(self.rows)

    def _make(self, orders: Mapping[str, VideoOrder], display: BatchDisplay) -> None:
        options, making = self._options, self.making
        plans = [making.videos[name].plan for name in orders]
        kv_bytes = None if options.kv_memory is None else parse_size(options.kv_memory)
        if (count := len(orders)) < options.gangs:
            self._say(f"of --gangs {options.gangs} no more than {count} can have work: one for each video to make")
        model, most = plan_model(options.base), options.max_restarts  # a line may have a frame rate of its own
        with on_ray(plans, model=model, gangs=options.gangs, kv_bytes=kv_bytes, max_restarts=most) as backend:

            def handle(event: Event) -> None:
                making.handle(backend, event)
                making.settle()
                display.update(self.rows)

            make_videos(backend, orders.values(), handle)
            making.settle(wait=True)  # whatever becomes of the cluster now

    def _video(self, item: BatchItem) -> Video:
        options, plan = self._options, item.plan
        folder = (options.checkpoints or options.out / ".checkpoints") / item.digest

        def say(text: str) -> None:
            self._say(f"line {item.line}: {text}")

        saved = SavedVideo(folder, plan, say)
        return Video.queued(item.digest, plan, saved, line=item.line, priority=item.priority)

    def _ended(self, video: Video, error: InputError | None) -> None:
        """Go on without a video that failed; a full disk is raised, as it is one for all of them."""
        if isinstance(error, DiskFull):
            raise error
        if error is None:
            video.saved.finish(keep=self._options.base.keep_state)
        self._record(video)

    def _record(self, video: Video) -> None:
        seconds = 0.0 if video.began is None else time.monotonic() - video.began
        self._folder.record(video, name=video.plan.out.name, seconds=seconds)
