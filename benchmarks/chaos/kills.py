"""SIGKILL at random times: what becomes of a video of `generate --checkpoint`, and of those of `flowcache serve`.

- generate: the command is killed and run again, up to twice for each video.
- service: the controller of a service is killed and started again, while it starts or while it makes videos.
- service-rank: a rank of a gang of the service is killed, while a viewer has one of the videos streamed to it.

In the end all videos are to be complete, with the frames of runs that nothing disturbs, and no process may be left.
"""

import math
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.faults import Kind, marked, survivors
from benchmarks.common import Row, Verdict, bullets, machine_line, publish
from benchmarks.service.client import PROGRAM, PROMPT, Service, environment, frames_digest
from models.errors import InputError

_SECONDS, _STEPS = 8, 8  # of a video, and of a chunk of it
_SEEDS, _TWICE = 3, 2  # different videos of `generate`, and kills of each
_MOMENTS, _LOOK = (0.4, 1.0), 0.005  # between which it is killed, as shares of what it computes; seconds between looks
_EVERY, _WORKING = 5, 4.0  # one in so many kills is of a service that starts; seconds within which the kill comes
_GANGS, _LINGER = 1, 30.0  # seconds for processes to go
_VIDEOS = 2  # that a service is given before each kill
_PATIENCE = 120.0
_FILES = {"job.json", "stream", "video.mp4"}  # of a finished video of a service
_NOTES = """\
After: seconds that generate had computed for, or since a video was being made. Done: chunks that were on the
disk then. Right are videos and streams whose frames are those of a run that nothing disturbs. Left: processes, and
files that do not belong there."""


@dataclass(kw_only=True, slots=True)
class Kills:
    """What came of the kills of one kind."""

    kind: Kind
    wanted: int  # kills
    rows: list[Row] = field(default_factory=list)  # one of each kill
    videos: int = 0
    complete: int = 0
    right: int = 0  # with the frames of an undisturbed run
    streams: int = 0  # that were read while ranks were killed
    streamed: int = 0  # of these, with all frames
    left: list[str] = field(default_factory=list)

    def hit(self, after: float, what: str, done: int) -> None:
        """A kill."""
        row: Row = {"kind": self.kind, "number": len(self.rows) + 1, "after_s": round(after, 2), "what": what}
        self.rows.append(row | {"done": done})

    def add(self, found: str | None, wanted: str) -> None:
        """A video, by the digest of its frames; None if it is not there."""
        self.videos += 1
        self.complete += found is not None
        self.right += found == wanted

    @property
    def verdict(self) -> Verdict:
        """All that was to be."""
        kills, videos = len(self.rows), self.videos
        measured = (
            f"{kills} kills, {self.complete} of {videos} videos complete, {self.right} right, {len(self.left)} left"
        )
        wanted = f"{self.wanted} kills, all complete and right, 0 left"
        if self.streams:
            measured += f", {self.streamed} of {self.streams} streams"
        good = kills == self.wanted and 0 < videos == self.complete == self.right and self.streams == self.streamed
        return Verdict(f"SIGKILL, {self.kind}", measured, wanted, good and not self.left)


