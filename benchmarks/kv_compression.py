"""What scoring and selecting tokens of the past costs, in linear time and as the formula is written.

    python -m benchmarks.kv_compression

Redundancy is the mean similarity of each key to all others (Eq. 11). As written it takes an L x L matrix per key head;
the engine takes the mean first (Eq. 20). Both run on the same keys, each in a process of its own, and so does the
whole selection. Exit status 0 if the linear form is at least 50 times faster and equal to 1e-5, 1 if not, 2 for bad
input.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import common
from benchmarks.common import Out, Row, Verdict, median
from engine.kv.selection import SelectionSettings, redundancy, select

_FASTER, _EQUAL = 50, 1e-5
_QUERIES = 50
_REPEATS = {"naive": 1, "linear": 9, "selection": 9}  # of each form
_CHUNKS, _FRAMES = 3, 6  # how keys are structured: chunks of 6 latent frames
_DIM, _HEADS, _QUERY_HEADS = 128, 8, 24  # size of a head, key heads, query heads that ask
_PAPER = (("redundancy, naive (paper)", 10.26, 17.79), ("redundancy, linear (paper)", 0.077, 0.30))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one form took."""

    seconds: float  # median over the repeats
    peak: int  # bytes at most, above what the keys themselves take
    scores: Tensor | None  # [heads, keys] fp32 on the CPU; None for the selection


def run(
    keys: Annotated[int, typer.Option(min=2, help="Tokens of the past (L).")] = 24300,
    out: Out = Path("results/kv_compression"),
) -> int:
    """Time and memory of the redundancy score and of the selection."""
    common.output_folder(out)
    measured = {}
    with Console(stderr=True).status("") as status:
        for form in _REPEATS:
            status.update(f"measuring: {form}")
            measured[form] = common.in_fresh_process(measure, form, keys, torch.get_num_threads())
    return report(out, keys, measured)


def measure(form: str, length: int, threads: int) -> Measured:
    """Measure one of the forms in this process."""
    torch.set_num_threads(threads)
    keys = structured_keys(length)
    queries = torch.randn(_QUERIES, _QUERY_HEADS, _DIM, generator=torch.Generator().manual_seed(1))
    settings = SelectionSettings(query_tokens=_QUERIES)

    def selection(some: Tensor) -> Tensor:
        keep = min(len(some), 2 * length // 3)
        return select(queries, some, keep=keep, frame_tokens=1, chunk_tokens=len(some), settings=settings)

    forms = {"naive": naive_redundancy, "linear": redundancy, "selection": selection}
    forms[form](keys[:64])  # what is loaded at the first call is not the form's own
    before, seconds = common.rss(), []
    common.reset_peak()
    for _ in range(_REPEATS[form]):
        began = time.perf_counter()
        result = forms[form](keys)
        seconds.append(time.perf_counter() - began)
    peak = max(0, common.peak_rss() - before)
    return Measured(seconds=median(seconds), peak=peak, scores=None if form == "selection" else result)


def naive_redundancy(keys: Tensor) -> Tensor:
    """Eq. 11 as written, of keys [L, G, d], head by head.

    That is the L x L similarities, diagonal zero, mean over the other axis, and softmax.
    """
    parts = []
    for head in F.normalize(keys.float(), dim=-1).unbind(1):
        similarity = (head @ head.T).fill_diagonal_(0)
        parts.append(similarity.mean(0))
        del similarity
    return torch.stack(parts).softmax(-1)


def structured_keys(length: int) -> Tensor:
    """Keys [L, G, d] that are alike within a head, a chunk and a frame, more so for some tokens than for others.

    Keys that are only noise all score the same, and any two ways to score them agree.
    """
    generator = torch.Generator().manual_seed(0)

    def shared(parts: int) -> Tensor:
        place = torch.arange(length) * parts // length
        return torch.randn(parts, _HEADS, _DIM, generator=generator)[place]

    amount = 2 * torch.rand(length, _HEADS, 1, generator=generator)
    return shared(1) + shared(_CHUNKS) + shared(_CHUNKS * _FRAMES) + amount * shared(length)


def report(out: Path, length: int, measured: Mapping[str, Measured]) -> int:
    """Write and print what was measured; the exit status."""
    naive, linear, selection = (measured[form] for form in _REPEATS)
    assert naive.scores is not None and linear.scores is not None
    ratio = naive.seconds / linear.seconds
    difference = ((linear.scores - naive.scores).abs() / naive.scores.abs()).max().item()
    spread = (naive.scores.amax(-1) / naive.scores.amin(-1)).min().item()
    apart = f"{difference:.1e} (scores differ by {spread:.2f} x within a head)"
    verdicts = [
        Verdict("linear redundancy over naive, time", f"{ratio:.0f} x faster", f">= {_FASTER} x", ratio >= _FASTER),
        Verdict("largest relative difference of a score", apart, f"<= {_EQUAL:g}", difference <= _EQUAL),
    ]
    rows: list[Row] = [
        {"what": what, "seconds": seconds, "peak_GiB": peak}
        for what, seconds, peak in (
            ("redundancy, naive", naive.seconds, naive.peak / 2**30),
            ("redundancy, linear", linear.seconds, linear.peak / 2**30),
            ("whole selection", selection.seconds, selection.peak / 2**30),
            *_PAPER,
        )
    ]
    matrix = 4 * length**2 / 2**30
    return common.publish(
        out,
        "kv_compression",
        title="Scoring and selecting tokens of the past",
        about=(
            f"L = {length}, d = {_DIM}, {_HEADS} key heads, {_QUERY_HEADS} query heads, {_QUERIES} queries, "
            f"keep two thirds. {common.machine_line()}.\n\n"
            "Peak memory is what comes on top of the keys. Naive: head by head, each 1 / heads of the matrix of all; "
            f"{matrix:.2f} GiB a matrix, {_HEADS * matrix:.2f} GiB for all heads. The paper's figures are from "
            "its own GPU, at L = 24,300 and d = 128; its memory is in GB as printed."
        ),
        verdicts=verdicts,
        sections={"Forms": rows},
    )


if __name__ == "__main__":
    sys.exit(common.run_command(run, "kv_compression"))
