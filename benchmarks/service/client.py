"""`flowcache serve` as a process with a cluster of its own, and a client of it. It may be killed and started again.

Linux only: it looks for processes and their memory in /proc.
"""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar

import av

from benchmarks.common import ROOT
from models.errors import InputError
from parallel.health.processes import descendants

PROGRAM = (sys.executable, "-m", "launch")
PROMPT = "a red circle moving right"
_ENDED = ("completed", "failed", "cancelled")
_PATIENCE, _LOOK = 240.0, 0.1  # seconds that anything may take that is waited for, and between two looks
_ADDRESS = re.compile(r" at http://(\S+)")
_T = TypeVar("_T")


def environment() -> dict[str, str]:
    """Of the command: one thread, and the packages of this checkout from any folder."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Service:
    """The command in a folder, which has its queue and videos (`served`) and what it says (`said`)."""

    def __init__(self, folder: Path, gangs: int, *options: str) -> None:
        self.served, self._said, self._folder, self._gangs = folder / "served", folder / "said", folder, gangs
        self._options = ("--gangs", str(gangs), "--port", "0", "--threads", "1", *options)
        self._process: subprocess.Popen[bytes] | None = None
        self.past = set[int]()
        """Processes of its lives that have ended."""
        self.address = ""
        """Host and port."""

    def start(self) -> None:
        """Start it; it then takes requests, but has no gang yet."""
        self._said.touch()
        began = len(self.said)
        command = (*PROGRAM, "serve", "--out", str(self.served), *self._options)
        with self._said.open("a") as said:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment(), stdout=said, stderr=said, start_new_session=True
            )
        self.address = self.when(lambda: _ADDRESS.search(self.said[began:]))[1]

    @property
    def said(self) -> str:
        """All that it has said, over all its lives."""
        return self._said.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the controller."""
        assert self._process is not None
        return self._process.pid

    def wait_up(self) -> None:
        """Wait until all gangs can be given work."""

        def ready() -> bool:
            states = list(self.ask("GET", "/health", known=(200, 503))["gangs"].values())
            return states.count("up") == self._gangs

        self.when(ready)

    def when(self, condition: Callable[[], _T | None]) -> _T:
        """What a condition gives as soon as that is true; an `InputError` if the service ends, or does nothing."""
        deadline = time.monotonic() + _PATIENCE
        while not (found := condition()):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"the service has ended or stands still; it said: {self.said.strip()[-500:]}")
            time.sleep(_LOOK)
        return found

    # ---- requests

    @contextmanager
    def open(self, path: str, method: str = "GET", body: Any = None) -> Iterator[HTTPResponse]:
        """The answer to a request, whatever it is; the body is sent as JSON."""
        connection = HTTPConnection(self.address, timeout=_PATIENCE)
        try:
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def read(self, path: str) -> bytes:
        """The bytes of a page that must be there."""
        with self.open(path) as answer:
            content = answer.read()
            if answer.status != 200:
                raise InputError(f"GET {path}: {answer.status} {content[:200]!r}")
            return content

    def ask(self, method: str, path: str, body: Any = None, known: Sequence[int] = (200,)) -> Any:
        """The JSON of an answer with a status that is known."""
        with self.open(path, method, body) as answer:
            content = answer.read()
            if answer.status not in known:
                raise InputError(f"{method} {path}: {answer.status} {content[:200]!r}")
            return json.loads(content)

    def create(self, **body: Any) -> str:
        """Queue a video; its id."""
        return str(self.ask("POST", "/v1/videos", {"prompt": PROMPT, **body})["id"])

    def ended(self, name: str) -> str:
        """Wait for the end of a video; how it ended."""
        return self.when(lambda: (found := self.status(name)) in _ENDED and found or None)

    def status(self, name: str) -> str:
        """Of a video."""
        return str(self.ask("GET", f"/v1/videos/{name}")["status"])

    def job(self, name: str) -> dict[str, Any]:
        """What the service has written of a video on the disk, with times of the machine's clock."""
        found: dict[str, Any] = json.loads((self.served / name / "job.json").read_text())
        return found

    # ---- processes

    def processes(self, name: str = "") -> list[int]:
        """Those that it has started, itself first, with something in their command line."""
        return [pid for pid in (self.pid, *sorted(descendants(self.pid))) if name in _command(pid)]

    def memory(self) -> int:
        """Bytes of all its processes that are no mapped files; what several share counts once."""
        return sum(map(_memory, self.processes()))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it with a signal; its exit status."""
        assert self._process is not None
        self.past |= set(self.processes())
        self._process.send_signal(number)
        return self._process.wait(_PATIENCE)


@contextmanager
def running(folder: Path, gangs: int, *options: str) -> Iterator[Service]:
    """A service, until the end of the context."""
    service = Service(folder, gangs, *options)
    service.start()
    try:
        yield service
    finally:
        service.end()


def frames_digest(video: Path | bytes) -> str:
    """Of all frames of a video."""
    found = hashlib.sha256()
    with av.open(str(video) if isinstance(video, Path) else io.BytesIO(video), "r") as container:
        for frame in container.decode(video=0):
            found.update(frame.to_ndarray(format="rgb24").tobytes())
    return found.hexdigest()


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def _memory(pid: int) -> int:
    """Bytes of a process, with a share of what it shares with others; 0 if it has just ended.

    Files that are mapped, such as libraries, do not count: how they are shared depends on other programs.
    """
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    return total
