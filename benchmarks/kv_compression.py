"""What scoring and selecting tokens of the past costs, in linear time and as the formula is written.

    python -m benchmarks.kv_compression

Redundancy is the mean similarity of each key to all others (Eq. 11). As written it takes an L x L matrix per key head;
the engine takes the mean first (Eq. 20). Both run on the same keys, each in a process of its own, and so does the
whole selection. Exit status 0 if the linear form is at least 50 times faster and equal to 1e-5, 1 if not, 2 for bad
input.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.kv_forms import FORMS, QUERIES, Measured, Problem, measure
from benchmarks.processes import in_fresh_process
from benchmarks.report import Cell, csv_text, machine_line, markdown_table, output_folder, run_app, save_text
from benchmarks.verdict import Verdict, verdict_table
from models.errors import InputError

_FASTER, _EQUAL = 50, 1e-5
_PAPER: tuple[tuple[Cell, ...], ...] = (
    ("redundancy, naive (paper)", 10.26, 17.79),
    ("redundancy, linear (paper)", 0.077, 0.30),
)

app = typer.Typer(add_completion=False)


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
        for form in FORMS:
            status.update(f"measuring: {form}")
            measured[form] = in_fresh_process(measure, form, problem, torch.get_num_threads())
    raise typer.Exit(0 if _write(out, problem, measured) else 1)


def _write(out: Path, problem: Problem, measured: dict[str, Measured]) -> bool:
    naive, linear, selection = (measured[form] for form in FORMS)
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
    sizes += f", {QUERIES} queries, keep {problem.keep}, {problem.device}"
    matrix = 4 * problem.keys**2 / 2**30
    notes = (
        f"{sizes}. {machine_line()}.\n\nPeak memory is what comes on top of the keys. Naive: {how}; "
        f"{matrix:.2f} GiB a matrix, {problem.heads * matrix:.2f} GiB for all heads. "
        "The paper's figures are from its own GPU, at L = 24,300 and d = 128; its memory is in GB as printed."
    )
    table, verdict = markdown_table(headers, rows), verdict_table(verdicts)
    text = f"# Scoring and selecting tokens of the past\n\n{notes}\n\n{verdict}\n\n{table}\n"
    save_text(out / "kv_compression.md", text)
    save_text(out / "kv_compression.csv", csv_text(("what", "seconds", "peak_gib"), rows))
    typer.echo(f"{notes}\n\n{verdict}\n\n{table}\n\nwritten to {out}")
    return all(one.passed for one in verdicts)


if __name__ == "__main__":
    sys.exit(run_app(app, "kv_compression"))