def run_kills(out: Path, kinds: Sequence[Kind], count: int, seed: int, log: Callable[[str], None]) -> int:
    """Kill `generate` so many times and a service and its ranks half as often, and report; the exit status."""
    found = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        for kind in kinds:
            folder = Path(name) / kind
            folder.mkdir()
            kills = Kills(kind=kind, wanted=count if kind is Kind.GENERATE else max(1, count // 2))
            (_kill_generate if kind is Kind.GENERATE else _kill_service)(kills, folder, random.Random(seed), log)
            found.append(kills)
    videos = f"Videos of {_SECONDS} s and {_STEPS} steps, a checkpoint a chunk, one gang of pp 2 of a service"
    return publish(
        out,
        "chaos_kills",
        title="SIGKILL at random times",
        about=f"{videos}; seed {seed}. {machine_line()}.\n\n{_NOTES}",
        verdicts=[kills.verdict for kills in found],
        sections={
            "Kills": [row for kills in found for row in kills.rows],
            "Left": bullets(f"{kills.kind}: {one}" for kills in found for one in kills.left),
        },
    )


# ---- generate


def _command(out: Path, *options: object) -> list[str]:
    given = ("--seconds", _SECONDS, "--steps", _STEPS, "--threads", 1, "--out", out, *options)
    return [*PROGRAM, "generate", *map(str, given)]


def _undisturbed(folder: Path, videos: int) -> list[str]:
    """Digests of videos with the seeds from 0 on."""
    out = folder / "undisturbed"
    ran = subprocess.run(_command(out, *[PROMPT] * videos), env=environment(), capture_output=True, check=False)
    if ran.returncode:
        raise InputError(f"generate fails where nothing disturbs it: {ran.stderr.decode()[-300:]}")
    return [frames_digest(path) for path in sorted(out.glob("*.mp4"))]


def _kill_generate(kills: Kills, folder: Path, draw: random.Random, log: Callable[[str], None]) -> None:
    """Kill runs of the command until that was done as often as wanted, and let every video be finished."""
    wanted = _undisturbed(folder, _SEEDS)
    whole, _ = _run(_command(folder / "0.mp4", PROMPT))
    while len(kills.rows) < kills.wanted and kills.videos < 3 * kills.wanted:
        out, state, seed = folder / f"{kills.videos}.mp4", folder / f"{kills.videos}.state", kills.videos % _SEEDS
        out.unlink(missing_ok=True)
        command = _command(out, PROMPT, "--seed", seed, "--checkpoint", state, "--checkpoint-every", 1)
        with marked() as mark:
            for _ in range(min(_TWICE, kills.wanted - len(kills.rows))):
                after, killed = _run(command, draw.uniform(*_MOMENTS) * whole)
                if not killed:
                    break
                done = len(list(state.glob("*/segments-*/*.mp4")))
                kills.hit(after, f"video {kills.videos}", done)
                log(f"generate, video {kills.videos}: killed after {after:.1f} s, with {done} chunks")
            _run(command)
            kills.left += survivors(mark, _LINGER).values()
        kills.left += [
            path.name for path in folder.iterdir() if path.suffix not in (".mp4", "") or ".partial" in path.name
        ]
        kills.add(frames_digest(out) if out.exists() else None, wanted[seed])


def _run(command: Sequence[str], most: float = math.inf) -> tuple[float, bool]:
    """Run a command, and kill it once it has computed for so many seconds, which do not depend on other programs.

    Hands back the seconds that it has computed, and whether it was killed.
    """
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, deadline = 0.0, time.monotonic() + _PATIENCE
    try:
        while seconds < most and time.monotonic() < deadline:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return seconds, False
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            time.sleep(_LOOK)
        return seconds, True
    finally:
        process.kill()
        process.wait()


# ---- the service


class _Videos:
    """Those that a service was given, with seeds from 0 on, and viewers of some."""

    def __init__(self, service: Service) -> None:
        self._service, self.names = service, list[str]()
        self._pool = ThreadPoolExecutor(8)
        self.streams: dict[str, Future[bytes]] = {}

    def add(self, count: int) -> None:
        for _ in range(count):
            size, seed = {"seconds": _SECONDS, "num_inference_steps": _STEPS}, len(self.names)
            self.names.append(self._service.create(**size, seed=seed, priority=seed % 2))

    def busy(self) -> str | None:
        """One that is being made at this moment, the latest."""
        return next((name for name in self.names[::-1] if self._service.status(name) == "in_progress"), None)

    def watch(self, name: str) -> None:
        """Have a video streamed to a viewer."""
        if name not in self.streams:
            self.streams[name] = self._pool.submit(self._service.read, f"/v1/videos/{name}/stream")

    def stored(self) -> int:
        """Chunks on the disk, of all videos that are being made."""
        return len(list(self._service.served.glob("*/state/segments-*/*.mp4")))

    def check(self, kills: Kills, wanted: Sequence[str]) -> None:
        """Wait until all have ended, and compare."""
        for name, frames in zip(self.names, wanted, strict=True):
            there = self._service.ended(name) == "completed"
            kills.add(frames_digest(self._service.read(f"/v1/videos/{name}/content")) if there else None, frames)
            if name in self.streams:
                kills.streams += 1
                kills.streamed += frames_digest(self.streams[name].result(_PATIENCE)) == frames


def _hit_controller(kills: Kills, service: Service, videos: _Videos, draw: random.Random) -> str:
    """Kill the controller, while its cluster starts or videos are made, and start it again."""
    began = time.monotonic()
    if starting := len(kills.rows) % _EVERY == 1:
        time.sleep(draw.uniform(0.0, _WORKING))
    else:
        service.wait_up()
        service.when(videos.busy)
        began = time.monotonic()
        time.sleep(draw.uniform(0.0, _WORKING))
    done, after = videos.stored(), time.monotonic() - began
    service.end(signal.SIGKILL)
    service.start()
    what = f"the controller, while it {'starts' if starting else 'makes videos'}"
    kills.hit(after, what, done)
    return what


def _hit_rank(kills: Kills, service: Service, videos: _Videos, draw: random.Random) -> str:
    """Kill a rank while a video is made that somebody watches."""
    service.wait_up()
    videos.watch(service.when(videos.busy))
    began = time.monotonic()
    time.sleep(draw.uniform(0.0, _WORKING))
    ranks, done, lost = service.processes("RankActor"), videos.stored(), service.said.count("was lost")
    pid = draw.choice(ranks)
    os.kill(pid, signal.SIGKILL)
    what = f"rank {ranks.index(pid) + 1} of {len(ranks)}"
    kills.hit(time.monotonic() - began, what, done)
    service.when(lambda: service.said.count("was lost") > lost)
    return what


def _kill_service(kills: Kills, folder: Path, draw: random.Random, log: Callable[[str], None]) -> None:
    service = Service(folder, _GANGS, "--pp", "2", "--checkpoint-every", "1")
    videos, hit = _Videos(service), _hit_controller if kills.kind is Kind.SERVICE else _hit_rank
    with marked() as mark:
        service.start()
        try:
            for _ in range(kills.wanted):
                videos.add(_VIDEOS)
                what = hit(kills, service, videos, draw)
                log(f"{kills.kind}: {what}")
            service.wait_up()
            wanted = _undisturbed(folder, len(videos.names))
            videos.check(kills, wanted)
            kills.left += survivors(mark, _LINGER, service.past).values()
        finally:
            service.end()
        kills.left += survivors(mark, _LINGER).values()
    for name in videos.names:
        kills.left += [f"{name}/{path.name}" for path in (service.served / name).iterdir() if path.name not in _FILES]
    kills.left += [str(path) for path in service.served.rglob(".*") if path.name != ".lock"]
