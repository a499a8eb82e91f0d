"""Keeps account of failures: what was lost, what was made again, and whether any of it had been safe before.

It is given the log of the cluster's controller and looks at checkpoints at the moment when a gang is lost; it shares no
code with what decides where videos go on. It knows neither Ray nor processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """Counts from the controller's log.

    Args:
        newest: the newest whole checkpoint of a video; None where there is none.
    """

    def __init__(self, newest: Callable[[str], Mark | None]) -> None:
        self._newest = newest
        self._videos: dict[str, _Video] = {}
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
            case "Admitted":
                self._admitted(entry["video"], entry["first"])
            case "QuantumReady":
                self._ready(entry["video"], entry["quantum"])
            case "QuantumDone":
                self._done(entry["video"], entry["quantum"], gang, seconds)
            case "ChunkMade":
                self._made(entry["video"], entry["index"])

    def good_again(self, gang: str, since: float) -> bool:
        """Whether a gang was lost after a time, and works again. May be asked by any thread."""
        return gang in self.working and any(loss.gang == gang and loss.seconds >= since for loss in tuple(self.losses))

    def _video(self, name: str) -> _Video:
        return self._videos.setdefault(name, _Video())

    def _open(self, gang: str) -> list[Loss]:
        return [loss for loss in self.losses if loss.gang == gang and loss.works is None]

    def _lost(self, gang: str, seconds: float, message: str, videos: tuple[str, ...]) -> None:
        self.working.discard(gang)
        loss = Loss(gang=gang, seconds=seconds, message=message, videos=videos)
        self.losses.append(loss)
        for name in videos:
            video, found = self._video(name), self._newest(name) or Mark()
            safe = video.safe
            if found.quantum < safe.quantum:
                what = f"its checkpoint of quantum {safe.quantum} is gone; there is one of quantum {found.quantum}"
                self._blame(name, what)
            if found.chunks > video.made:
                self._blame(name, f"its checkpoint is after chunk {found.chunks - 1}, which was not handed in")
            chunks = max(safe.chunks, min(found.chunks, video.made))
            video.safe = Mark(quantum=max(safe.quantum, found.quantum), chunks=chunks)
            video.loss, video.again = loss, 0

    def _admitted(self, name: str, first: int) -> None:
        video = self._video(name)
        if first < video.safe.chunks:
            self._blame(name, f"it goes on with chunk {first}, though those before {video.safe.chunks} are safe")
        if first > video.made:
            self._blame(name, f"it goes on with chunk {first}, and {video.made} was not handed in")

    def _ready(self, name: str, quantum: int) -> None:
        video = self._video(name)
        if quantum < video.safe.quantum:
            self._blame(name, f"it goes on with quantum {quantum}, though those before {video.safe.quantum} are safe")

    def _done(self, name: str, quantum: int, gang: str, seconds: float) -> None:
        video = self._video(name)
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
        video = self._video(name)
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
    found = []
    for fault in faults:
        firsts = (
            next((loss for loss in losses if loss.gang == gang and loss.seconds >= fault.seconds), None)
            for gang in fault.gangs
        )
        found.append([loss for loss in firsts if loss is not None])
    return found
