"""Where videos are made: one interface for this process, for the ranks that it leads, and for a Ray cluster.

Each backend is given jobs and yields events, which are those of the cluster's controller; so there is one loop. A file
for each kind, since importing Ray takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from engine.checkpoint.files import CheckpointConfig
from engine.record import Recorder
from launch.ending import check_signals
from launch.plan import Plan
from models.errors import InputError
from parallel.cluster.messages import Event, VideoFailed


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A video to make."""

    video: str  # its name in events
    plan: Plan
    recorder: Recorder | None = None  # of its run; not on a Ray cluster
    checkpoint: CheckpointConfig | None = None  # where and how often to note how far it is; on a Ray cluster
    stored: int = 0  # chunks that the caller has already; on a Ray cluster
    priority: int = 0  # higher goes first; on a Ray cluster


class Backend(Protocol):
    """Makes videos."""

    def submit(self, job: Job) -> None:
        """Queue a video. Raises `InputError`: it can never be made here."""

    def cancel(self, video: str) -> None:
        """Make no more of a video; there are no more events of it."""

    def run(self) -> Iterator[Event]:
        """Make what was submitted.

        Yields:
            What happens; the first event of a backend that is ready is `GangReady`. A chunk counts as stored when the
            next event is asked for.

        Raises:
            InputError: a model cannot make what is asked for.
        """


def make_videos(backend: Backend, jobs: Iterable[Job], handle: Callable[[Event], None]) -> None:
    """The loop of every command: submit the jobs, and handle what happens until all have ended; errors as in `run`."""
    for job in jobs:
        try:
            backend.submit(job)
        except InputError as error:
            handle(VideoFailed(video=job.video, message=str(error)))
    for event in backend.run():
        check_signals()
        handle(event)
