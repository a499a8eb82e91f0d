"""Which tokens of the past are kept: FlowCache's importance-redundancy score (Eqs. 9-12 and 20).

Tensors of one layer in, positions out; on the device of the tensors, without a host copy. It does not know where the
tokens stand in a buffer.

Shapes: Q queries, H query heads, G key heads, L keys, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import InputError

Granularity = Literal["token", "frame", "chunk"]
Asker = Literal["last", "next"]
_ROWS_AT_ONCE = 1 << 24
"""Scores held at once while importance is taken; bounds the scratch memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionSettings:
    """How tokens are scored and kept."""

    retention: Granularity = "token"  # what is kept or dropped as one: single tokens, latent frames, or chunks
    queries: Granularity = "token"
    """Which queries of the chunk that was denoised last ask: its last tokens, its last frame, or all."""
    query_tokens: int = 50  # how many tokens that is for `token`
    asks: Asker = "last"
    """Whose queries ask: of the chunk that was denoised last, or of the next one, before it attends."""
    importance_weight: float = 0.07  # lambda of Eq. 12
    pool: int = 7  # kernel of the max-pooling of Eq. 10; odd

    def __post_init__(self) -> None:
        for name, value in (("retention", self.retention), ("queries", self.queries)):
            if value not in (known := get_args(Granularity)):
                raise InputError(f"unknown {name} granularity {value!r}: choose from {', '.join(known)}")
        if self.asks not in get_args(Asker):
            raise InputError(f"the queries of {self.asks!r} chunk cannot ask: choose from {', '.join(get_args(Asker))}")
        if not 0 <= self.importance_weight <= 1:
            raise InputError(f"the importance weight {self.importance_weight} is not between 0 and 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise InputError(f"the pooling kernel {self.pool} is not an odd number")
        if self.query_tokens < 1:
            raise InputError(f"{self.query_tokens} query tokens cannot ask for anything")

    def query_rows(self, frame_tokens: int, chunk_tokens: int) -> int:
        """How many of a chunk's last queries are used."""
        wanted = {"token": self.query_tokens, "frame": frame_tokens, "chunk": chunk_tokens}
        return min(chunk_tokens, wanted[self.queries])


def importance(queries: Tensor, keys: Tensor) -> Tensor:
    """How much the queries attend to each key (Eq. 9), query heads of a group pooled by maximum before the softmax.

    Queries [Q, H, d], keys [L, G, d]; gives [G, L] fp32, of which rows sum to one.
    """
    (count, _, size), (length, groups, _) = queries.shape, keys.shape
    # On a GPU products of bf16 values are exact, and added up in fp32; a CPU has no such product.
    exact = keys.device.type != "cpu" and keys.dtype == queries.dtype == torch.bfloat16
    if not exact:
        queries, keys = queries.float(), keys.float()
    product = partial(torch.bmm, out_dtype=torch.float32) if exact else torch.bmm
    k_GdL = keys.permute(1, 2, 0)
    q_GHQd = queries.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    total = torch.zeros(groups, length, device=keys.device)
    heads = q_GHQd.shape[1]
    step = max(1, _ROWS_AT_ONCE // (groups * heads * length))
    for part in q_GHQd.split(step, dim=2):
        logits = product(part.flatten(1, 2), k_GdL).unflatten(1, (heads, -1)).amax(1) / math.sqrt(size)
        total += logits.softmax(-1).sum(1)
    return total / count


def redundancy(keys: Tensor) -> Tensor:
    """How alike each key is to the others: softmax of its mean cosine similarity (Eq. 11), in linear time (Eq. 20).

    The mean over all keys of k_i . k_j is (mean of k_i) . k_j. The diagonal, which Eq. 11 sets to zero, is taken off.
    Keys [L, G, d]; gives [G, L] fp32, of which rows sum to one.
    """
    unit = F.normalize(keys.float(), dim=-1)
    mean_similarity = torch.einsum("lgd,gd->gl", unit, unit.mean(0))
    own = torch.einsum("lgd,lgd->gl", unit, unit) / keys.shape[0]
    return (mean_similarity - own).softmax(-1)


def scores(queries: Tensor, keys: Tensor, settings: SelectionSettings) -> Tensor:
    """Selection score of every key, [G, L] fp32 (Eqs. 10 and 12)."""
    pooled = F.max_pool1d(importance(queries, keys), settings.pool, stride=1, padding=settings.pool // 2)
    weight = settings.importance_weight
    return weight * pooled - (1 - weight) * redundancy(keys)


def select(
    queries: Tensor, keys: Tensor, *, keep: int, frame_tokens: int, chunk_tokens: int, settings: SelectionSettings
) -> Tensor:
    """Positions [keep, G] int64 of the tokens that are kept, for each key head: ascending, or the best first where the
    next chunk asks.

    Queries [Q, H, d] are the last of the chunk that was denoised last, or more; keys [L, G, d]. `keep` must be a
    multiple of the unit of retention.
    """
    asking = queries[-settings.query_rows(frame_tokens, chunk_tokens) :]
    score = scores(asking, keys, settings)
    unit = {"token": 1, "frame": frame_tokens, "chunk": chunk_tokens}[settings.retention]
    if keep % unit or keys.shape[0] % unit:
        raise ValueError(f"{keep} of {keys.shape[0]} tokens are not whole units of {unit} ({settings.retention})")
    if unit > 1:
        score = score.unflatten(1, (-1, unit)).mean(-1)
    kept = score.topk(keep // unit, dim=-1).indices
    if settings.asks == "last":
        kept = kept.sort(dim=-1).values
    positions = kept[..., None] * unit + torch.arange(unit, device=keys.device)
    return positions.flatten(1).T
