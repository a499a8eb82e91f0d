"""What do gangs of a Ray cluster bring, and what does Ray cost? Measured on this machine.

    python -m benchmarks.cluster --out results/cluster           # some minutes, on two free cores
    python -m benchmarks.cluster --quick --out /tmp/cluster      # small, no speed to speak of
    python -m benchmarks.cluster --parts overhead --overhead-repeats 9

Throughput: a batch of videos on two gangs of two stages, one video each at a time, against one gang with two videos in
flight. Overhead: the same videos, all in flight on two stages, by ranks that torchrun starts and by a gang of a Ray
cluster, in quantum; the model is so large that an item of a stage takes 100 ms or more. Seconds are of making,
from the first submission to the last chunk: ranks are loaded and warm. All latents are compared with those of one
process.

Exit status 0 if two gangs are not slower than one, Ray adds little enough and no latents differ, 1 if not, 2 for bad
input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cluster_making import Making
from benchmarks.cluster_report import Overhead, Throughput, csv, table, verdicts
from benchmarks.cluster_runs import Timed, alone, differing, on_ranks, on_ray
from benchmarks.pipeline_job import ModelSpec
from benchmarks.report import machine_line, output_folder, run_app, save_text
from benchmarks.verdict import verdict_table
from engine.reuse.settings import ReuseSettings
from models.errors import InputError
from parallel.health.errors import GangError
from parallel.topology.mesh import Layout

_PARTS = ("throughput", "overhead")
_STAGES = Layout(pp=2)
_NO_EXTRA = ReuseSettings(clean_pass=False, copy_pass=False)
_OVERHEAD_VIDEOS = 2

app = typer.Typer(add_completion=False)


@app.command()
def run(
    parts: Annotated[str, typer.Option(help="What to measure: of throughput and overhead.")] = "throughput,overhead",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the random model.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Width of the random model, a multiple of 192.")] = 384,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 8,
    videos: Annotated[int, typer.Option(min=1, help="Throughput: videos of a batch.")] = 12,
    chunks: Annotated[int, typer.Option(min=1, help="Throughput: length of a video.")] = 4,
    side: Annotated[int, typer.Option(min=1, help="Throughput: pixels of a frame's side.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Throughput: how often both are measured.")] = 3,
    overhead_chunks: Annotated[int, typer.Option(min=1, help="Overhead: length of a video.")] = 5,
    overhead_side: Annotated[int, typer.Option(min=1, help="Overhead: pixels of a frame's side.")] = 144,
    overhead_repeats: Annotated[int, typer.Option(min=1, help="Overhead: how often both are measured.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of small videos.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/cluster"),
) -> None:
    """Measure gangs of a cluster."""
    chosen = _chosen(parts)
    if quick:
        layers, videos, chunks, repeats = min(layers, 4), min(videos, 4), min(chunks, 2), 1
        overhead_chunks, overhead_side, overhead_repeats = min(overhead_chunks, 2), min(overhead_side, 64), 1
    small = Making(
        spec=ModelSpec(layers=layers, width=width, side=side),
        layout=_STAGES,
        gangs=1,
        concurrency=2,
        chunks=chunks,
        steps=steps,
        cache=_NO_EXTRA,
    )
    spec = ModelSpec(layers=layers, width=width, side=overhead_side)
    large = replace(small, spec=spec, concurrency=_OVERHEAD_VIDEOS, chunks=overhead_chunks)
    for making in (small, large):
        making.settings()  # checks all of it
    output_folder(out)
    say = partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    throughput = overhead = None
    try:
        if "throughput" in chosen:
            throughput = _throughput(small, videos, repeats, say)
        if "overhead" in chosen:
            overhead = _overhead(large, overhead_repeats, say)
    except GangError as error:
        typer.echo(f"cluster: error: {error}", err=True)
        raise typer.Exit(error.failure.status) from None
    raise typer.Exit(0 if _write(out, small, large, throughput, overhead) else 1)


def _chosen(parts: str) -> list[str]:
    names = [name.strip() for name in parts.split(",")]
    for name in names:
        if name not in _PARTS:
            raise InputError(f"--parts {parts}: there is no part {name!r}; choose from {', '.join(_PARTS)}")
    return names


def _throughput(one: Making, videos: int, repeats: int, say: Callable[[str], None]) -> Throughput:
    say(f"throughput: {videos} videos in one process")
    wanted = alone(one, videos)
    ways = {1: one, 2: replace(one, gangs=2, concurrency=1)}
    runs: dict[int, list[Timed]] = {gangs: [] for gangs in ways}
    for repeat in range(repeats):
        for gangs in sorted(ways, reverse=repeat % 2 == 1):
            made = on_ray(ways[gangs], videos)
            runs[gangs].append(made)
            say(f"throughput, repeat {repeat + 1} of {repeats}: {gangs} gangs, {made.seconds:.2f} s")
    problems = differing([*runs[1], *runs[2]], wanted)
    return Throughput(videos=videos, one=runs[1], two=runs[2], problems=problems)


def _overhead(making: Making, repeats: int, say: Callable[[str], None]) -> Overhead:
    say(f"overhead: {_OVERHEAD_VIDEOS} videos in one process")
    wanted = alone(making, _OVERHEAD_VIDEOS)
    ways = {"ranks": on_ranks, "Ray": on_ray}
    runs: dict[str, list[Timed]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in sorted(ways, reverse=repeat % 2 == 0):
            made = ways[way](making, _OVERHEAD_VIDEOS)
            runs[way].append(made)
            say(f"overhead, repeat {repeat + 1} of {repeats}: {way}, {made.seconds:.2f} s")
    problems = differing([*runs["ranks"], *runs["Ray"]], wanted)
    return Overhead(videos=_OVERHEAD_VIDEOS, ranks=runs["ranks"], ray=runs["Ray"], problems=problems)


def _write(out: Path, small: Making, large: Making, throughput: Throughput | None, overhead: Overhead | None) -> bool:
    held = verdicts(throughput, overhead)
    about = [
        f"{part}: {making.spec.layers} layers of width {making.spec.width}, {making.spec.side} pixels, "
        f"{making.chunks} chunks of {making.steps} steps"
        for part, making, made in (("throughput", small, throughput), ("overhead", large, overhead))
        if made is not None
    ]
    wrong = [line for part in (throughput, overhead) if part is not None for line in part.problems]
    sections = [
        "# Gangs of a Ray cluster",
        f"Two stages to a gang; {'; '.join(about)}. {machine_line()}; one thread per rank.",
        f"## Verdicts\n\n{verdict_table(held)}",
        f"## Times\n\n{table(throughput, overhead)}",
        *(["## What differs\n\n" + "\n".join(f"- {line}" for line in wrong)] if wrong else []),
    ]
    text = "\n\n".join(sections)
    save_text(out / "cluster.md", text)
    save_text(out / "cluster.csv", csv(throughput, overhead))
    typer.echo(f"{text}\n\nwritten to {out}")
    return all(one.passed for one in held)


if __name__ == "__main__":
    sys.exit(run_app(app, "cluster"))
