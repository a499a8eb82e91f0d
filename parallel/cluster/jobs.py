"""What goes into the chunk scheduler and what comes out of it.

Plain values: no Ray, no torch, no clock. `scheduler.py` says what they mean together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from models.errors import InputError

__all__ = [
    "Admit",
    "Assignment",
    "Figures",
    "GangFigures",
    "GangSize",
    "Grant",
    "Job",
    "Standing",
    "TurnPlan",
    "View",
    "plan_turns",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnPlan:
    """The stretch of a video's schedule from one chunk border to the next.

    Attributes:
        chunk: that enters the window with it; None at the end of the video, where none does.
        slots: window slots that it occupies while it runs: chunks that are active in it.
    """

    chunk: int | None
    slots: int


def plan_turns(*, chunks: int, window: int, first: int = 0) -> tuple[TurnPlan, ...]:
    """The turns of a video, in order; turn i is stage i of `engine.schedule.Schedule`.

    Args:
        chunks: all chunks, given and generated.
        window: chunks that are denoised at once.
        first: the first chunk that is generated.
    """
    made = chunks - first
    return tuple(
        TurnPlan(
            chunk=first + turn if turn < made else None, slots=min(turn + 1, window, made, made + window - 1 - turn)
        )
        for turn in range(made + window - 1)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GangSize:
    """What a gang has to give.

    Attributes:
        slots: window slots, the gang's concurrency times the window.
        kv_bytes: memory for keys and values, in bytes, counted as `Job.kv_bytes` is.
    """

    slots: int
    kv_bytes: int

    def __post_init__(self) -> None:
        if self.slots < 1 or self.kv_bytes < 0:
            raise InputError(f"a gang of {self.slots} slots and {self.kv_bytes} bytes can hold no video")

    def holds(self, job: Job) -> bool:
        """Whether an empty gang of this size can make the video."""
        return job.kv_bytes <= self.kv_bytes and job.width <= self.slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request as the scheduler sees it.

    Attributes:
        request: its id, unique for the life of the scheduler.
        turns: what there is to do, in order.
        kv_bytes: what it holds on a gang from admission to its end, in bytes.
        priority: higher goes first.
        resume_turn: the turn that it goes on with, when there is a checkpoint of an earlier run.

    Raises:
        InputError: there are no turns, one of them needs no slot, or the turn to go on with is none of them.
    """

    request: str
    turns: tuple[TurnPlan, ...]
    kv_bytes: int
    priority: int = 0
    resume_turn: int = 0

    def __post_init__(self) -> None:
        if not self.turns or min(turn.slots for turn in self.turns) < 1:
            raise InputError(f"request {self.request} has a turn that needs no slot, or no turns at all")
        if self.kv_bytes < 0:
            raise InputError(f"request {self.request} cannot hold {self.kv_bytes} bytes of keys and values")
        if not 0 <= self.resume_turn < len(self.turns):
            raise InputError(
                f"request {self.request} cannot go on with turn {self.resume_turn}: it has {len(self.turns)}"
            )

    @property
    def width(self) -> int:
        """Slots of its widest turn."""
        return max(turn.slots for turn in self.turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Admit:
    """Decision: submit the request to the gang, which holds its KV from now on.

    Attributes:
        request: which.
        gang: where.
        resume_turn: the turn of its last checkpoint that is known; the gang's first announcement says which turn it
            really goes on with.
    """

    request: str
    gang: str
    resume_turn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Decision: the request's gate is open for the turn.

    Attributes:
        request: which.
        gang: where it is.
        turn: index of the turn.
        chunk: that enters the window; None where none does.
        slots: that the turn occupies.
    """

    request: str
    gang: str
    turn: int
    chunk: int | None
    slots: int


Assignment = Admit | Grant


class Standing(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PAUSED = "paused"
    """On a gang, at a border or being prepared."""
    RUNNING = "running"
    """On a gang, with a turn."""
    DONE = "done"
    ASIDE = "set aside"
    """It failed too often; nobody tries it again."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the scheduler knows of a request.

    Attributes:
        request: its id.
        standing: where it is.
        gang: that holds its KV; None where none does.
        turn: the turn that comes after those that are done, or that a restart goes on with.
        turns: of all.
        restarts: how often it went back to the queue.
        reason: why it was set aside, or failed the last time; None if it never failed.
        alone: it is suspected of killing gangs, and runs alone.
    """

    request: str
    standing: Standing
    gang: str | None
    turn: int
    turns: int
    restarts: int
    reason: str | None
    alone: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class GangFigures:
    """A gang at this moment, and so far.

    Attributes:
        gang: its id.
        up: it can be given work.
        slots: it has.
        slots_busy: of turns that run.
        utilisation: busy slots as a share of all, averaged over the time it was up; 0 if it never was.
        kv_bytes: it has.
        kv_used: held by its requests.
        residents: requests on it.
        turns_waiting: announced and not granted.
        turns_granted: so far.
        losses: how often it went down.
    """

    gang: str
    up: bool
    slots: int
    slots_busy: int
    utilisation: float
    kv_bytes: int
    kv_used: int
    residents: int
    turns_waiting: int
    turns_granted: int
    losses: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The whole at this moment.

    Attributes:
        queued: length of the queue.
        standings: requests by where they are.
        restarts: of all requests together.
        gangs: each gang that ever was up, by id.
        unplaceable: queued requests that none of the gangs that are up could ever hold.
    """

    queued: int
    standings: dict[Standing, int]
    restarts: int
    gangs: tuple[GangFigures, ...]
    unplaceable: tuple[str, ...]
