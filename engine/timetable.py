"""When each chunk of a whole video takes each step, over all the spans that it is made in; most videos have one.

Plain Python, as `engine/schedule.py`. Chunks, ticks and quanta are counted through all spans here; a `Schedule` counts
those of its own span, of which the first chunks are given: they are the last ones of the span before.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from engine.schedule import Schedule


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
