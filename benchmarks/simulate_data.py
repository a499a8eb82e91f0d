"""What is simulated: passes with the time that they take on each stage, videos made of them, a machine, an outcome.

Plain data and Python. `benchmarks.simulation` puts it into motion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.schedule import Schedule, Tick


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One pass of one chunk."""

    seconds: tuple[float, ...]  # on each stage; embedding belongs to the first, reading out to the last
    returns: bool = True  # its velocity counts, so the head waits for it; otherwise it is run for its KV alone
    name: str = "denoise"  # of the pass


@dataclass(frozen=True, kw_only=True, slots=True)
class TickPlan:
    """The work of one tick."""

    tick: Tick  # of the schedule
    clean: tuple[Call, ...]  # passes that renew the KV of the chunk that retires
    steps: tuple[tuple[int, tuple[Call, ...]], ...]
    """Each chunk of the window with its passes, oldest first; no passes for a step that is reused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPlan:
    """The work of one video."""

    ticks: tuple[TickPlan, ...]  # in order
    prefix: tuple[Call, ...] = ()  # passes over the chunks that are given
    renews: bool = False  # the KV of a finished chunk is renewed, which has to wait for its last velocity
    whole_window: bool = False  # all chunks of a tick are decided at once

    @property
    def calls(self) -> int:
        """Passes, which is how often each stage is called."""
        steps = sum(len(calls) for tick in self.ticks for _, calls in tick.steps)
        return len(self.prefix) + sum(len(tick.clean) for tick in self.ticks) + steps

    @property
    def returning(self) -> int:
        """Passes whose velocity goes back to the head."""
        return sum(call.returns for tick in self.ticks for _, calls in tick.steps for call in calls)

    @property
    def seconds(self) -> float:
        """All that the stages have to do."""
        calls = [*self.prefix, *(call for tick in self.ticks for call in tick.clean)]
        calls += [call for tick in self.ticks for _, step in tick.steps for call in step]
        return sum(sum(call.seconds) for call in calls)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What carries the work out, apart from what the calls themselves take."""

    stages: int  # of the pipeline
    latency: float = 0.0  # seconds of a message that carries nothing
    bandwidth: float = float("inf")  # bytes per second of a link, in one direction
    hidden_bytes: float = 0.0  # of a call on its way to the next stage, on one link
    velocity_bytes: float = 0.0  # of a result on its way to the head
    decide: float = 0.0  # seconds that the head takes to decide one chunk's step
    take: float = 0.0  # seconds that the head takes for a velocity that is back
    barrier: bool = False  # begin a tick only when the one before is done; for comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A call on a stage."""

    stage: int
    start: float
    end: float
    video: int
    tick: int
    chunk: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was simulated."""

    seconds: float  # from the first call to the last result
    busy: tuple[float, ...]  # of each stage, seconds in calls
    chunks: tuple[tuple[float, ...], ...]  # of each video, when each of its chunks was finished
    calls: int  # of every stage
    spans: tuple[Span, ...] = ()  # what each stage did when, if wanted

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Of each stage, the share of the time that it works."""
        return tuple(one / self.seconds if self.seconds else 0.0 for one in self.busy)

    @property
    def per_chunk(self) -> float:
        """Seconds for a chunk, of whichever video."""
        return self.seconds / sum(map(len, self.chunks))

    @property
    def first_chunk(self) -> float:
        """Seconds until the first chunk of the first video is finished."""
        return self.chunks[0][0]


def lay_out(
    schedule: Schedule,
    calls: Callable[[Tick, int, int], Sequence[Call]],
    clean: Callable[[Tick], Sequence[Call]] = lambda _: (),
    *,
    renews: bool = False,
    whole_window: bool = False,
    prefix: Sequence[Call] = (),
) -> VideoPlan:
    """The plan of a video.

    Args:
        schedule: of the video.
        calls: the passes of (tick, chunk, step); none if the step is reused.
        clean: the passes for the chunk that retires with a tick.
        renews: as in `VideoPlan`.
        whole_window: as in `VideoPlan`.
        prefix: as in `VideoPlan`.
    """
    ticks = tuple(
        TickPlan(
            tick=tick,
            clean=tuple(clean(tick)) if tick.retiring is not None else (),
            steps=tuple((chunk, tuple(calls(tick, chunk, step))) for chunk, step in tick.active),
        )
        for tick in schedule
    )
    return VideoPlan(ticks=ticks, prefix=tuple(prefix), renews=renews, whole_window=whole_window)
