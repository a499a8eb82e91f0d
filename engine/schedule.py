"""When each chunk of a video takes each step, as a pure function (specification 7.3).

Plain Python: chunks and steps in, ticks out. It knows no model, no times and no tensors.

Chunks enter one after another, `stagger` ticks apart, and take one step in every tick from then on. A sliding window
spreads its chunks evenly over the steps; others may stand closer or further apart, or enter all at once (a stagger of
0). A quantum is the stretch of ticks from one chunk that enters to the next, counted from 0; at the end of the video
none enters any more. The passes of given chunks (prefix) belong to the first quantum.

A long video may be made in several spans; most have one. A `Schedule` counts chunks, ticks and quanta of its own span,
of which the first chunks are given: they are the last ones of the span before. A `Timetable` counts through all spans.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from models.errors import InputError

EVEN = -1
"""A stagger that spreads the chunks of a window evenly over the steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """One step of the window."""

    index: int  # ticks are counted from 0
    step_in_quantum: int  # position within the quantum
    active: tuple[tuple[int, int], ...]  # (chunk, step) of every chunk in the window, oldest and cleanest first
    entering: tuple[int, ...]  # the chunks that enter with this tick: one, or all
    retiring: tuple[int, ...]  # those that have just finished and leave the window; their KV may still be renewed
    finishing: tuple[int, ...]  # those that take their last step in this tick


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When each chunk of a span takes each step."""

    first: int  # the first chunk that is generated; those before it are given (prefix)
    chunks: int  # all chunks, given and generated
    num_steps: int  # denoising steps of a chunk
    window: int  # chunks that are denoised at once, at most
    stagger: int = EVEN  # ticks between two chunks that enter

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"a window of {self.window} chunks is empty")
        if self.num_steps < 1 or (self.stagger == EVEN and self.num_steps % self.window):
            raise InputError(f"{self.num_steps} steps do not divide into a window of {self.window} chunks")
        if not 0 <= self.first < self.chunks:
            raise InputError(f"nothing to generate: chunk {self.first} of {self.chunks} would be the first")
        if not 0 <= self._apart <= self.num_steps:
            raise InputError(f"{self._apart} ticks between chunks of {self.num_steps} steps leave gaps: take fewer")
        if self.window < min(self._made, -(-self.num_steps // self._apart) if self._apart else self._made):
            raise InputError(f"chunks {self._apart} ticks apart do not fit into a window of {self.window}")

    @property
    def _apart(self) -> int:
        return self.num_steps // self.window if self.stagger == EVEN else self.stagger

    @property
    def _made(self) -> int:
        """Chunks that are generated."""
        return self.chunks - self.first

    @property
    def quantum_ticks(self) -> int:
        """Ticks between two chunks that enter."""
        return self._apart or self.num_steps

    @property
    def ticks(self) -> int:
        """Length of the schedule."""
        return (self._made - 1) * self._apart + self.num_steps

    @property
    def quanta(self) -> int:
        """How many quanta there are; the last may be shorter than the others."""
        return -(-self.ticks // self.quantum_ticks)

    def open_quantum(self, told: int) -> int:
        """The last quantum before which nothing depends on where the video ends: a longer one may go on from there.

        A chunk is told that the video ends if fewer than `told` chunks come after it.
        """
        return max(0, min(self._made - told, self.quanta - 1)) if self._apart else 0

    def slots(self, quantum: int) -> int:
        """Chunks that are active in a quantum at most; an IndexError if the video does not have so many."""
        if not 0 <= quantum < self.quanta:
            raise IndexError(f"quantum {quantum} of {self.quanta}")
        return len(self._window(quantum * self.quantum_ticks))

    def ticks_of_quantum(self, quantum: int) -> range:
        """Ticks of a quantum."""
        return range(quantum * self.quantum_ticks, min((quantum + 1) * self.quantum_ticks, self.ticks))

    def tick(self, index: int) -> Tick:
        """One tick, in constant time."""
        window = self._window(index)
        return Tick(
            index=index,
            step_in_quantum=index % self.quantum_ticks,
            active=tuple((chunk, index - self.tick_of(chunk, 0)) for chunk in window),
            entering=self._at(index),
            retiring=self._at(index - self.num_steps),
            finishing=self._at(index - self.num_steps + 1),
        )

    def _at(self, index: int) -> tuple[int, ...]:
        """The chunks that take their first step in a tick."""
        if not self._apart:
            return tuple(range(self.first, self.chunks)) if index == 0 else ()
        place, after = divmod(index, self._apart)
        return (self.first + place,) if not after and 0 <= place < self._made else ()

    def _window(self, index: int) -> range:
        """The chunks that are active in a tick."""
        if not self._apart:
            return range(self.first, self.chunks)
        oldest = max(0, -((self.num_steps - 1 - index) // self._apart))
        return range(self.first + oldest, self.first + min(self._made, index // self._apart + 1))

    def __iter__(self) -> Iterator[Tick]:
        return (self.tick(index) for index in range(self.ticks))

    def tick_of(self, chunk: int, step: int) -> int:
        """When a chunk takes a step."""
        return (chunk - self.first) * self._apart + step


class Place(NamedTuple):
    """Where a span begins in the whole video."""

    chunk: int  # number of the first chunk that it is given, or makes
    tick: int
    quantum: int


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """The schedules of a video's spans, in order."""

    spans: tuple[Schedule, ...]

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where each span begins, and at last where the video ends."""
        found = [Place(0, 0, 0)]
        for span, following in zip(self.spans, (*self.spans[1:], None), strict=True):
            at, given = found[-1], 0 if following is None else following.first
            found.append(Place(at.chunk + span.chunks - given, at.tick + span.ticks, at.quantum + span.quanta))
        return tuple(found)

    @property
    def first(self) -> int:
        """The first chunk that is generated; those before it are given."""
        return self.spans[0].first

    @property
    def chunks(self) -> int:
        """All chunks, given and generated."""
        return self.places[-1].chunk

    @property
    def num_steps(self) -> int:
        """Denoising steps of a chunk."""
        return self.spans[0].num_steps

    @property
    def window(self) -> int:
        """Chunks that are denoised at once, at most."""
        return self.spans[0].window

    @property
    def quantum_ticks(self) -> int:
        """Ticks of a quantum; the last one of a span may be shorter."""
        return self.spans[0].quantum_ticks

    @property
    def ticks(self) -> int:
        """Of all spans."""
        return self.places[-1].tick

    @property
    def quanta(self) -> int:
        """Of all spans."""
        return self.places[-1].quantum

    def slots(self, quantum: int) -> int:
        """As of `Schedule`."""
        if not 0 <= quantum < self.quanta:
            raise IndexError(f"quantum {quantum} of {self.quanta}")
        span, own = self.at(quantum)
        return self.spans[span].slots(own)

    def tick_of(self, chunk: int, step: int) -> int:
        """As of `Schedule`."""
        made = [place.chunk + span.first for place, span in zip(self.places, self.spans, strict=False)]
        span = max(0, bisect_right(made, chunk) - 1)
        return self.places[span].tick + self.spans[span].tick_of(chunk - self.places[span].chunk, step)

    def at(self, quantum: int) -> tuple[int, int]:
        """The span of a quantum, and its number there."""
        begins = [place.quantum for place in self.places[:-1]]
        span = bisect_right(begins, quantum) - 1
        return span, quantum - begins[span]

    def ended(self, ticks: int) -> int | None:
        """The quantum that has ended when so many ticks are done; None within one."""
        span = max(0, bisect_right([place.tick for place in self.places[:-1]], ticks - 1) - 1)
        own, schedule = ticks - self.places[span].tick, self.spans[span]
        if own % schedule.quantum_ticks and own < schedule.ticks:
            return None
        return self.places[span].quantum + -(-own // schedule.quantum_ticks) - 1

    def begun(self, quantum: int) -> int:
        """Chunks that are made, and have entered before a quantum begins."""
        span, own = self.at(quantum)
        schedule, before = self.spans[span], self.places[span].chunk + self.spans[span].first - self.first
        made = schedule.chunks - schedule.first
        return before + (min(own, made) if schedule.stagger else made * bool(own))

    def open_quantum(self, told: int) -> int:
        """As of `Schedule`."""
        return self.places[-2].quantum + self.spans[-1].open_quantum(told)
