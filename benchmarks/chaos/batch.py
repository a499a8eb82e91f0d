"""Failures around `flowcache batch`: what becomes of the videos when the command is run again, as its user would.

Each kind begins the same batch in a folder of its own, does its harm once chunks and a checkpoint are there, waits for
the command's end and runs it again. Videos are compared, byte by byte, with those of a run that nothing disturbs.

- driver: SIGTERM to the command.
- part, checkpoint: SIGTERM, and zeros in the middle of a chunk's file, or of the newest checkpoint's, before the second
  run.
- disk: the disk fills up, and there is room again before the second run. The disk is a small one in memory, mounted
  where Linux lets any user mount: in a user namespace. Where it does not, this kind is skipped.
- gcs: SIGKILL to Ray's GCS.
"""

import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.faults import MARK, Kind, marked, processes_of, survivors
from benchmarks.common import Row, Verdict, bullets, machine_line, publish
from benchmarks.service.client import PROGRAM
from models.errors import InputError
from parallel.health.exit_codes import BAD_INPUT, FAILED

_PROGRAM = (*PROGRAM, "batch")
_PROMPTS = ("a red circle moving right", "a blue cross moving up", "a green square moving down")
_CHUNKS, _BEGUN = 6, 2  # chunks of a video; files of chunks that are there when the harm is done
DISK = 48
"""MiB of the small disk."""
_ZEROS = 4000  # bytes that are damaged
_PARTS, _MANIFESTS = ".checkpoints/*/segments-*/*.mp4", ".checkpoints/**/manifest.json"
_PATIENCE, _LINGER = 180.0, 20.0  # seconds for a command, and for its processes to go
_TERMINATED = 128 + signal.SIGTERM
_STATUS = dict.fromkeys((Kind.DRIVER, Kind.PART, Kind.CHECKPOINT), _TERMINATED) | {Kind.DISK: BAD_INPUT}
_NOTES = """\
Status and again: of the first run and of the second. Ended after: seconds from the harm to the end of the first run.
Left: processes after each, and hidden files after both. Said: the last line of the first run; of damage, what the
second says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Harm:
    """What came of one kind."""

    kind: Kind
    status: int  # of the first run
    seconds: float  # from the harm to its end
    again: int  # the second run's status
    right: int  # videos that are those of the undisturbed run
    left: tuple[str, ...]  # processes after each run, and hidden files after both
    said: str  # the last line of the first run; of damage, what the second says of it

    @property
    def verdict(self) -> Verdict:
        """All is as it should be, and damage is said."""
        wanted = _STATUS.get(self.kind, FAILED)
        good = (self.status, self.again, self.right, self.left) == (wanted, 0, len(_PROMPTS), ())
        measured = f"{self.right} right, status {self.status}, then {self.again}, {len(self.left)} left"
        asked = f"{len(_PROMPTS)} right, status {wanted}, then 0, 0 left"
        return Verdict(f"batch, {self.kind}", measured, asked, good and bool(self.said))

    @property
    def row(self) -> Row:
        """A line of the table."""
        row: Row = {"kind": self.kind, "status": self.status, "ended_after_s": round(self.seconds, 1)}
        return row | {"again": self.again, "right": self.right, "left": len(self.left), "said": self.said}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A folder that videos are made in."""

    folder: Path  # as it is seen from here
    inside: Path  # as the command sees it
    enter: tuple[str, ...] = ()  # goes before a command that is run there

    def files(self, pattern: str) -> list[Path]:
        """Those of a pattern, oldest first."""
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def videos(self) -> dict[str, str]:
        """Digests of the videos, by name."""
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.folder.glob("*.mp4")}

    def start(self, work: Path, program: Sequence[str]) -> subprocess.Popen[bytes]:
        """Run the command; what it says goes into `work`, which has the batch file."""
        options = ("--pp", "2", "--concurrency", str(len(_PROMPTS)), "--checkpoint-every", "1", "--threads", "1")
        command = (*self.enter, *program, str(work / "prompts.jsonl"), "--out", str(self.inside), *options)
        with (work / "said").open("w") as said:
            return subprocess.Popen(command, stdout=said, stderr=said)


@contextmanager
def small_disk(work: Path) -> Iterator[Place]:
    """A disk of `DISK` MiB that only commands that enter it see mounted; an `InputError` says why there is none."""
    inside = work / "disk"
    inside.mkdir()
    mount = f"mount -t tmpfs -o size={DISK}m flowcache '{inside}' && echo ready && exec sleep infinity"
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount)
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    try:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=unmarked)
    except FileNotFoundError:
        raise InputError("there is no unshare here, which belongs to util-linux") from None
    assert holder.stdout is not None
    try:
        answer = holder.stdout.readline().strip()
        if answer != "ready":
            raise InputError(f"no disk can be mounted here: {answer}")
        enter = ("nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials")
        yield Place(folder=Path(f"/proc/{holder.pid}/root{inside}/videos"), inside=inside / "videos", enter=enter)
    finally:
        holder.kill()
        holder.wait()


