"""The schedule of a record, found again in its flags."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.record import NOT_ACTIVE, RunRecord

__all__ = ["Timeline", "own_steps"]


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
        """The schedule that the flags show."""
        active = record.flags != NOT_ACTIVE
        ticks, chunks = active.shape
        first = int(active.any(axis=0).argmax())
        entered = active.argmax(axis=0)[first:]
        num_steps = int(active[:, first].sum())
        return cls(
            ticks=ticks,
            chunks=chunks,
            first=first,
            num_steps=num_steps,
            stage_steps=max(1, int(entered[1] - entered[0])) if len(entered) > 1 else num_steps,
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


def own_steps(record: RunRecord, chunk: int, time: Timeline, values: np.ndarray, missing: float) -> np.ndarray:
    """Of a chunk's values in all ticks those of its own steps.

    Args:
        record: whose flags say when the chunk was in the window.
        chunk: the chunk.
        time: of the record.
        values: [ticks].
        missing: stands for steps that are not recorded.

    Returns:
        [steps].
    """
    found = np.full(time.num_steps, missing, dtype=values.dtype)
    own = values[record.flags[:, chunk] != NOT_ACTIVE]
    found[: len(own)] = own[: time.num_steps]
    return found
