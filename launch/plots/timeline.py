"""The schedule of a record, as pictures need it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.record import RunRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracer:
    """The schedule of a record: ticks, chunks and steps."""

    ticks: int  # of the video
    chunks: int  # of the video, given ones counted
    first: int  # the first chunk that was made
    num_steps: int  # of a chunk
    quantum_ticks: int  # ticks between two chunks that enter the window

    @classmethod
    def of(cls, record: RunRecord) -> Tracer:
        """The schedule that the record names."""
        schedule = record.schedule
        return cls(
            ticks=schedule.ticks,
            chunks=schedule.chunks,
            first=schedule.first,
            num_steps=schedule.num_steps,
            quantum_ticks=schedule.quantum_ticks,
        )

    @property
    def window(self) -> int:
        """Chunks that are denoised at once."""
        return self.num_steps // self.quantum_ticks

    @property
    def stages(self) -> float:
        """Length in chunks of time."""
        return self.ticks / self.quantum_ticks

    @property
    def retired(self) -> range:
        """Chunks that have left the window; the last one ends with the video."""
        return range(self.first, self.chunks - 1)