@contextmanager
def plain_folder(work: Path) -> Iterator[Place]:
    """A folder of this disk."""
    yield Place(folder=work / "videos", inside=work / "videos")


def run_batches(out: Path, kinds: Sequence[Kind], log: Callable[[str], None], program: Sequence[str] = _PROGRAM) -> int:
    """Do the harm of each kind to a program, and report; the exit status."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, marked() as mark:
        log("batch: undisturbed")
        with plain_folder(_work(Path(name), "undisturbed")) as place:
            process = place.start(place.folder.parent, program)
            if process.wait(_PATIENCE):
                raise InputError(f"a batch that nothing disturbs fails: {_said(place.folder.parent)[-1]}")
            wanted = place.videos()
        harms, skipped = list[Harm](), list[str]()
        for kind in kinds:
            log(f"batch: {kind}")
            work = _work(Path(name), kind)
            try:
                with small_disk(work) if kind is Kind.DISK else plain_folder(work) as place:
                    harms.append(_harm(kind, place, work, program, wanted, mark))
            except InputError as error:
                skipped.append(f"{kind} was skipped: {error}")
    return publish(
        out,
        "chaos_batch",
        title="Failures around a batch",
        about=f"{len(_PROMPTS)} videos of {_CHUNKS} chunks, pp 2, a checkpoint a chunk. {machine_line()}.\n\n{_NOTES}",
        verdicts=[one.verdict for one in harms],
        sections={
            "Kinds": [one.row for one in harms],
            "Skipped": bullets(skipped),
            "Left": bullets(f"{one.kind}: {name}" for one in harms for name in one.left),
        },
    )


def _work(folder: Path, name: str) -> Path:
    """A folder for one kind, with the batch file."""
    work = folder / name
    work.mkdir()
    lines = [{"prompt": prompt, "chunks": _CHUNKS, "seed": seed} for seed, prompt in enumerate(_PROMPTS)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return work


def _said(work: Path) -> list[str]:
    lines = (work / "said").read_text(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()] or [""]


def _harm(kind: Kind, place: Place, work: Path, program: Sequence[str], wanted: dict[str, str], mark: str) -> Harm:
    """Run the command, do the harm, and run it again."""
    process = place.start(work, program)
    _wait_until_begun(process, place)
    began = time.monotonic()
    _hit(kind, process, place, mark)
    status, seconds = _end(process), time.monotonic() - began
    left, said = [*survivors(mark, _LINGER).values()], _said(work)[-1]
    if kind is Kind.DISK:
        (place.folder.parent / "filler").unlink()
    elif kind is Kind.PART:
        _damage(place.files(_PARTS)[0])
    elif kind is Kind.CHECKPOINT:
        _damage(place.files(_MANIFESTS)[-1].with_name("rank-0.safetensors"))
    again = _end(place.start(work, program))
    if kind in (Kind.PART, Kind.CHECKPOINT):
        said = next((line for line in _said(work) if "checksum" in line), "")
    videos = place.videos()
    right = sum(videos.get(name) == digest for name, digest in wanted.items())
    left += [*survivors(mark, _LINGER).values(), *(str(path) for path in place.folder.glob(".*"))]
    return Harm(kind=kind, status=status, seconds=seconds, again=again, right=right, left=tuple(left), said=said)


def _wait_until_begun(process: subprocess.Popen[bytes], place: Place) -> None:
    """Wait until there are chunks and a checkpoint; an `InputError` says that the videos were there too soon."""
    deadline = time.monotonic() + _PATIENCE
    while len(place.files(_PARTS)) < _BEGUN or not place.files(_MANIFESTS):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise InputError("no chunk and no checkpoint was seen while the command ran")
        time.sleep(0.02)


def _hit(kind: Kind, process: subprocess.Popen[bytes], place: Place, mark: str) -> None:
    if kind is Kind.DISK:
        with suppress(OSError), (place.folder.parent / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))
    elif kind is Kind.GCS:
        for pid in processes_of(mark):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "gcs_server":
                os.kill(pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a command; its status, or that of SIGKILL for one that does not end."""
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _damage(path: Path) -> None:
    """Zeros in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(_ZEROS))
