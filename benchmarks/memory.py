"""Do long videos take more memory than short ones, or more time per chunk? Measured on magi-pocket.

    python -m benchmarks.memory --chunks 20 600 --kv-budget 2

Each video is made in a process of its own, frames included, which are dropped as they come. Two lengths with a KV
budget are compared, and two without one, where the model's own range bounds what is held. Exit status 0 if KV bytes
are equal, memory grows by less than 2% and a late chunk takes at most 5% longer than an early one; 1 if not; 2 for bad
input.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.flops import CountingExecutor
from benchmarks.processes import in_fresh_process, peak_rss, rss
from benchmarks.report import Cell, csv_text, machine_line, markdown_table, output_folder, run_app, save_text
from benchmarks.verdict import Verdict, verdict_table
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.heap import settle_heap
from engine.kv.size import KVSettings
from engine.request import Request
from models.errors import InputError
from models.magi.pipeline import Loading, load_pipeline
from models.pocket.clips import SIDE
from models.pocket.preset import pocket_config

_PROMPT = "a red circle moving right"
_GROWTH, _SLOWER = 1.02, 1.05
_WARM = 10  # chunks after which memory has settled

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """A video to make."""

    chunks: int
    budget: int | None
    steps: int
    weights: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LongVideo:
    """What making it took."""

    chunks: int
    budget: int | None  # of the KV buffer in chunks
    kv_bytes: int  # that the KV buffers held, at most
    warm_rss: int  # resident bytes after the first `_WARM` chunks, or half of a shorter video
    end_rss: int  # at the end
    peak_rss: int  # at most
    early: float  # seconds per chunk from a twelfth to a sixth of the video, median, decoding included
    late: float  # the same for the last sixth, without the chunks that are made while the window empties


@app.command()
def run(
    chunks: Annotated[tuple[int, int], typer.Option(help="Lengths to compare with the budget.")] = (20, 600),
    kv_budget: Annotated[int, typer.Option(min=1, help="KV budget, in chunks.")] = 2,
    own_range: Annotated[tuple[int, int], typer.Option(help="Lengths to compare without a budget.")] = (10, 60),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 16,
    weights: Annotated[Path | None, typer.Option(help="Folder of weights, in place of those that ship.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/memory"),
) -> None:
    """Make short and long videos and compare what they take."""
    for short, long in (chunks, own_range):
        if not 4 < short < long:
            raise InputError(
                f"lengths {short} and {long} cannot be compared: give 5 chunks or more, then more than that"
            )
    output_folder(out)
    lengths = [(one, kv_budget) for one in chunks] + [(one, None) for one in own_range]
    made = [
        in_fresh_process(
            make_long_video,
            Length(chunks=count, budget=budget, steps=steps, weights=weights),
            torch.get_num_threads(),
        )
        for count, budget in lengths
    ]
    raise typer.Exit(0 if _write(out, made, steps) else 1)


def make_long_video(length: Length, threads: int) -> LongVideo:
    """Make one video in this process, with a progress bar on standard error."""
    settle_heap()  # as the command line does
    torch.set_num_threads(threads)
    config = pocket_config()
    pipeline = load_pipeline(config, length.weights, Loading())
    executor = CountingExecutor(LocalExecutor(pipeline.model), config.model_config)
    engine = Engine(pipeline, kv=KVSettings(budget=length.budget), executor=executor)
    request = Request(prompt=_PROMPT, chunks=length.chunks, height=SIDE, width=SIDE, num_steps=length.steps, seed=0)
    seconds, kv_bytes, warm_rss = [], 0, 0
    name = f"{length.chunks} chunks, {'own range' if length.budget is None else f'budget {length.budget}'}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=length.chunks)
        began = time.perf_counter()
        for chunk in engine.generate(request):
            seconds.append(time.perf_counter() - began)
            kv_bytes = max(kv_bytes, executor.kv_bytes)
            if chunk.index + 1 == min(_WARM, length.chunks // 2):
                warm_rss = rss()
            bar.update(task, advance=1)
            began = time.perf_counter()
    early, late = _early_and_late(seconds, config.runtime_config.window_size)
    return LongVideo(
        chunks=length.chunks,
        budget=length.budget,
        kv_bytes=kv_bytes,
        warm_rss=warm_rss,
        end_rss=rss(),
        peak_rss=peak_rss(),
        early=early,
        late=late,
    )


def verdicts(short: LongVideo, long: LongVideo) -> list[Verdict]:
    """What two lengths of the same setting are held to."""
    kv = "own range" if long.budget is None else f"budget {long.budget}"
    pair = f"{long.chunks} chunks against {short.chunks}, {kv}"
    peak, growth = long.peak_rss / short.peak_rss, long.end_rss / long.warm_rss
    slower = long.late / long.early
    most, allowed = f"< {_GROWTH - 1:+.0%}", f"<= {_SLOWER - 1:+.0%}"
    return [
        Verdict(
            name=f"{pair}: KV bytes",
            measured=f"{long.kv_bytes} against {short.kv_bytes}",
            wanted="equal",
            passed=long.kv_bytes == short.kv_bytes > 0,
        ),
        Verdict(name=f"{pair}: peak memory", measured=f"{peak - 1:+.2%}", wanted=most, passed=peak < _GROWTH),
        Verdict(
            name=f"{long.chunks} chunks, {kv}: memory at the end against warm",
            measured=f"{growth - 1:+.2%}",
            wanted=most,
            passed=growth < _GROWTH,
        ),
        Verdict(
            name=f"{long.chunks} chunks, {kv}: time of a late chunk against an early one",
            measured=f"{slower - 1:+.1%}",
            wanted=allowed,
            passed=slower <= _SLOWER,
        ),
    ]


def _early_and_late(seconds: list[float], window: int) -> tuple[float, float]:
    count = len(seconds)
    early = seconds[max(1, count // 12) : max(2, count // 6)]
    late = seconds[min(count * 5 // 6, count - window - 1) : count - window]
    return statistics.median(early), statistics.median(late)


def _write(out: Path, made: list[LongVideo], steps: int) -> bool:
    found = [*verdicts(*made[:2]), *verdicts(*made[2:])]
    rows: list[tuple[Cell, ...]] = []
    for one in made:
        mebibytes = [f"{value / 2**20:.1f}" for value in (one.kv_bytes, one.warm_rss, one.end_rss, one.peak_rss)]
        budget: Cell = "own range" if one.budget is None else one.budget
        rows.append((one.chunks, budget, *mebibytes, one.early, one.late))
    headers = ("chunks", "kv budget", "KV (MiB)", "warm (MiB)", "end (MiB)", "peak (MiB)", "early (s/chunk)")
    table, verdict = markdown_table((*headers, "late (s/chunk)"), rows), verdict_table(found)
    notes = (
        f"magi-pocket, {SIDE}x{SIDE} pixels, {steps} steps, no reuse. {machine_line()}.\n\n"
        f"Memory is that of the whole process: warm after {_WARM} chunks (half of a shorter video), at the end, and at "
        "most. Seconds are medians per chunk, decoding included: early from a twelfth to a sixth of the video, late in "
        "its last sixth."
    )
    save_text(out / "memory.md", f"# Memory of long videos\n\n{notes}\n\n{verdict}\n\n{table}\n")
    names = ("chunks", "kv_budget", "kv_mib", "warm_mib", "end_mib", "peak_mib", "early_s", "late_s")
    save_text(out / "memory.csv", csv_text(names, rows))
    typer.echo(f"{notes}\n\n{verdict}\n\n{table}\n\nwritten to {out}")
    return all(one.passed for one in found)


if __name__ == "__main__":
    sys.exit(run_app(app, "memory"))
