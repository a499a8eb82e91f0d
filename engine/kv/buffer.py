"""The KV buffers of one request: one tensor per layer and branch, written and read in place.

The first rows of a layout may lie elsewhere: those that are alike in all branches in the first one, and with offload
all clean rows in host memory. When a chunk retires into a full clean region, the region is cut down: either its oldest
chunk is dropped, or (with a budget) the region and the new chunk are compressed together.

Shapes: N rows of the buffer, S tokens of a chunk, Q queries, G key heads, d head size, H query heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.kv.layout import MIXED, KVPlan
from engine.kv.selection import select
from engine.kv.staging import Staging
from engine.kv.views import Due, IsolatedView, LayerKV, SliceView
from engine.video import KVOp
from models.attention import Attention
from models.protocols import KVGeometry, KVView

_BLOCK = 4096  # rows that are moved at once; bounds the scratch memory


OnKept = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""Called with a compression: branch, layer, queries [Q, H, d], keys [L, G, d] and positions kept [keep, G]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVState:
    """The state of a `KVBuffer`, wherever it holds its rows. Tensors may be views, or copies in a checkpoint."""

    clean: Sequence[tuple[int, int]]  # as of a `KVLayout`
    window: Sequence[int]  # likewise
    published: int  # likewise
    layers: Mapping[tuple[int, int], LayerKV]
    """By branch and layer, the rows in use; of branches after the first those alone that are not alike in all."""


class KVBuffer:
    """Keys and values of one request, in all layers that are held here. The views attend with `attention`."""

    def __init__(self, plan: KVPlan, geometry: KVGeometry, attention: Attention, on_kept: OnKept | None = None) -> None:
        self._on_kept = on_kept
        self.layout, self._plan, self._geometry, self._attention = plan.layout(), plan, geometry, attention
        branches = range(plan.branches)
        self._layers = {(branch, number): self._allocate(branch) for branch in branches for number in geometry.layers}
        self._staging = Staging(plan, geometry)

    def _allocate(self, branch: int) -> LayerKV:
        plan, shape = self._plan, self._geometry
        heads, size, dtype, device = shape.key_heads, shape.head_size, shape.dtype, shape.device
        layer = LayerKV(torch.zeros((2, plan.device_rows(branch), heads, size), dtype=dtype, device=device))
        if plan.offload:
            rows = 2, plan.host_rows(branch), heads, size
            layer.host = torch.zeros(rows, dtype=dtype, pin_memory=device.type == "cuda")
        if plan.selection is not None:
            queries = plan.query_rows(), shape.query_heads, size
            layer.queries = torch.zeros(queries, dtype=dtype, device=device)
            layer.origin = torch.zeros((self.layout.capacity, heads), dtype=torch.int32, device=device)
        return layer

    @property
    def nbytes(self) -> int:
        """Bytes held on the device, the bookkeeping of compression counted."""
        return sum(layer.nbytes for layer in self._layers.values()) + self._staging.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes held in host memory beside it, with offload."""
        return self._plan.host_nbytes(self._geometry)

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
        layers = {number: self._layers[branch, number] for number in self._geometry.layers}
        begin, span = self._begin(branch), layout.span(keys_from, chunk)
        parted = span.start < begin
        return SliceView(
            layers,
            _within(layout.rows(chunk), begin),
            _within(span, begin),
            self._attention,
            asks=asks,
            compress=partial(self._compress, branch),
            elsewhere={key: self._pieces(branch, key, span.start, begin) for key in layers} if parted else None,
            staging=self._staging if parted else None,
        )

    def kept_shares(self, chunks: int) -> Tensor:
        """Share of the tokens of each of the first chunks that stands in the clean region, [chunks] fp32 on the CPU.

        It is the mean over layers, heads and branches.
        """
        layout, counts = self.layout, torch.zeros(chunks)
        if self._plan.selection is None:
            counts[list(layout.clean_chunks)] = 1.0
            return counts
        for layer in self._layers.values():
            assert layer.origin is not None
            counts += torch.bincount(layer.origin[: layout.clean_rows].flatten(), minlength=chunks).cpu()
        return counts / (len(self._layers) * self._geometry.key_heads * layout.chunk_tokens)

    def state(self) -> KVState:
        """What it holds now; later writes change it."""
        self._compress_due()
        layout, layers = self.layout, {}
        self._staging.settle()
        for (branch, number), layer in self._layers.items():
            pieces = self._pieces(branch, number, layout.alike if branch else 0, layout.used_rows)
            pieces = pieces or [layer.kv[:, :0]]
            kv = pieces[0] if len(pieces) == 1 else torch.cat([piece.cpu() for piece in pieces], dim=1)
            origin = None if layer.origin is None else layer.origin[: layout.used_rows]
            layers[branch, number] = LayerKV(kv, layer.queries, origin)
        window, published = list(layout.window_chunks), layout.published
        return KVState(clean=list(layout.clean), window=window, published=published, layers=layers)

    def restore(self, state: KVState) -> None:
        """Go on from the state of a buffer of the same size, layers and heads; a ValueError if it does not fit."""
        if set(self._layers) != set(state.layers):
            raise ValueError(f"it has the layers {sorted(state.layers)} and not {sorted(self._layers)}")
        layout = self.layout
        layout.restore(state.clean, state.window, state.published)
        used = layout.used_rows
        for (branch, number), saved in sorted(state.layers.items()):  # the first branch first, as others copy of it
            layer, first = self._layers[branch, number], layout.alike if branch else 0
            _spread(self._pieces(branch, number, first, used), saved.kv)
            if not self._plan.shared:
                self._copy_first(branch, number, 0, first)
            _fill(layer.queries, saved.queries)
            _fill(None if layer.origin is None else layer.origin[:used], saved.origin)

    def _begin(self, branch: int) -> int:
        """The row of the layout that the branch's tensors begin with; those before lie elsewhere."""
        if self._plan.offload:
            return self.layout.clean_rows
        return self.layout.alike if self._plan.shared and branch else 0

    def _begins(self) -> list[int]:
        return [self._begin(branch) for branch in range(self._plan.branches)]

    def _owner(self, branch: int, chunk: int) -> int:
        """The branch whose memory on the host has a clean chunk of a branch."""
        return 0 if self._plan.shared and chunk <= self.layout.published else branch

    def _place(self, chunk: int, rows: int) -> int:
        """Where a clean chunk begins in so many rows on the host: those that stay come first, the others take turns."""
        stay, row = self.layout.sink_tokens, chunk * self.layout.chunk_tokens
        if chunk == MIXED:
            return 0
        return row if row < stay else stay + (row - stay) % (rows - stay)

    def _pieces(self, branch: int, number: int, start: int, stop: int) -> list[Tensor]:
        """Where rows of a layer lie, in order; from the beginning of a chunk on, if some of them are on the host."""
        begin, pieces, at = self._begin(branch), list[Tensor](), 0
        if self._plan.offload:
            for chunk, rows in self.layout.clean:
                held = self._layers[self._owner(branch, chunk), number].host
                assert held is not None
                if start <= at < stop:
                    place = self._place(chunk, held.shape[1])
                    pieces.append(held[:, place : place + rows])
                at += rows
        elif start < min(begin, stop):
            pieces.append(self._layers[0, number].kv[:, start : min(begin, stop)])
        if stop > begin:
            pieces.append(self._layers[branch, number].kv[:, _within(slice(start, stop), begin)])
        return pieces

    def _copy_first(self, branch: int, number: int, start: int, stop: int) -> None:
        """Give a branch the rows of the first, which has them in the same places."""
        if branch:
            pieces = self._pieces(branch, number, start, stop), self._pieces(0, number, start, stop)
            for target, source in zip(*pieces, strict=True):
                target.copy_(source)

    def _compress_due(self) -> None:
        """Make compressions that no chunk has made since, with the queries of what was denoised last."""
        for key, layer in self._layers.items():
            if layer.due is not None:
                assert layer.queries is not None
                self._compress(*key, layer.queries)

    def _retire(self, chunk: int) -> None:
        self._compress_due()
        layout, selection = self.layout, self._plan.selection
        used, rows = layout.used_rows, layout.rows(chunk)
        begins = self._begins()
        until_now = {key: self._pieces(*key, 0, rows.stop) for key in self._layers}
        for layer in self._layers.values():
            if layer.origin is not None:
                layer.origin[rows] = chunk
        excess = layout.retire(chunk)
        if excess and selection is not None:
            layout.mix(layout.clean_tokens)
            for key, layer in self._layers.items():
                layer.due = Due(pieces=until_now[key], begin=begins[key[0]], used=used)
            if selection.asks == "last":
                self._compress_due()
            return
        layout.drop_oldest(excess)
        if self._plan.offload and chunk in layout.clean_chunks:
            own = [key for key in self._layers if self._owner(key[0], chunk) == key[0]]
            places = {key: self._pieces(*key, layout.rows(chunk).start, layout.clean_rows)[0] for key in own}
            self._staging.to_host((places[key], until_now[key][-1]) for key in own)
        self._settle(begins, used, excess)

    def _settle(self, begins: Sequence[int], used: int, gone: int) -> None:
        """Move rows, of which `used` were held, to where they belong now that `gone` are not there any more.

        The branches began with the rows `begins`. Those that are never dropped stay where they are.
        """
        stays = min(self.layout.sink_tokens, self.layout.clean_rows)
        now = self._begins()
        for (branch, _), layer in self._layers.items():
            first = max(now[branch], stays)
            rows = _within(slice(first + gone, used), begins[branch])
            _move_left(layer.kv, rows, to=first - now[branch])

    def _compress(self, branch: int, number: int, queries: Tensor) -> None:
        """Keep the best rows of the clean region for queries [Q, H, d], at the front, and let the others follow them.

        They stay in their order, or, where the next chunk asks, come in that of their scores, as published.
        """
        layer, selection = self._layers[branch, number], self._plan.selection
        assert layer.origin is not None and layer.due is not None and selection is not None
        due, kept = layer.due, self.layout.clean_tokens
        *before, kv = due.pieces
        if layer.host is not None:
            kv = self._staging.join((branch, number), before, kv)
            following = self._layers.get((branch, number + 1))
            if selection.asks == "last" and following is not None and following.due is not None:
                self._staging.fetch((branch, number + 1), following.due.pieces[:-1])
        positions = select(
            queries,
            kv[0],
            layer.origin[: kv.shape[1]],
            keep=kept,
            frame_tokens=self._plan.frame_tokens,
            chunk_tokens=self.layout.chunk_tokens,
            settings=selection,
            layer=number,
        )
        if self._on_kept is not None:
            self._on_kept(branch, number, queries, kv[0], positions)
        _gather(kv, layer.origin, positions, kept if selection.asks == "next" else _BLOCK)
        if layer.host is not None:
            self._staging.to_host([(layer.host, kv[:, :kept])])
        _move_left(layer.kv, _within(slice(kv.shape[1], due.used), due.begin), to=kept - self._begin(branch))
        layer.due = None

    def _publish(self, chunk: int) -> None:
        """Give the other branches a finished chunk's rows of branch 0; nothing is left to do once they were dropped."""
        layout = self.layout
        if chunk not in (*layout.clean_chunks, *layout.window_chunks):
            return
        rows, used = layout.rows(chunk), layout.used_rows
        begins = self._begins()
        if not self._plan.shared or chunk in layout.window_chunks:
            for branch, number in self._layers:
                self._copy_first(branch, number, rows.start, rows.stop)
        layout.published = chunk
        self._settle(begins, used, 0)


