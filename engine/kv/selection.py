"""Which tokens of the past are kept: FlowCache's importance-redundancy score (Eqs. 9-12 and 20), and others.

Tensors of one layer in, positions out; on the device of the tensors, without a host copy. It does not know where the
tokens stand in a buffer.

Shapes: Q queries, H query heads, G key heads, L keys, d head size.
"""

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
Score = Literal["flowcache", "importance", "redundancy", "recent", "random", "even"]
_MIX = -7046029254386353131  # the golden ratio of 64 bits, as a signed number
_ROWS_AT_ONCE = 1 << 24  # scores held at once while importance is taken; bounds the scratch memory


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionSettings:
    """How tokens are scored and kept."""

    score: Score = "flowcache"
    """What is kept first: what Eq. 12 says, its importance or what is least redundant alone, the newest, anything, or
    an even share of every past chunk."""
    retention: Granularity = "token"  # what is kept or dropped as one: single tokens, latent frames, or chunks
    queries: Granularity = "token"
    """Which queries of the chunk that was denoised last ask: its last tokens, its last frame, or all."""
    query_tokens: int = 50  # how many tokens that is for `token`
    asks: Asker = "last"
    """Whose queries ask: of the chunk that was denoised last, or of the next one, before it attends."""
    importance_weight: float = 0.07  # lambda of Eq. 12
    pool: int = 7  # kernel of the max-pooling of Eq. 10; odd

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise InputError(f"unknown score {self.score!r}: choose from {', '.join(get_args(Score))}")
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
    weight = {"importance": 1.0, "redundancy": 0.0}.get(settings.score, settings.importance_weight)
    return weight * pooled - (1 - weight) * redundancy(keys)


def _hash(chunks: Tensor, layer: int) -> Tensor:
    """Numbers in 0..1 [G, n] as if drawn, others for every place, layer and newest chunk. They depend on no tensor that
    is computed, so they are the same on any ranks. `chunks` [G, n] as of `_even`."""
    mixed = torch.arange(1, chunks.shape[1] + 1, device=chunks.device) * _MIX + (chunks[:, -1:].long() << 16) + layer
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 31)) * _MIX
    return (mixed >> 40 & 0xFFFFFF).float() / 2**24


def _even(chunks: Tensor) -> Tensor:
    """Scores [G, n] int64 that take one unit of every chunk, then a second one, and so on, of each those that are
    spread evenly over it; of equals the newest chunk's. `chunks` [G, n] says whose each unit is, oldest first."""
    place = torch.arange(chunks.shape[1], device=chunks.device).expand_as(chunks)
    begins = F.pad(chunks.diff(dim=-1) != 0, (1, 0), value=True)
    first = torch.where(begins, place, 0).cummax(-1).values
    turned = first  # then the bits of the place within the chunk, in reverse: its halves, its quarters
    for bit in range(place.shape[1].bit_length()):
        turned = 2 * turned + ((place - first >> bit) & 1)
    order = turned.argsort(dim=-1)
    rank = torch.empty_like(place).scatter_(1, order, place - first.gather(1, order))
    return chunks - (rank << 32)


def select(
    queries: Tensor,
    keys: Tensor,
    chunks: Tensor | None = None,
    *,
    keep: int,
    frame_tokens: int,
    chunk_tokens: int,
    settings: SelectionSettings,
    layer: int = 0,
) -> Tensor:
    """Positions [keep, G] int64 of the tokens that are kept, for each key head: ascending, or the best first where the
    next chunk asks.

    Queries [Q, H, d] are the last of the chunk that was denoised last, or more; keys [L, G, d]. `chunks` [L, G] int,
    whose each key is, and the number of the layer are what scores go by that look at neither. `keep` must be a multiple
    of the unit of retention.
    """
    unit = {"token": 1, "frame": frame_tokens, "chunk": chunk_tokens}[settings.retention]
    if keep % unit or keys.shape[0] % unit:
        raise ValueError(f"{keep} of {keys.shape[0]} tokens are not whole units of {unit} ({settings.retention})")
    ordered = settings.asks == "last"
    if settings.score in ("recent", "random", "even"):
        assert chunks is not None
        score, ordered = _unasked(chunks[::unit].T, settings.score, layer), True
    else:
        asking = queries[-settings.query_rows(frame_tokens, chunk_tokens) :]
        score = scores(asking, keys, settings)
        score = score.unflatten(1, (-1, unit)).mean(-1) if unit > 1 else score
    kept = score.topk(keep // unit, dim=-1).indices
    if ordered:
        kept = kept.sort(dim=-1).values
    positions = kept[..., None] * unit + torch.arange(unit, device=keys.device)
    return positions.flatten(1).T


def _unasked(chunks: Tensor, score: Score, layer: int) -> Tensor:
    """Scores [G, n] that nobody asks for, of units of which `chunks` [G, n] says whose they are, oldest first."""
    if score == "random":
        return _hash(chunks, layer)
    return _even(chunks) if score == "even" else torch.arange(chunks.shape[1], device=chunks.device).expand_as(chunks)
