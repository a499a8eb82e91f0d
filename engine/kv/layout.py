"""What a video's keys and values take, and where its tokens stand in the buffers: the clean region, then the window.

Plain figures, the same for every layer, branch and rank, and known before a model is loaded: which layers and heads a
process holds comes in as a geometry. `buffer.py` holds the tensors and moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from engine.kv.selection import SelectionSettings
from engine.schedule import Schedule
from models.errors import InputError
from models.protocols import KVGeometry, Sampling

MIXED = -1
"""Stands for the tokens of many chunks that a compression has left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSettings:
    """Memory policy of the finished chunks."""

    budget: int | None = None
    """B_budget in chunks: everything is attended to, and compressed to that size as chunks retire. None holds what the
    model's own range asks for."""
    selection: SelectionSettings = field(default_factory=SelectionSettings)  # how tokens are scored and kept
    offload: bool = False  # finished chunks are in host memory, which changes no result

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise InputError(f"a KV budget of {self.budget} chunks keeps nothing: give 1 or more")

    def identity(self) -> dict[str, Any]:
        """What results depend on, as plain values."""
        return {"budget": self.budget, "selection": asdict(self.selection)}


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
    shared: bool = False  # clean rows that are alike in all branches are held by the first alone
    offload: bool = False  # clean rows are in host memory, and on the device as far as a layer needs them
    sink_tokens: int = 0  # of them, the first ones that are never dropped

    def layout(self) -> KVLayout:
        """An empty layout."""
        return KVLayout(
            chunk_tokens=self.chunk_tokens,
            clean_tokens=self.clean_tokens,
            window=self.window,
            chunks=self.chunks,
            sink_tokens=self.sink_tokens,
        )

    def query_rows(self) -> int:
        """Queries that are kept to ask with."""
        return 0 if self.selection is None else self.selection.query_rows(self.frame_tokens, self.chunk_tokens)

    def device_rows(self, branch: int) -> int:
        """Rows of a branch in each layer. One that shares has its own of the chunk that has retired last."""
        window = min(self.window, self.chunks) * self.chunk_tokens
        if self.offload:
            return window
        capacity = self.layout().capacity
        return min(capacity, window + self.chunk_tokens) if self.shared and branch else capacity

    def host_rows(self, branch: int) -> int:
        """Rows of it in host memory."""
        held = self.chunk_tokens if self.shared and branch else self.clean_tokens
        return min(held, self.clean_tokens) if self.offload else 0

    def staging_rows(self) -> tuple[int, int]:
        """Rows for one layer where those of several places are put together, and for the one that comes next."""
        whole = self.layout().capacity if self.shared or self.offload else 0
        return whole, self.clean_tokens if self.offload else 0

    def nbytes(self, geometry: KVGeometry) -> int:
        """Bytes of a `KVBuffer` of it on the device: keys, values, and the bookkeeping of compression."""
        width, capacity = geometry.head_size * geometry.dtype.itemsize, self.layout().capacity
        rows = sum(self.device_rows(branch) for branch in range(self.branches))
        queries = self.branches * self.query_rows() * geometry.query_heads * width
        origins = 0 if self.selection is None else self.branches * capacity * geometry.key_heads * 4  # they are int32
        layer, staged = 2 * geometry.key_heads * width * rows + queries + origins, sum(self.staging_rows())
        return layer * len(geometry.layers) + 2 * geometry.key_heads * width * staged

    def host_nbytes(self, geometry: KVGeometry) -> int:
        """Bytes in host memory. For a GPU it is pinned, which PyTorch allocates in powers of two."""
        row = 2 * geometry.key_heads * geometry.head_size * geometry.dtype.itemsize
        sizes = [self.host_rows(branch) * row for branch in range(self.branches)]
        if geometry.device.type == "cuda":
            sizes = [1 << (size - 1).bit_length() if size else 0 for size in sizes]
        return sum(sizes) * len(geometry.layers)


def plan_kv(sampling: Sampling, schedule: Schedule, settings: KVSettings, chunk_tokens: int) -> KVPlan:
    """What a video with chunks of so many tokens holds."""
    clean = clean_chunks(schedule, sampling, settings.budget)
    offload = settings.offload and clean > 0
    # A chunk is published after the tick in which it has retired, so in that tick each branch has rows of its own. One
    # clean chunk alone saves nothing, therefore, unless it is elsewhere in any case. Without a clean pass nothing is
    # published; and compression keeps other rows in each branch, as its own queries ask.
    published = sampling.publishes and sampling.branches > 1 and sampling.clean_pass and settings.budget is None
    return KVPlan(
        chunk_tokens=chunk_tokens,
        frame_tokens=chunk_tokens // sampling.chunk_width,
        clean_tokens=clean * chunk_tokens,
        window=sampling.window,
        chunks=schedule.chunks,
        branches=sampling.branches,
        selection=None if settings.budget is None else settings.selection,
        shared=published and (clean > 1 or offload),
        offload=offload,
        sink_tokens=sampling.sink * chunk_tokens,
    )