def _gather(kv: Tensor, origin: Tensor, positions: Tensor, block: int) -> None:
    """Bring rows to the front, so many at once."""
    # Positions ascend and are never before where they go, so a block never overwrites what a later one reads.
    for start in range(0, positions.shape[0], block):
        part = positions[start : start + block]
        stop = start + part.shape[0]
        kv[:, start:stop] = kv.gather(1, part[None, ..., None].expand(2, -1, -1, kv.shape[-1]))
        origin[start:stop] = origin.gather(0, part)


def _within(rows: slice, begin: int) -> slice:
    """Rows of a layout in a tensor that begins with the row `begin`."""
    return slice(max(rows.start - begin, 0), rows.stop - begin)


def _spread(pieces: Sequence[Tensor], saved: Tensor) -> None:
    """Fill pieces, one behind the other."""
    rows = [piece.shape[1] for piece in pieces]
    if sum(rows) != saved.shape[1]:
        raise ValueError(f"it has {saved.shape[1]} rows and not {sum(rows)}")
    for piece, part in zip(pieces, saved.split(rows, dim=1), strict=True):
        _fill(piece, part)


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
    if not by:
        return
    for start in range(rows.start, rows.stop, by):
        stop = min(start + by, rows.stop)
        kv[:, start - by : stop - by] = kv[:, start:stop]
