"""Jobs on the disk: each video has a folder with a `job.json` that is replaced as a whole, so a kill loses none.

The line of a job is that of a batch file, and paths in it are relative to the job's folder. Who makes videos of them is
not known here. May be used by several threads.
"""

import fcntl
import json
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from engine.files import atomic_write, check_folder, remove_folder, write_errors
from models.errors import InputError

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
_JOB, _VIDEO, _LOCK, _STREAM, _STATE = "job.json", "video.mp4", ".lock", "stream", "state"
_ID = re.compile(r"video_[0-9a-f]{24}")
_UNFINISHED = ("queued", "in_progress")


class Full(Exception):  # noqa: N818 - reads as what it says
    """There is no room for another job; its text says of what."""


@dataclass(kw_only=True, slots=True)
class Job:
    """A video that was asked for. Figures that are not needed after a kill are written when it begins and ends."""

    id: str
    number: int  # jobs are numbered as they come
    line: dict[str, Any]  # as of a batch file
    seconds: float  # of the whole video
    size: str  # width x height
    created_at: float  # by the clock of the machine, in seconds
    status: Status = "queued"
    progress: int = 0  # in percent
    began_at: float | None = None
    completed_at: float | None = None
    error: str | None = None
    computed: float | None = None  # chunk-steps that were computed, as a share
    restarts: int = 0  # gangs that were lost while they made it
    nbytes: int = 0  # of all that is kept of the finished video
    continues: bool = False  # a longer video can be made of it
    prompts: list[dict[str, Any]] = field(default_factory=list)  # of which each chunk is made, as clients read them

    @property
    def unfinished(self) -> bool:
        """Whether it is still to be made."""
        return self.status in _UNFINISHED


class Store:
    """The folder of a service, as a context; only one service at a time can have it."""

    def __init__(self, root: Path, *, max_queue: int, max_bytes: int | None, say: Callable[[str], None]) -> None:
        self.root, self._max_queue, self._max_bytes, self._say = root, max_queue, max_bytes, say
        self._jobs: dict[str, Job] = {}  # by id, the oldest first
        self._lock = threading.RLock()
        self._numbers = 0

    def __enter__(self) -> Self:
        """Take the folder and read what is there; what ended jobs have left unfinished is removed."""
        check_folder(self.root)
        with write_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._held = (self.root / _LOCK).open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            raise InputError(f"another service has {self.root}: end it, or give another folder with --out") from None
        found = [job for path in self.root.iterdir() if _ID.fullmatch(path.name) and (job := self._read(path))]
        for job in sorted(found, key=lambda job: job.number):
            self._jobs[job.id] = job
            if not job.unfinished:
                self.clean(job)
        self._numbers = max((job.number for job in found), default=-1) + 1
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def folder(self, job: Job) -> Path:
        """Where a job's files are."""
        return self.root / job.id

    def video(self, job: Job) -> Path:
        """The finished video."""
        return self.folder(job) / _VIDEO

    def state(self, name: str) -> Path:
        """The folder of chunks and checkpoints of a job, if it is not elsewhere."""
        return self.root / name / _STATE

    def stream(self, job: Job) -> Path:
        """The segments of a finished video."""
        return self.folder(job) / _STREAM

    def new_folder(self) -> Path:
        """A folder for a job to come, for what was uploaded; it becomes one by `add`."""
        with self._lock:
            self._check_room()
        folder = self.root / f"video_{secrets.token_hex(12)}"
        with write_errors(folder):
            folder.mkdir()
        return folder

    def add(
        self, folder: Path, line: dict[str, Any], *, seconds: float, size: str, prompts: list[dict[str, Any]]
    ) -> Job:
        """Queue a job, whose files are in a new folder; a `Full` if the queue is, or the disk."""
        with self._lock:
            self._check_room()
            number, now = self._numbers, time.time()
            about: dict[str, Any] = {"line": line, "seconds": seconds, "size": size, "prompts": prompts}
            job = Job(id=folder.name, number=number, created_at=now, **about)
            self._numbers += 1
            self.save(job)
            self._jobs[job.id] = job
            return job

    def save(self, job: Job) -> None:
        """Write a job; an `InputError` if the disk does not take it."""
        with self._lock, atomic_write(self.folder(job) / _JOB, "the job") as file:
            file.write(json.dumps(asdict(job)).encode())

    def get(self, name: str) -> Job | None:
        """The job of an id; any text may be asked for."""
        return self._jobs.get(name)

    def jobs(self) -> list[Job]:
        """All of them, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def counts(self) -> Mapping[Status, int]:
        """How many there are of each status."""
        counts = Counter(job.status for job in self.jobs())
        return {status: counts[status] for status in get_args(Status)}

    def size(self, job: Job) -> int:
        """Bytes of all files of a job."""
        total = 0
        for path in self.folder(job).rglob("*"):
            with suppress(OSError):  # it has just gone
                total += path.stat().st_size
        return total

    def clean(self, job: Job) -> None:
        """Remove all files of a job but the job itself and what is kept of its video."""
        kept = {_JOB} | ({_VIDEO, _STREAM} if job.status == "completed" else set())
        if job.continues:
            kept |= {_STATE, *(str(job.line.get(name)) for name in ("image", "video", "script"))}
        for path in self.folder(job).glob("*"):
            if path.name not in kept:
                remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)

    def remove(self, job: Job) -> None:
        """Forget a job, with its video."""
        with self._lock:
            self._jobs.pop(job.id, None)
            (self.folder(job) / _JOB).unlink(missing_ok=True)
        remove_folder(self.folder(job))

    def _check_room(self) -> None:
        unfinished = [job for job in self._jobs.values() if job.unfinished]
        if len(unfinished) >= self._max_queue:
            raise Full(f"the queue is full: {len(unfinished)} videos are to be made; try again later")
        if self._max_bytes is None:
            return
        held = sum(job.nbytes for job in self._jobs.values()) + sum(map(self.size, unfinished))
        if held >= self._max_bytes:
            raise Full(f"the videos take {held:,} of {self._max_bytes:,} bytes: delete some")

    def _read(self, folder: Path) -> Job | None:
        """The job of a folder; one that was never queued is removed."""
        try:
            values = json.loads((folder / _JOB).read_bytes())
            known = {one.name for one in fields(Job)}
            job = Job(**{name: value for name, value in values.items() if name in known})
            if job.id != folder.name:
                raise ValueError("it is of another folder")
            return job
        except FileNotFoundError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            self._say(f"{folder / _JOB} is damaged and left out: {error}")
        return None
