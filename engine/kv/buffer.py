"""The KV buffers of one request: one tensor per layer and branch, written and read in place.

When a chunk retires into a full clean region, the region is cut down: either its oldest chunk is dropped, or (with a
budget) the region and the new chunk are compressed together. Both move rows within the buffer.

Shapes: N rows of the buffer, S tokens of a chunk, Q queries, G key heads, d head size, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.kv.layout import KVPlan
from engine.kv.selection import select
from engine.video import KVOp
from models.attention import Attention
from models.protocols import KVGeometry, KVView

_BLOCK = 4096  # rows that are moved at once; bounds the scratch memory


OnKept = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""Told of a compression: branch, layer, queries [Q, H, d], keys [L, G, d] and positions kept [keep, G]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A compression that is still to be made in a layer; where rows stand afterwards is known."""

    length: int  # rows of the clean region before it
    used: int  # rows in all before it


@dataclass(slots=True)
class LayerKV:
    """One layer of one branch; with compression also who asks and whence tokens came."""

    kv: Tensor  # keys and values [2, N, G, d]
    queries: Tensor | None = None  # of the chunk that was denoised last [Q, H, d]
    origin: Tensor | None = None  # chunk of each row [N, G]
    due: Due | None = None  # a compression that the next queries are to make

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return sum(part.nbytes for part in (self.kv, self.queries, self.origin) if part is not None)

    def first(self, rows: int) -> LayerKV:
        """Its first rows."""
        return LayerKV(self.kv[:, :rows], self.queries, None if self.origin is None else self.origin[:rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class KVState:
    """The state of a `KVBuffer`. Tensors are views of the rows in use, or their copies in a checkpoint."""

    clean: Sequence[tuple[int, int]]  # as of a `KVLayout`
    window: Sequence[int]  # likewise
    layers: Mapping[tuple[int, int], LayerKV]  # by branch and layer


class SliceView:
    """A chunk's view: it writes its own rows and attends to one slice of the buffer that ends with them."""

    def __init__(
        self,
        layers: dict[int, LayerKV],
        own: slice,
        span: slice,
        attention: Attention,
        *,
        asks: bool,
        compress: Callable[[int, Tensor], None] | None = None,  # makes a layer's compression that is due
    ) -> None:
        self._layers, self._own, self._span, self._attention, self._asks = layers, own, span, attention, asks
        self._compress = compress
        self._waiting: tuple[Tensor, Tensor] | None = None

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the chunk's keys and values [1, S, G, d] of a layer, once the rows that they go to are free."""
        if self._layers[layer].due is not None:
            self._waiting = k, v
            return
        kv = self._layers[layer].kv
        kv[0, self._own] = k[0]
        kv[1, self._own] = v[0]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [1, S, H, d] over the slice."""
        held = self._layers[layer]
        if self._waiting is not None:
            assert self._compress is not None
            self._compress(layer, q[0])
            waiting, self._waiting = self._waiting, None
            self.store(layer, *waiting)
        if self._asks and held.queries is not None:
            held.queries.copy_(q[0, -held.queries.shape[0] :])
        seen = held.kv[:, self._span]
        return self._attention(q, seen[0][None], seen[1][None])


class IsolatedView:
    """A chunk that sees itself only and leaves nothing behind."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Hold the chunk's keys and values until its queries come."""
        self._kv = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [1, S, H, d] over the chunk itself."""
        return self._attention(q, *self._kv)


class KVBuffer:
    """Keys and values of one request, in all layers that are held here. The views attend with `attention`."""

    def __init__(self, plan: KVPlan, geometry: KVGeometry, attention: Attention, on_kept: OnKept | None = None) -> None:
        self._on_kept = on_kept
        self.layout, self._plan, self._attention = plan.layout(), plan, attention
        self._branches = [{layer: self._allocate(geometry) for layer in geometry.layers} for _ in range(plan.branches)]

    def _allocate(self, geometry: KVGeometry) -> LayerKV:
        rows, heads, size = self.layout.capacity, geometry.key_heads, geometry.head_size
        layer = LayerKV(torch.zeros((2, rows, heads, size), dtype=geometry.dtype, device=geometry.device))
        if self._plan.selection is not None:
            shape = (self._plan.query_rows(), geometry.query_heads, size)
            layer.queries = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
            layer.origin = torch.zeros((rows, heads), dtype=torch.int32, device=geometry.device)
        return layer

    @property
    def nbytes(self) -> int:
        """Bytes held, the bookkeeping of compression counted."""
        return sum(layer.nbytes for branch in self._branches for layer in branch.values())

    def apply(self, op: KVOp) -> None:
        """Carry out a change that a work item asks for."""
        if op.kind == "enter":
            self.layout.enter(op.chunk)
        elif op.kind == "retire":
            self._retire(op.chunk)
        else:
            self._publish(op.chunk)

    def view(self, branch: int | None, chunk: int, keys_from: int | None, *, asks: bool) -> KVView:
        """What a chunk sees from chunk `keys_from` on, None for everything, in a branch of guidance.

        In a context-free pass, for which the branch is None, it sees itself only. The next compression asks with the
        queries of the view that was the last one with `asks`.
        """
        layout = self.layout
        if branch is None:
            return IsolatedView(self._attention)
        own, span = layout.rows(chunk), layout.span(keys_from, chunk)
        compress = partial(self._compress, branch)
        return SliceView(self._branches[branch], own, span, self._attention, asks=asks, compress=compress)

    def kept_shares(self, chunks: int) -> Tensor:
        """Share of the tokens of each of the first chunks that stands in the clean region, [chunks] fp32 on the CPU.

        It is the mean over layers, heads and branches.
        """
        layout, counts = self.layout, torch.zeros(chunks)
        if self._plan.selection is None:
            counts[list(layout.clean_chunks)] = 1.0
            return counts
        layers = [layer for branch in self._branches for layer in branch.values()]
        for layer in layers:
            assert layer.origin is not None
            counts += torch.bincount(layer.origin[: layout.clean_rows].flatten(), minlength=chunks).cpu()
        heads = layers[0].kv.shape[2]
        return counts / (len(layers) * heads * layout.chunk_tokens)

    def state(self) -> KVState:
        """What it holds now; later writes change it."""
        used = self.layout.used_rows
        layers = {
            (branch, number): layer.first(used)
            for branch, held in enumerate(self._branches)
            for number, layer in held.items()
        }
        return KVState(clean=list(self.layout.clean), window=list(self.layout.window_chunks), layers=layers)

    def restore(self, state: KVState) -> None:
        """Go on from the state of a buffer of the same size, layers and heads; a ValueError if it does not fit."""
        own = {(branch, number) for branch, held in enumerate(self._branches) for number in held}
        if own != set(state.layers):
            raise ValueError(f"it has the layers {sorted(state.layers)} and not {sorted(own)}")
        self.layout.restore(state.clean, state.window)
        used = self.layout.used_rows
        for (branch, number), saved in state.layers.items():
            layer = self._branches[branch][number].first(used)
            _fill(layer.kv, saved.kv)
            _fill(layer.queries, saved.queries)
            _fill(layer.origin, saved.origin)

    def _retire(self, chunk: int) -> None:
        layout = self.layout
        used, rows = layout.used_rows, layout.rows(chunk)
        excess = layout.retire(chunk)
        layers = [layer for branch in self._branches for layer in branch.values()]
        for layer in layers:
            if layer.origin is not None:
                layer.origin[rows] = chunk
        if not excess:
            return
        if self._plan.selection is None:
            layout.drop_oldest(excess)
            for layer in layers:
                _move_left(layer.kv, slice(layout.sink_tokens + excess, used), to=layout.sink_tokens)
            return
        due = Due(length=layout.clean_rows, used=used)
        layout.mix(layout.clean_tokens)
        for branch, held in enumerate(self._branches):
            for number, layer in held.items():
                layer.due = due
                if self._plan.selection.asks == "last":
                    assert layer.queries is not None
                    self._compress(branch, number, layer.queries)

    def _compress(self, branch: int, number: int, queries: Tensor) -> None:
        """Keep the best rows of the clean region for queries [Q, H, d], at the front, and let the others follow them.

        They stay in their order, or, where the next chunk asks, come in that of their scores, as published.
        """
        layer, selection = self._branches[branch][number], self._plan.selection
        assert layer.origin is not None and layer.due is not None and selection is not None
        length, kept = layer.due.length, self.layout.clean_tokens
        positions = select(
            queries,
            layer.kv[0, :length],
            keep=kept,
            frame_tokens=self._plan.frame_tokens,
            chunk_tokens=self.layout.chunk_tokens,
            settings=selection,
        )
        if self._on_kept is not None:
            self._on_kept(branch, number, queries, layer.kv[0, :length], positions)
        self._gather(layer, positions, kept if selection.asks == "next" else _BLOCK)
        _move_left(layer.kv, slice(length, layer.due.used), to=kept)
        layer.due = None

    def _gather(self, layer: LayerKV, positions: Tensor, block: int) -> None:
        """Bring rows to the front, so many at once."""
        assert layer.origin is not None
        # Positions ascend and are never before where they go, so a block never overwrites what a later one reads.
        for start in range(0, positions.shape[0], block):
            part = positions[start : start + block]
            stop = start + part.shape[0]
            index = part[None, ..., None].expand(2, -1, -1, layer.kv.shape[-1])
            layer.kv[:, start:stop] = layer.kv.gather(1, index)
            layer.origin[start:stop] = layer.origin.gather(0, part)

    def _publish(self, chunk: int) -> None:
        """Copy a finished chunk's rows from branch 0; nothing is left to do once they were dropped."""
        if chunk not in (*self.layout.clean_chunks, *self.layout.window_chunks):
            return
        rows = self.layout.rows(chunk)
        for branch in self._branches[1:]:
            for number, layer in branch.items():
                layer.kv[:, rows] = self._branches[0][number].kv[:, rows]


def _fill(part: Tensor | None, saved: Tensor | None) -> None:
    if part is None and saved is None:
        return
    if part is None or saved is None or part.shape != saved.shape or part.dtype != saved.dtype:
        shapes = [None if one is None else (tuple(one.shape), one.dtype) for one in (saved, part)]
        raise ValueError(f"it has tensors of {shapes[0]} and not {shapes[1]}")
    part.copy_(saved)


def _move_left(kv: Tensor, rows: slice, *, to: int) -> None:
    """Move rows towards the front, in blocks no longer than the distance so that no copy overlaps itself."""
    by = rows.start - to
    for start in range(rows.start, rows.stop, by):
        stop = min(start + by, rows.stop)
        kv[:, start - by : stop - by] = kv[:, start:stop]
