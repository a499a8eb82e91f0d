"""Makes the jobs of a store on the gangs of a Ray cluster, on the thread that calls `run`; others queue and cancel.

The controller and all that is made with it belong to that thread. What others want is handed to it and done between two
of its rounds. A job is an order like that of a line of a batch: the same checks, chunks, checkpoints and files.
"""

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint.files import furthest
from engine.files import link_file, remove_folder, write_errors
from launch.batch.file import plan_line
from launch.batch.making import Making, Video
from launch.cluster import on_ray
from launch.ending import CommandFailed, check_signals
from launch.media import Bounds
from launch.options import parse_size, together
from launch.output.display import State
from launch.plan import Plan
from launch.resume.saved import SavedVideo
from launch.serve.live import LiveVideos
from launch.serve.metrics import Metrics
from launch.serve.options import ServeOptions
from launch.serve.prompts import TooLate, change_job
from launch.serve.store import Job, Status, Store
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.controller import Controller
from parallel.cluster.gang import GangState, GangView
from parallel.cluster.messages import Event
from parallel.health.exit_codes import FAILED

_PIXELS = 2**25  # of a picture that a video starts from
_MOST = 10_000  # videos at a time on one gang, without --concurrency


class Maker:
    """The videos of a service; `say` takes lines for people."""

    def __init__(
        self, options: ServeOptions, limit: Plan, store: Store, metrics: Metrics, say: Callable[[str], None]
    ) -> None:
        self._options, self._limit, self._store, self._metrics, self._say = options, limit, store, metrics, say
        self._making = Making(options.base, self._ended, say)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Job, Plan | None]] = deque()  # not handed to the controller yet
        self._waiting.extend((job, None) for job in store.jobs() if job.unfinished)
        self._asked: deque[tuple[Future[Any], Callable[[Controller], Any]]] = deque()  # what else others want done
        self.live = LiveVideos()
        """What can be watched."""
        self._over: list[Video] = []  # those that have ended, of which events may still be on their way
        self._backend: Controller | None = None
        for job in store.jobs():
            if not (job.unfinished or job.continues):  # a service that was killed has not come to it
                shutil.rmtree(self.state(job.id), ignore_errors=True)

    # ---- for other threads

    def queue(self, job: Job, plan: Plan) -> None:
        """Make a job's video, by its plan."""
        with self._lock:
            self._waiting.append((job, plan))
        self._wake()

    def cancel(self, job: Job) -> Future[None]:
        """Make no more of a job's video; done once its slots are free and its chunks are gone."""
        done = Future[None]()
        with self._lock:
            waiting = [entry for entry in self._waiting if entry[0] is job]
            if not waiting:
                self._asked.append((done, partial(self._drop, job)))
            else:
                self._waiting.remove(waiting[0])
                self._close(job, "cancelled")
                done.set_result(None)
        self._wake()
        return done

    def change_prompt(self, job: Job, prompt: str) -> Future[dict[str, Any]]:
        """Make the chunks of a job's video that have not begun of another prompt, or raise a `TooLate`.

        The result is its entry of `prompts_of`. It is given once the change is on the disk.
        """
        done = Future[dict[str, Any]]()
        self._asked.append((done, partial(self._change_prompt, job, prompt)))
        self._wake()
        return done

    def remove(self, job: Job) -> None:
        """Forget a job that has ended, with its video and what a longer one would go on from."""
        self._store.remove(job)
        remove_folder(self.state(job.id))

    def gangs(self) -> list[GangView]:
        """All gangs at this moment; none before there is a cluster."""
        backend = self._backend
        return [] if backend is None else backend.gangs()

    def plan(self, line: dict[str, Any], folder: Path) -> Plan:
        """The plan of a line, whose files are in a folder; an `InputError` says why it cannot be made here."""
        return plan_line(line, folder, self._options.base, out=folder, bounds=self.bounds)

    def state(self, name: str) -> Path:
        """The folder of chunks and checkpoints of a job, as `SavedVideo` has it."""
        folder = self._options.checkpoints
        return self._store.state(name) if folder is None else folder / name

    @property
    def bounds(self) -> Bounds:
        """Of pictures and clips that videos start from."""
        return Bounds(pixels=_PIXELS, seconds=self._options.max_seconds)

    # ---- the thread of the controller

    def run(self) -> None:
        """Make videos until a signal ends it; `CommandFailed` if the cluster or its last gang is lost."""
        options, kv_memory = self._options, self._options.kv_memory
        kv_bytes = None if kv_memory is None else parse_size(kv_memory)
        largest = [self._limit] * max(options.gangs, together(options.base, _MOST, ranks=True))
        with on_ray(
            largest, gangs=options.gangs, kv_bytes=kv_bytes, max_restarts=options.max_restarts, check=self._look
        ) as backend:
            self._backend = backend
            try:
                with closing(backend.run(lasting=True)) as events:
                    for event in events:
                        self._handle(backend, event)
            finally:
                self._making.stop()
                self._making.close()

    def _wake(self) -> None:
        if (backend := self._backend) is not None:
            backend.wake()

    def _look(self) -> None:
        """Between two rounds of the controller, when no event is on its way: do what was asked for meanwhile."""
        check_signals()
        backend = self._backend
        assert backend is not None
        for video in self._making.settle():
            self._submit(backend, video)
        over, self._over = self._over, []
        for video in over:
            self._forget(video)
        while self._waiting:
            with self._lock:
                job, plan = self._waiting.popleft()
            self._begin(backend, job, plan)
        while self._asked:
            done, do = self._asked.popleft()
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(do(backend))
                except (TooLate, InputError) as error:
                    done.set_exception(error)

    def _change_prompt(self, job: Job, prompt: str, backend: Controller) -> dict[str, Any]:
        video, first = self._making.videos.get(job.id), None
        if video is not None and job.unfinished and not video.damaged:
            kept = video.plan.size.schedule.begun(furthest(video.saved.checkpoints))
            first = backend.next_entry(job.id, max(video.chunks_done, kept))  # also of a process before this one
        if video is None or first is None:
            why = "all of its chunks have begun" if job.unfinished else f"it is {job.status}"
            raise TooLate(f"no chunk of the video {job.id} is left for a new prompt: {why}")
        video.plan = change_job(self._store, job, video.plan, first, prompt)
        video.saved = SavedVideo(self.state(job.id), video.plan, partial(self._say_of, job))
        backend.change_prompt(job.id, first, prompt)
        return next(one for one in job.prompts if one["chunk"] == first)

    def _begin(self, backend: Controller, job: Job, plan: Plan | None) -> None:
        folder = self._store.folder(job)
        try:
            plan = plan or self.plan(job.line, folder)
        except InputError as error:  # it was accepted by a service with other options
            return self._fail(job, str(error))
        plan = replace(plan, out=self._store.video(job))
        saved = SavedVideo(self.state(job.id), plan, partial(self._say_of, job))
        video = Video.queued(job.id, plan, saved, line=job.number, priority=job.line["priority"])
        self._making.add(video)
        self._submit(backend, video)

    def _say_of(self, job: Job, text: str) -> None:
        self._say(f"{job.id}: {text}")

    def _submit(self, backend: Controller, video: Video) -> None:
        """Have what is missing of a video made."""
        try:
            order = self._making.begin(video)
            self.live.begin(video)
            if order is not None:
                backend.submit(replace(order, watched=True))
        except InputError as error:
            video.state = State.FAILED
            self._ended(video, error)

    def _handle(self, backend: Controller, event: Event) -> None:
        if isinstance(event, messages.GangDown) and all(view.state is GangState.DOWN for view in backend.gangs()):
            text = f"no gang is left: {event.message}. What is queued goes on when the service is started again"
            raise CommandFailed(text, status=FAILED, shown_here=True)
        self._making.handle(backend, event)
        self._metrics.handle(event)
        if isinstance(event, messages.GangLost):
            for name in event.videos:
                if (job := self._store.get(name)) is not None:
                    job.restarts += 1
        if isinstance(event, messages.VideoEvent) and (job := self._store.get(event.video)) is not None:
            self._show(event, job)

    def _show(self, event: messages.VideoEvent, job: Job) -> None:
        """Note how far a job is, for those who ask and for those who watch."""
        live = self.live.get(job.id)
        if isinstance(event, messages.Admitted) and job.status == "queued":
            job.status, job.began_at = "in_progress", time.time()
            self._save(job)
        elif isinstance(event, messages.Progressed):
            job.computed = event.progress.computed_fraction
        elif isinstance(event, messages.Ticked) and live is not None:
            live.ticked(event)
            job.progress = max(job.progress, min(99, live.percent))

    def _ended(self, video: Video, error: InputError | None) -> None:
        self._over.append(video)
        job = self._store.get(video.name)
        if job is None or not job.unfinished:  # it was cancelled meanwhile
            return
        if error is not None:
            return self._fail(job, str(error))
        job.progress, job.computed = 100, video.computed
        keep = self._options.base.keep_state
        try:
            with write_errors(stream := self._store.stream(job)):
                shutil.copytree(video.saved.segments.folder, stream, copy_function=link_file, dirs_exist_ok=True)
        except InputError as failure:
            return self._fail(job, str(failure))
        if keep:  # a longer one may be asked for as soon as it is completed
            job.continues = self._finish(video, keep=True)
        self._close(job, "completed")
        if not keep:  # not before, in case this process is killed
            self._finish(video, keep=False)
        self._metrics.done(job)
        job.nbytes = self._store.size(job)
        self._save(job)

    def _finish(self, video: Video, *, keep: bool) -> bool:
        """Remove what a video was made of but for what is to `keep`; False if that cannot be written."""
        try:
            video.saved.finish(keep=keep)
        except InputError as failure:
            self._say(str(failure))
            return False
        return True

    def _forget(self, video: Video) -> None:
        """Remove what a video that has ended leaves, once nothing more of it is written."""
        if video.under_way:
            return self._over.append(video)
        self._making.videos.pop(video.name, None)
        job = self._store.get(video.name)
        if job is None or not job.continues:
            video.saved.remove()
        if job is not None:
            self._store.clean(job)

    def _fail(self, job: Job, message: str) -> None:
        self._say(f"{job.id} failed: {message}")
        job.error = message
        self._close(job, "failed")

    def _drop(self, job: Job, backend: Controller) -> None:
        """Cancel a video that the controller knows, or that has ended meanwhile."""
        if not job.unfinished:
            return
        backend.cancel(job.id)
        self._close(job, "cancelled")
        if (video := self._making.videos.get(job.id)) is not None:
            video.state = State.FAILED  # so that no file is made of it any more
            self._over.append(video)

    def _close(self, job: Job, status: Status) -> None:
        """A job has ended, and says so once it is written.

        A full disk does not end the service; what could not be written is made again.
        """
        ended = replace(job, status=status, completed_at=time.time())
        self._save(ended)
        job.status, job.completed_at = ended.status, ended.completed_at
        self.live.end(job.id)
        self._metrics.forget(job)
        if job.id not in self._making.videos:  # else it is cleaned when nothing is written any more
            self._store.clean(job)

    def _save(self, job: Job) -> None:
        try:
            self._store.save(job)
        except InputError as error:
            self._say(str(error))
