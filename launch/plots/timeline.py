"""The schedule of a record, as pictures need it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.record import RunRecord

__all__ = ["Timeline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The schedule of a record: ticks, chunks and steps.

    Attributes:
        ticks: of the video.
        chunks: of the video, given ones counted.
        first: the first chunk that was made.
        num_steps: of a chunk.
        stage_steps: ticks between two chunks that enter the window.
    """

    ticks: int
    chunks: int
    first: int
    num_steps: int
    stage_steps: int

    @classmethod
    def of(cls, record: RunRecord) -> Timeline:
        """The schedule that the record names."""
        schedule = record.schedule
        return cls(
            ticks=schedule.ticks,
            chunks=schedule.chunks,
            first=schedule.first,
            num_steps=schedule.num_steps,
            stage_steps=schedule.stage_steps,
        )

    @property
    def window(self) -> int:
        """Chunks that are denoised at once."""
        return self.num_steps // self.stage_steps

    @property
    def stages(self) -> float:
        """Length in chunks of time."""
        return self.ticks / self.stage_steps

    @property
    def retired(self) -> range:
        """Chunks that have left the window; the last one ends with the video."""
        return range(self.first, self.chunks - 1)