def clean_chunks(schedule: Schedule, sampling: Sampling, budget: int | None) -> int:
    """Finished chunks to hold: the budget, or those that some chunk still attends to; all where a limit is None.

    In a full window the chunk in step s stands (steps - 1 - s) // stagger places behind the oldest. A prefix is seen
    further back, while its first successors are young.
    """
    if budget is not None:
        return min(schedule.chunks - 1, budget)
    last = schedule.chunks - 1 - schedule.first
    limits = [sampling.key_limit(step, last) for step in range(schedule.num_steps)]
    clean = sampling.clean_limit(prefix=False)
    if any(limit is None for limit in limits) or clean is None:
        return schedule.chunks - 1
    bounded = [limit for limit in limits if limit is not None]
    left = range(schedule.num_steps - 1, -1, -1)
    ahead = [steps // sampling.stagger if sampling.stagger else last for steps in left]
    within = [limit - 1 - own for limit, own in zip(bounded, ahead, strict=True)]
    prefix = sampling.clean_limit(prefix=True) or schedule.first
    behind_prefix = min(schedule.first, max(max(bounded), prefix) - 1)
    return min(schedule.chunks - 1, max(0, clean - 1, behind_prefix, *within))


class KVLayout:
    """Rows of the clean region and of the window.

    What does not fit into `clean_tokens` is cut down when a chunk retires. The chunks of the whole video bound what can
    be held at once.
    """

    def __init__(self, *, chunk_tokens: int, clean_tokens: int, window: int, chunks: int, sink_tokens: int = 0) -> None:
        self.chunk_tokens, self.clean_tokens, self._slots = chunk_tokens, clean_tokens, window
        self.sink_tokens = min(sink_tokens, clean_tokens)
        self.capacity = min(clean_tokens + window * chunk_tokens, chunks * chunk_tokens)  # rows in all (B_total)
        self.clean: list[tuple[int, int]] = []
        """(chunk, rows) of the clean region, oldest first; chunk -1 stands for tokens of many."""
        self.window_chunks: list[int] = []  # oldest first
        self.published = -1
        """The last chunk of which all branches have the rows of the first; all before it were published too."""

    @property
    def clean_rows(self) -> int:
        """Rows of the clean region that are in use."""
        return sum(rows for _, rows in self.clean)

    @property
    def used_rows(self) -> int:
        """Rows in use in all."""
        return self.clean_rows + len(self.window_chunks) * self.chunk_tokens

    @property
    def clean_chunks(self) -> tuple[int, ...]:
        """Finished chunks that are held whole, oldest first."""
        return tuple(chunk for chunk, _ in self.clean if chunk != MIXED)

    @property
    def alike(self) -> int:
        """Rows at the front that are the same in all branches; once they are compressed, they are not."""
        alike = takewhile(lambda one: one[0] != MIXED and one[0] <= self.published, self.clean)
        return sum(rows for _, rows in alike)

    def enter(self, chunk: int) -> None:
        """Give a chunk the next slot of the window."""
        if len(self.window_chunks) == self._slots:
            raise ValueError(f"chunk {chunk} cannot enter: the window holds {self.window_chunks} already")
        if self.window_chunks and chunk != self.window_chunks[-1] + 1:
            raise ValueError(f"chunk {chunk} cannot follow chunk {self.window_chunks[-1]} into the window")
        self.window_chunks.append(chunk)

    def retire(self, chunk: int) -> int:
        """Move the oldest chunk of the window to the clean region, where it stands already.

        Gives the rows that the clean region now has too many; `drop_oldest` or `mix` must follow if that is not 0.
        """
        if not self.window_chunks or self.window_chunks[0] != chunk:
            raise ValueError(f"chunk {chunk} cannot retire: the window holds {self.window_chunks}")
        self.window_chunks.pop(0)
        self.clean.append((chunk, self.chunk_tokens))
        return max(0, self.clean_rows - self.clean_tokens)

    def drop_oldest(self, rows: int) -> None:
        """Take rows away from the front of the clean region, behind those that stay."""
        kept, stays = [], self.sink_tokens
        for chunk, held in self.clean:
            own = min(stays, held)
            gone = min(rows, held - own)
            stays -= own
            rows -= gone
            if held > gone:
                kept.append((chunk, held - gone))
        self.clean = kept

    def mix(self, rows: int) -> None:
        """The clean region was compressed to so many rows, which belong to no single chunk any more."""
        if rows > self.clean_rows:
            raise ValueError(f"{self.clean_rows} rows cannot be compressed to {rows}")
        self.clean = [(MIXED, rows)]

    def rows(self, chunk: int) -> slice:
        """Rows of a chunk that is held, in the window or in the clean region; a KeyError if it is not."""
        start = 0
        for kept, rows in self.clean:
            if kept == chunk:
                return slice(start, start + rows)
            start += rows
        if chunk not in self.window_chunks:
            raise KeyError(f"chunk {chunk} is not held")
        start += self.window_chunks.index(chunk) * self.chunk_tokens
        return slice(start, start + self.chunk_tokens)

    def span(self, keys_from: int | None, chunk: int) -> slice:
        """Rows that a chunk attends to: from chunk `keys_from` (None: from the first row) to its own last row."""
        start = 0 if keys_from is None else self.rows(keys_from).start
        return slice(start, self.rows(chunk).stop)

    def restore(self, clean: Sequence[tuple[int, int]], window: Sequence[int], published: int) -> None:
        """Go on from what another of the same size has come to; a ValueError if it does not fit."""
        rows = sum(rows for _, rows in clean)
        within = rows <= self.clean_tokens and len(window) <= self._slots
        if not within or rows + len(window) * self.chunk_tokens > self.capacity:
            raise ValueError(f"{rows} clean rows and {len(window)} chunks do not fit into {self.capacity} rows")
        self.clean, self.window_chunks, self.published = list(clean), list(window), published
