"""What scoring and selecting tokens of the past costs, in linear time and as the formula is written.

    python -m benchmarks.kv_compression

Redundancy is the mean similarity of each key to all others (Eq. 11). As written it takes an L x L matrix per key head;
the engine takes the mean first (Eq. 20). Both run on the same keys, each in a process of its own, and so does the
whole selection. Exit status 0 if the linear form is at least 50 times faster and equal to 1e-5, 1 if not, 2 for bad
input.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.processes import in_fresh_process, peak_rss, reset_peak, rss
from benchmarks.report import Cell, csv_text, machine_line, markdown_table, output_folder, run_app, save_text
from benchmarks.verdict import Verdict, verdict_table
from engine.kv.selection import SelectionSettings, redundancy, select
from models.errors import InputError

__all__ = ["Measured", "Problem", "app", "measure", "naive_redundancy", "structured_keys"]

_FASTER, _EQUAL = 50, 1e-5
_PAPER: tuple[tuple[Cell, ...], ...] = (
    ("redundancy, naive (paper)", 10.26, 17.79),
    ("redundancy, linear (paper)", 0.077, 0.30),
)
_FORMS = ("naive", "linear", "selection")
_REPEATS = {"naive": 1, "linear": 9, "selection": 9}
_QUERIES = 50
_CHUNKS, _FRAMES = 3, 6  # how keys are structured: chunks of 6 latent frames

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes of what is measured.

    Attributes:
        keys: L, tokens of the past.
        dim: of a head.
        heads: key heads.
        query_heads: that ask, for the selection.
        keep: tokens that the selection keeps.
        device: where to compute.
        at_once: the naive form makes the matrices of all heads together, and not one after the other.
        seed: of the keys.
    """

    keys: int
    dim: int
    heads: int
    query_heads: int
    keep: int
    device: str
    at_once: bool
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one form took.

    Attributes:
        seconds: median over the repeats.
        peak: bytes at most, above what the keys themselves take.
        scores: [heads, keys] fp32 on the CPU; None for the selection.
    """

    seconds: float
    peak: int
    scores: Tensor | None


@app.command()
def run(
    keys: Annotated[int, typer.Option(min=2, help="Tokens of the past (L).")] = 24300,
    dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Key heads.")] = 8,
    query_heads: Annotated[int, typer.Option(min=1, help="Query heads, for the selection.")] = 24,
    keep: Annotated[int | None, typer.Option(min=1, help="Tokens to keep; two thirds by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    at_once: Annotated[bool, typer.Option("--at-once", help="All heads' L x L matrices together.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/kv_compression"),
) -> None:
    """Time and memory of the redundancy score and of the selection."""
    if query_heads % heads:
        raise InputError(f"{query_heads} query heads are no multiple of {heads} key heads")
    problem = Problem(
        keys=keys,
        dim=dim,
        heads=heads,
        query_heads=query_heads,
        keep=min(keys, keep or 2 * keys // 3),
        device=device,
        at_once=at_once,
        seed=0,
    )
    output_folder(out)
    measured = {}
    with Console(stderr=True).status("") as status:
        for form in _FORMS:
            status.update(f"measuring: {form}")
            measured[form] = in_fresh_process(measure, form, problem, torch.get_num_threads())
    raise typer.Exit(0 if _write(out, problem, measured) else 1)


def measure(form: str, problem: Problem, threads: int) -> Measured:
    """Measure one of the forms in this process."""
    torch.set_num_threads(threads)
    keys = structured_keys(problem).to(problem.device)
    queries = torch.randn(_QUERIES, problem.query_heads, problem.dim, generator=_generator(problem.seed + 1))
    queries = queries.to(problem.device)
    settings = SelectionSettings(query_tokens=_QUERIES)

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
    result = run_form(keys)
    peak = _peak(keys.device) - before
    seconds = []
    for _ in range(_REPEATS[form]):
        began = time.perf_counter()
        run_form(keys)
        if keys.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
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


def _write(out: Path, problem: Problem, measured: dict[str, Measured]) -> bool:
    naive, linear, selection = (measured[form] for form in _FORMS)
    assert naive.scores is not None and linear.scores is not None
    ratio = naive.seconds / linear.seconds
    difference = ((linear.scores - naive.scores).abs() / naive.scores.abs()).max().item()
    spread = (naive.scores.amax(-1) / naive.scores.amin(-1)).min().item()
    verdicts = [
        Verdict(
            name="linear redundancy over naive, time",
            measured=f"{ratio:.0f} x faster",
            wanted=f">= {_FASTER} x",
            passed=ratio >= _FASTER,
        ),
        Verdict(
            name="largest relative difference of a score",
            measured=f"{difference:.1e} (scores differ by {spread:.2f} x within a head)",
            wanted=f"<= {_EQUAL:g}",
            passed=difference <= _EQUAL,
        ),
    ]
    how = "all heads at once" if problem.at_once else "head by head, each 1 / heads of the matrix of all"
    rows: list[tuple[Cell, ...]] = [
        ("redundancy, naive", naive.seconds, naive.peak / 2**30),
        ("redundancy, linear", linear.seconds, linear.peak / 2**30),
        ("whole selection", selection.seconds, selection.peak / 2**30),
        *_PAPER,
    ]
    headers = ("what", "seconds", "peak memory (GiB)")
    sizes = f"L = {problem.keys}, d = {problem.dim}, {problem.heads} key heads, {problem.query_heads} query heads"
    sizes += f", {_QUERIES} queries, keep {problem.keep}, {problem.device}"
    matrix = 4 * problem.keys**2 / 2**30
    notes = (
        f"{sizes}. {machine_line()}.\n\nPeak memory is what comes on top of the keys. Naive: {how}; "
        f"{matrix:.2f} GiB a matrix, {problem.heads * matrix:.2f} GiB for all heads. "
        "The paper's figures are from its own GPU, at L = 24,300 and d = 128."
    )
    table, verdict = markdown_table(headers, rows), verdict_table(verdicts)
    text = f"# Scoring and selecting tokens of the past\n\n{notes}\n\n{verdict}\n\n{table}\n"
    save_text(out / "kv_compression.md", text)
    save_text(out / "kv_compression.csv", csv_text(("what", "seconds", "peak_gib"), rows))
    typer.echo(f"{notes}\n\n{verdict}\n\n{table}\n\nwritten to {out}")
    return all(one.passed for one in verdicts)


if __name__ == "__main__":
    sys.exit(run_app(app, "kv_compression"))
