"""The sliding-window schedule of one video, as a pure function (specification 7.3).

Plain Python: chunks and steps in, ticks out. It knows no model, no times and no tensors.

A quantum is the stretch of ticks from one chunk boundary to the next, counted from 0. At a boundary the window moves
on: a chunk enters, or at the end of the video one leaves and none enters. The passes of given chunks (prefix) belong to
the first quantum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """One step of the window."""

    index: int  # ticks are counted from 0
    step_in_quantum: int  # position within the quantum, 0 .. steps / window - 1
    active: tuple[tuple[int, int], ...]  # (chunk, step) of every chunk in the window, oldest and cleanest first
    entering: int | None  # the chunk that enters with this tick
    retiring: int | None  # the chunk that has just finished and leaves the window; its KV is still to be renewed
    finishing: int | None  # the chunk that takes its last step in this tick


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When each chunk takes each step."""

    first: int  # the first chunk that is generated; those before it are given (prefix)
    chunks: int  # all chunks, given and generated
    num_steps: int  # denoising steps of a chunk
    window: int  # chunks that are denoised at once

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"a window of {self.window} chunks is empty")
        if self.num_steps < 1 or self.num_steps % self.window:
            raise InputError(f"{self.num_steps} steps do not divide into a window of {self.window} chunks")
        if not 0 <= self.first < self.chunks:
            raise InputError(f"nothing to generate: chunk {self.first} of {self.chunks} would be the first")

    @property
    def quantum_ticks(self) -> int:
        """Ticks between two chunks that enter."""
        return self.num_steps // self.window

    @property
    def ticks(self) -> int:
        """Length of the schedule."""
        return self.quanta * self.quantum_ticks

    @property
    def quanta(self) -> int:
        """How many quanta there are; the window moves on with each."""
        return self.chunks - self.first + self.window - 1

    def open_quantum(self, told: int) -> int:
        """The last quantum before which nothing depends on where the video ends: a longer one may go on from there.

        A chunk is told that the video ends if fewer than `told` chunks come after it.
        """
        return max(0, min(self.chunks - self.first - told, self.quanta - 1))

    def slots(self, quantum: int) -> int:
        """Chunks that are active in each tick of a quantum; an IndexError if the video does not have so many."""
        if not 0 <= quantum < self.quanta:
            raise IndexError(f"quantum {quantum} of {self.quanta}")
        return len(self._window(quantum))

    def ticks_of_quantum(self, quantum: int) -> range:
        """Ticks of a quantum."""
        return range(quantum * self.quantum_ticks, (quantum + 1) * self.quantum_ticks)

    def tick(self, index: int) -> Tick:
        """One tick, in constant time."""
        quantum, inner = divmod(index, self.quantum_ticks)
        newest, begins = self.first + quantum, inner == 0
        window = self._window(quantum)
        active = tuple((chunk, (newest - chunk) * self.quantum_ticks + inner) for chunk in window)
        oldest, step = active[0]
        return Tick(
            index=index,
            step_in_quantum=inner,
            active=active,
            entering=newest if begins and newest < self.chunks else None,
            retiring=oldest - 1 if begins and oldest > self.first else None,
            finishing=oldest if step == self.num_steps - 1 else None,
        )

    def _window(self, quantum: int) -> range:
        """The chunks that are active in a quantum."""
        newest = self.first + quantum
        return range(max(self.first, newest - self.window + 1), min(self.chunks, newest + 1))

    def __iter__(self) -> Iterator[Tick]:
        return (self.tick(index) for index in range(self.ticks))

    def tick_of(self, chunk: int, step: int) -> int:
        """When a chunk takes a step."""
        return (chunk - self.first) * self.quantum_ticks + step
