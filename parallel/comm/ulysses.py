"""Ulysses attention over the ranks of a stage: each has some of a chunk's tokens, and some heads.

Everything but attention is done token by token, on a rank's own tokens. For attention, keys and values are exchanged so
that a rank gets all tokens of its key heads, which its KV buffer holds; then queries likewise, and the result the
other way round. The exchange of keys and values runs while the queries are projected.

Shapes: S tokens of a chunk, s of them on this rank, R ranks, H query heads, G key heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import InputError
from models.protocols import KVGeometry, KVView


def local_heads(geometry: KVGeometry, ranks: int) -> KVGeometry:
    """The KV that one of the ranks of a stage holds: its part of the heads; an InputError if there is none."""
    if geometry.key_heads % ranks:
        raise InputError(f"--cp {ranks} does not divide the model's {geometry.key_heads} key heads")
    return replace(geometry, key_heads=geometry.key_heads // ranks, query_heads=geometry.query_heads // ranks)


class TokenSplit:
    """Which tokens of a chunk each rank computes: contiguous parts that differ by one token at most."""

    def __init__(self, tokens: int, ranks: int) -> None:
        share, more = divmod(tokens, ranks)
        self.counts = [share + (rank < more) for rank in range(ranks)]
        ends = list(accumulate(self.counts))
        self.slices = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


class UlyssesShard:
    """A `TokenShard`: one rank's tokens. The ranks of `group` exchange, through host memory if asked for."""

    def __init__(self, split: TokenSplit, cp_rank: int, group: dist.ProcessGroup, *, through_host: bool) -> None:
        self._split, self._cp_rank, self._group, self._through_host = split, cp_rank, group, through_host

    @property
    def tokens(self) -> slice:
        return self._split.slices[self._cp_rank]

    def view(self, inner: KVView) -> KVView:
        """The view that this rank's tokens attend to; `inner` holds this rank's heads of all tokens."""
        return _UlyssesView(inner, self)

    def gather_tokens(self, x: Tensor) -> _Exchange:
        """Begin to swap: own tokens of all heads [1, s, R * n, d] for all tokens of own heads [1, S, n, d]."""
        counts, own = self._split.counts, self._split.counts[self._cp_rank]
        ranks, heads, size = len(counts), x.shape[2] // len(counts), x.shape[3]
        sent = x[0].unflatten(1, (ranks, heads)).transpose(0, 1).contiguous()
        row = heads * size
        return self._begin(sent, [own * row] * ranks, [count * row for count in counts], (1, -1, heads, size))

    def gather_heads(self, x: Tensor) -> Tensor:
        """The inverse: all tokens of own heads [1, S, n, d] to own tokens of all heads [1, s, R * n, d]."""
        counts, own = self._split.counts, self._split.counts[self._cp_rank]
        ranks, (heads, size) = len(counts), x.shape[2:]
        row, sent = heads * size, x[0].contiguous()
        exchange = self._begin(sent, [count * row for count in counts], [own * row] * ranks, (ranks, own, heads, size))
        return exchange.result().transpose(0, 1).flatten(1, 2)[None]

    def _begin(self, sent: Tensor, sending: list[int], receiving: list[int], shape: tuple[int, ...]) -> _Exchange:
        device = sent.device
        if self._through_host:
            sent = sent.cpu()
        received = sent.new_empty(sum(receiving))
        work = dist.all_to_all_single(received, sent.flatten(), receiving, sending, group=self._group, async_op=True)
        assert work is not None
        return _Exchange(work, sent, received, shape, device)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """An exchange that was begun. It refers to both tensors until it is done."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    shape: tuple[int, ...]
    device: torch.device

    def result(self) -> Tensor:
        """The tensor received; on NCCL the current stream waits for it, on gloo the host."""
        self.work.wait()
        return self.received.view(self.shape).to(self.device)


class _UlyssesView:
    def __init__(self, inner: KVView, shard: UlyssesShard) -> None:
        self._inner, self._shard = inner, shard
        self._stored: tuple[_Exchange, _Exchange] | None = None

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Begin to exchange keys and values [1, s, G, d]."""
        self._stored = self._shard.gather_tokens(k), self._shard.gather_tokens(v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of own queries [1, s, H, d], with the other ranks' help."""
        assert self._stored is not None
        queries = self._shard.gather_tokens(q)
        keys, values = self._stored
        self._stored = None
        self._inner.store(layer, keys.result(), values.result())
        return self._shard.gather_heads(self._inner.attend(layer, queries.result()))
