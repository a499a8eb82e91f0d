"""The forms of the redundancy score that are compared, the keys to run them on, and what one form takes.

It is imported by the processes that measure, and loads nothing that they do not need.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.processes import peak_rss, reset_peak, rss
from engine.kv.selection import SelectionSettings, redundancy, select

FORMS = ("naive", "linear", "selection")
QUERIES = 50
_REPEATS = {"naive": 1, "linear": 9, "selection": 9}
_CHUNKS, _FRAMES = 3, 6  # how keys are structured: chunks of 6 latent frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes of what is measured."""

    keys: int  # L, tokens of the past
    dim: int  # of a head
    heads: int  # key heads
    query_heads: int  # that ask, for the selection
    keep: int  # tokens that the selection keeps
    device: str  # where to compute
    at_once: bool  # the naive form makes the matrices of all heads together, and not one after the other
    seed: int  # of the keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one form took."""

    seconds: float  # median over the repeats
    peak: int  # bytes at most, above what the keys themselves take
    scores: Tensor | None  # [heads, keys] fp32 on the CPU; None for the selection


def measure(form: str, problem: Problem, threads: int) -> Measured:
    """Measure one of the forms in this process."""
    torch.set_num_threads(threads)
    keys = structured_keys(problem).to(problem.device)
    queries = torch.randn(QUERIES, problem.query_heads, problem.dim, generator=_generator(problem.seed + 1))
    queries = queries.to(problem.device)
    settings = SelectionSettings(query_tokens=QUERIES)

    def selection(some: Tensor) -> Tensor:
        keep = min(len(some), problem.keep)
        return select(queries, some, keep=keep, frame_tokens=1, chunk_tokens=len(some), settings=settings)

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "naive": lambda some: naive_redundancy(some, at_once=problem.at_once),
        "linear": redundancy,
        "selection": selection,
    }
    run_form = forms[form]
    run_form(keys[:64])  # what is loaded at the first call is not the form's own
    before = _start(keys.device)
    seconds = []
    for _ in range(_REPEATS[form]):
        began = time.perf_counter()
        result = run_form(keys)
        if keys.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = _peak(keys.device) - before
    scores = None if form == "selection" else result.cpu()
    return Measured(seconds=statistics.median(seconds), peak=max(0, peak), scores=scores)


def naive_redundancy(keys: Tensor, *, at_once: bool) -> Tensor:
    """Eq. 11 as written: the L x L similarities of each head, diagonal zero, mean over the other axis, softmax.

    Args:
        keys: [L, G, d].
        at_once: all heads together.
    """
    unit = F.normalize(keys.float(), dim=-1).transpose(0, 1)
    parts = []
    for head in [unit] if at_once else unit.split(1):
        similarity = head @ head.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).zero_()
        parts.append(similarity.mean(1))
        del similarity
    return torch.cat(parts).softmax(-1)


def structured_keys(problem: Problem) -> Tensor:
    """Keys [L, G, d] that are alike within a head, a chunk and a frame, more so for some tokens than for others.

    Keys that are only noise all score the same, and any two ways to score them agree.
    """
    generator = _generator(problem.seed)
    length, shape = problem.keys, (problem.heads, problem.dim)
    chunk = torch.arange(length) * _CHUNKS // length
    frame = torch.arange(length) * _CHUNKS * _FRAMES // length
    shared = torch.randn(1, *shape, generator=generator)
    chunks = torch.randn(_CHUNKS, *shape, generator=generator)[chunk]
    frames = torch.randn(_CHUNKS * _FRAMES, *shape, generator=generator)[frame]
    noise = torch.randn(length, *shape, generator=generator)
    amount = 2 * torch.rand(length, problem.heads, 1, generator=generator)
    return shared + chunks + frames + amount * noise


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _start(device: torch.device) -> int:
    """Bytes in use before a form runs; peaks count from here."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    before = rss()
    reset_peak()
    return before


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return peak_rss()
