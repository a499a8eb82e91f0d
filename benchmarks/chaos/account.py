"""Keeps account of failures, and reports it: what was lost and made again, and whether any of it had been safe.

It is given the log of the cluster's controller and looks at checkpoints at the moment when a gang is lost; it shares no
code with what decides where videos go on. It causes nothing, and knows neither Ray nor processes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cluster import Outcome
from benchmarks.common import Row, Verdict, bullets


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The newest whole checkpoint of a video."""

    quantum: int = 0  # that it goes on with; all quanta before it are safe
    chunks: int = 0  # that were handed out before it; all of them are safe


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A failure that was caused."""

    number: int  # from 1
    seconds: float  # when, on the clock of the log
    kind: str  # rank, gang or node
    how: str  # the signal, or what was done
    target: str  # in words
    gangs: tuple[str, ...]  # that have lost ranks by it
    hasty: bool = False  # it did not wait for those before it to be made good


@dataclass(kw_only=True, slots=True)
class Loss:
    """A gang that was lost."""

    gang: str
    seconds: float  # when the controller knew
    message: str  # why
    videos: tuple[str, ...]  # that it was making
    ready: float | None = None  # when it waited for work again
    works: float | None = None  # when it had done a quantum again
    quanta_again: int = 0  # quanta of those videos that had been done, and were done again
    chunks_again: int = 0  # chunks of those videos that had been handed in, and were handed in again
    worst: int = 0  # most quanta that one video had to do again


@dataclass(slots=True)
class _Video:
    safe: Mark = field(default_factory=Mark)  # what no loss may cost any more
    done: int = 0  # quanta, counted from the start of the video, that were done at some time
    made: int = 0  # chunks that were handed in at some time
    loss: Loss | None = None  # the last one
    again: int = 0  # quanta that were done again since then


class Account:
    """Counts from the controller's log; `newest` finds the newest whole checkpoint of a video, if there is one."""

    def __init__(self, newest: Callable[[str], Mark | None]) -> None:
        self._newest = newest
        self._videos: dict[str, _Video] = defaultdict(_Video)
        self.losses: list[Loss] = []
        """In their order."""
        self.restarts = 0
        """Of gangs."""
        self.quanta = 0
        """Quanta that were done, those done again counted in."""
        self.quanta_again = self.chunks_again = 0
        """Quanta that were done more than once; chunks that were handed in more than once."""
        self.working: set[str] = set()
        """Gangs that have done a quantum since they were started the last time."""
        self.violations: list[str] = []
        """What was made again though it was safe, and what else must not be; one line each."""

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count an entry of the log."""
        seconds, gang = entry["seconds"], entry["gang"]
        match entry["event"]:
            case "GangReady":
                for loss in self._open(gang):
                    loss.ready = loss.ready or seconds
            case "GangLost":
                self._lost(gang, seconds, entry["message"], tuple(entry["videos"]))
            case "Restarted":
                self.restarts += 1
            case "QuantumDone":
                self._done(entry["video"], entry["quantum"], gang, seconds)
            case "ChunkMade":
                self._made(entry["video"], entry["index"])

    def good_again(self, gang: str, since: float) -> bool:
        """Whether a gang was lost after a time, and works again. May be asked by any thread."""
        return gang in self.working and any(loss.gang == gang and loss.seconds >= since for loss in tuple(self.losses))

    def _open(self, gang: str) -> list[Loss]:
        return [loss for loss in self.losses if loss.gang == gang and loss.works is None]

    def _lost(self, gang: str, seconds: float, message: str, videos: tuple[str, ...]) -> None:
        self.working.discard(gang)
        loss = Loss(gang=gang, seconds=seconds, message=message, videos=videos)
        self.losses.append(loss)
        for name in videos:
            video, found = self._videos[name], self._newest(name) or Mark()
            video.safe = Mark(
                quantum=max(video.safe.quantum, found.quantum),
                chunks=max(video.safe.chunks, min(found.chunks, video.made)),
            )
            video.loss, video.again = loss, 0

    def _done(self, name: str, quantum: int, gang: str, seconds: float) -> None:
        video = self._videos[name]
        self.quanta += 1
        self.working.add(gang)
        for loss in self._open(gang):
            if loss.ready is not None:
                loss.works = seconds
        if quantum < video.safe.quantum:
            self._blame(name, f"quantum {quantum} was done again, though those before {video.safe.quantum} are safe")
        if quantum >= video.done:
            video.done = quantum + 1
            return
        self.quanta_again += 1
        if video.loss is None:
            self._blame(name, f"quantum {quantum} was done again, and no gang was lost")
            return
        video.again += 1
        video.loss.quanta_again += 1
        video.loss.worst = max(video.loss.worst, video.again)

    def _made(self, name: str, index: int) -> None:
        video = self._videos[name]
        if index < video.safe.chunks:
            self._blame(name, f"chunk {index} was made again, though those before {video.safe.chunks} are safe")
        if index > video.made:
            self._blame(name, f"chunk {index} was handed in, and {video.made} was not")
        if index >= video.made:
            video.made = index + 1
            return
        self.chunks_again += 1
        if video.loss is not None:
            video.loss.chunks_again += 1

    def _blame(self, name: str, what: str) -> None:
        self.violations.append(f"{name}: {what}")


def matched(faults: Iterable[Fault], losses: Iterable[Loss]) -> list[list[Loss]]:
    """For each fault, the losses that it has caused: of each gang that it hit, the first from then on."""
    losses = list(losses)

    def later(fault: Fault, gang: str) -> list[Loss]:
        return [loss for loss in losses if loss.gang == gang and loss.seconds >= fault.seconds]

    return [[loss for gang in fault.gangs for loss in later(fault, gang)[:1]] for fault in faults]


@dataclass(kw_only=True, slots=True)
class ChaosRun:
    """All that came of a run: first a batch without failures, then the same videos again and again with them."""

    wanted: int  # failures that were to be caused
    distinct: int  # videos that differ
    account: Account
    undisturbed: Outcome = field(default_factory=Outcome)  # of the batch without failures
    undisturbed_seconds: float = 0.0  # that they took
    undisturbed_quanta: int = 0  # that they took
    disturbed: Outcome = field(default_factory=Outcome)  # of the disturbed videos
    seconds: float = 0.0  # that they took
    faults: Sequence[Fault] = ()  # that were caused
    unfinished: str = ""  # why the run was broken off; empty if it was not
    left: Mapping[int, str] = field(default_factory=dict)
    """Processes of the run that outlived it, or ranks that outlived the gangs."""

    @property
    def different(self) -> list[str]:
        """Disturbed videos whose latents are not those of the undisturbed run."""
        wanted = list(self.undisturbed.chunks.values())
        return [
            name
            for number, (name, chunks) in enumerate(self.disturbed.chunks.items())
            if number % self.distinct >= len(wanted) or chunks != wanted[number % self.distinct]
        ]

    @property
    def good(self) -> int:
        """Faults that were noticed, and whose gangs all work again."""
        both = zip(self.faults, matched(self.faults, self.account.losses), strict=True)
        return sum(len(losses) == len(one.gangs) and all(loss.works for loss in losses) for one, losses in both)


def verdicts(run: ChaosRun) -> list[Verdict]:
    """What the run is held to."""
    account, different, faults = run.account, run.different, len(run.faults)
    videos, done = len(run.disturbed.chunks), len(run.disturbed.done)
    worst = max((loss.worst for loss in account.losses), default=0)
    wrong = len(account.violations) + len(run.disturbed.problems)
    same, most = videos - len(different), 2
    return [
        Verdict("failures caused", str(faults), str(run.wanted), faults >= run.wanted),
        Verdict("made good", str(run.good), f"all {faults}", run.good == faults),
        Verdict("videos complete", str(done), f"all {videos}", 0 < videos == done),
        Verdict("latents as undisturbed", str(same), f"all {videos}, bit for bit", 0 < videos == same),
        Verdict("safe work done again", str(wrong), "nothing older than the last checkpoint", not wrong),
        Verdict("quanta again, most of a video and loss", str(worst), f"at most {most}", worst <= most),
        Verdict("processes left", str(len(run.left)), "0", not run.left),
        *([Verdict("finished", run.unfinished, "in time", False)] if run.unfinished else []),
    ]


def fault_rows(run: ChaosRun) -> list[Row]:
    """A row for each fault; what a loss has cost stands with the first fault that it goes back to."""
    rows, seen = list[Row](), set[int]()
    for one, losses in zip(run.faults, matched(run.faults, run.account.losses), strict=True):
        new = [loss for loss in losses if id(loss) not in seen]
        seen |= set(map(id, losses))
        row: Row = {"number": one.number, "seconds": round(one.seconds, 1), "kind": one.kind}
        row |= {"how": one.how, "target": one.target, "hasty": one.hasty}
        row |= {"lost_after_s": _after(one, [loss.seconds for loss in losses])}
        row |= {"ready_after_s": _after(one, [loss.ready for loss in losses])}
        row |= {"works_after_s": _after(one, [loss.works for loss in losses])}
        row |= {"videos": sum(len(loss.videos) for loss in new)}
        row |= {"quanta_again": sum(loss.quanta_again for loss in new)}
        rows.append(row | {"chunks_again": sum(loss.chunks_again for loss in new)})
    return rows


def _after(fault: Fault, times: Sequence[float | None]) -> float | None:
    """Seconds from a fault to the last of some times; None if one is not known."""
    known = [time - fault.seconds for time in times if time is not None]
    return round(max(known), 1) if known and len(known) == len(times) else None


def facts(run: ChaosRun) -> str:
    """What it has cost, line by line."""
    account = run.account
    quanta = account.quanta - run.undisturbed_quanta
    rate = run.undisturbed_quanta / run.undisturbed_seconds if run.undisturbed_seconds else 0.0
    needed = (quanta - account.quanta_again) / rate if rate else 0.0
    again = f"{100 * account.quanta_again / quanta:.1f}%" if quanta else "none"
    lines = [
        f"{run.distinct} videos in {run.undisturbed_seconds:.1f} s undisturbed, {run.undisturbed_quanta} quanta; then "
        f"{len(run.disturbed.chunks)} in {run.seconds:.1f} s, {quanta} quanta",
        f"{account.quanta_again} quanta were done again ({again} of all); a quantum is the work of one chunk",
        f"{account.chunks_again} finished chunks came again, which were not yet covered by a checkpoint",
        f"gangs were started again {account.restarts} times",
        f"undisturbed the same videos would have taken {needed:.0f} s: {run.seconds - needed:.0f} s were lost",
    ]
    lines += [*account.violations, *run.disturbed.problems, *(f"left: {pid} {name}" for pid, name in run.left.items())]
    lines += [f"other latents: {name}" for name in run.different]
    lines += [f"{name} failed: {why}" for name, why in run.disturbed.failed.items()]
    return bullets(lines)
