"""The KV buffers of one request: one tensor per layer and branch, written and read in place.

Shapes: N rows of the buffer, S tokens of a chunk, G key heads, d head size, H query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kv.layout import KVLayout
from engine.work import KVOp
from models.attention import Attention
from models.family import KVGeometry

__all__ = ["IsolatedView", "KVBuffer", "SliceView"]


class SliceView:
    """A chunk's view: it writes its own rows and attends to one slice of the buffer that ends with them."""

    def __init__(self, layers: dict[int, Tensor], own: slice, span: slice, attention: Attention) -> None:
        self._layers, self._own, self._span, self._attention = layers, own, span, attention

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the chunk's keys and values [1, S, G, d] of a layer."""
        buffer = self._layers[layer]
        buffer[0, self._own] = k[0]
        buffer[1, self._own] = v[0]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [1, S, H, d] over the slice."""
        seen = self._layers[layer][:, self._span]
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
    """Keys and values of one request, in all layers that are held here.

    Args:
        layout: bookkeeping of rows; it belongs to this buffer.
        geometry: shape of a token's KV.
        branches: independent copies, for guidance.
        attention: what the views attend with.
    """

    def __init__(self, layout: KVLayout, geometry: KVGeometry, *, branches: int, attention: Attention) -> None:
        self.layout = layout
        self._attention = attention
        shape = (2, layout.capacity, geometry.key_heads, geometry.head_size)
        self._branches = [
            {layer: torch.zeros(shape, dtype=geometry.dtype, device=geometry.device) for layer in geometry.layers}
            for _ in range(branches)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for branch in self._branches for buffer in branch.values())

    def apply(self, op: KVOp) -> None:
        """Carry out a change that a work item asks for."""
        if op.kind == "enter":
            self.layout.enter(op.chunk)
        elif op.kind == "retire":
            self._retire(op.chunk)
        else:
            self._publish(op.chunk)

    def view(self, branch: int, chunk: int, keys_from: int | None) -> SliceView:
        """What a chunk sees from chunk `keys_from` on; None for everything."""
        layout = self.layout
        return SliceView(self._branches[branch], layout.rows(chunk), layout.span(keys_from, chunk), self._attention)

    def isolated_view(self) -> IsolatedView:
        """What a chunk sees in a context-free pass."""
        return IsolatedView(self._attention)

    def _retire(self, chunk: int) -> None:
        used = self.layout.used_rows
        excess = self.layout.retire(chunk)
        if not excess:
            return
        self.layout.drop_oldest(excess)
        for branch in self._branches:
            for buffer in branch.values():
                _shift_left(buffer, excess, used)

    def _publish(self, chunk: int) -> None:
        """Copy a finished chunk's rows from branch 0; nothing is left to do once they were dropped."""
        if chunk not in (*self.layout.clean_chunks, *self.layout.window_chunks):
            return
        rows = self.layout.rows(chunk)
        for branch in self._branches[1:]:
            for layer, buffer in branch.items():
                buffer[:, rows] = self._branches[0][layer][:, rows]


def _shift_left(buffer: Tensor, by: int, used: int) -> None:
    """Move rows by .. used to the front, in blocks of `by` rows so that no copy overlaps itself."""
    for start in range(0, used - by, by):
        stop = min(start + by, used - by)
        buffer[:, start:stop] = buffer[:, start + by : stop + by]
