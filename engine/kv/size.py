"""What a video's keys and values take: settings, the plan that every process allocates from, and its bytes.

Plain figures, there before a model is loaded: which layers and heads a process holds comes in as a geometry.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.kv.layout import KVLayout
from engine.kv.selection import SelectionSettings
from engine.schedule import Schedule
from models.errors import InputError
from models.protocols import KVGeometry, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSettings:
    """Memory policy of the finished chunks."""

    budget: int | None = None
    """B_budget in chunks: everything is attended to, and compressed to that size as chunks retire. None holds what the
    model's own range asks for."""
    selection: SelectionSettings = field(default_factory=SelectionSettings)  # how tokens are scored and kept

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise InputError(f"a KV budget of {self.budget} chunks keeps nothing: give 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class KVPlan:
    """What there is to allocate for a video."""

    chunk_tokens: int
    frame_tokens: int  # tokens of a latent frame
    clean_tokens: int  # size of the clean region
    window: int  # chunks of the window
    chunks: int  # of the whole video
    branches: int  # of guidance, each with KV of its own
    selection: SelectionSettings | None  # how the clean region is compressed; None drops its oldest rows

    def layout(self) -> KVLayout:
        """An empty layout."""
        return KVLayout(
            chunk_tokens=self.chunk_tokens, clean_tokens=self.clean_tokens, window=self.window, chunks=self.chunks
        )

    def query_rows(self) -> int:
        """Queries that are kept to ask with."""
        return 0 if self.selection is None else self.selection.query_rows(self.frame_tokens, self.chunk_tokens)

    def nbytes(self, geometry: KVGeometry) -> int:
        """Bytes of a `KVBuffer` of it: keys, values, and the bookkeeping of compression."""
        rows, width = self.layout().capacity, geometry.head_size * geometry.dtype.itemsize
        layer = 2 * rows * geometry.key_heads * width + self.query_rows() * geometry.query_heads * width
        if self.selection is not None:
            layer += 4 * rows * geometry.key_heads  # origins are int32
        return layer * len(geometry.layers) * self.branches


def plan_kv(sampling: Sampling, schedule: Schedule, settings: KVSettings, chunk_tokens: int) -> KVPlan:
    """What a video with chunks of so many tokens holds."""
    return KVPlan(
        chunk_tokens=chunk_tokens,
        frame_tokens=chunk_tokens // sampling.chunk_width,
        clean_tokens=clean_chunks(schedule, sampling, settings.budget) * chunk_tokens,
        window=sampling.window,
        chunks=schedule.chunks,
        branches=sampling.branches,
        selection=None if settings.budget is None else settings.selection,
    )


def clean_chunks(schedule: Schedule, sampling: Sampling, budget: int | None) -> int:
    """Finished chunks to hold: the budget, or those that some chunk still attends to; all where a limit is None.

    In a full window the chunk in step s stands window - 1 - s // quantum_ticks places behind the oldest. A prefix is
    seen further back, while its first successors are young.
    """
    if budget is not None:
        return min(schedule.chunks - 1, budget)
    limits = [sampling.key_limit(step) for step in range(schedule.num_steps)]
    clean = sampling.clean_limit(prefix=False)
    if any(limit is None for limit in limits) or clean is None:
        return schedule.chunks - 1
    bounded = [limit for limit in limits if limit is not None]
    within = [limit - schedule.window + step // schedule.quantum_ticks for step, limit in enumerate(bounded)]
    prefix = sampling.clean_limit(prefix=True) or schedule.first
    behind_prefix = min(schedule.first, max(max(bounded), prefix) - 1)
    return min(schedule.chunks - 1, max(0, clean - 1, behind_prefix, *within))
