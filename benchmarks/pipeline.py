"""How much faster are pipeline stages than one process? Measured on the ranks of this machine.

    python -m benchmarks.pipeline --out results/pipeline            # as many ranks as there are cores
    python -m benchmarks.pipeline --quick --out /tmp/pipeline       # small videos, no speed to speak of
    python -m benchmarks.pipeline --model magi-pocket --side 64

The same videos are made by one process with the engine of one process (the base), by a gang of one rank (what the loop
costs), and by gangs of several ranks; with and without reuse, one or more videos in flight, with a barrier for
comparison. One process and gangs alternate in every repeat, and each rank has one thread. Seconds are of denoising,
from the submission of the first video to its last chunk: starting, loading and a video that warms up are not counted,
and nothing is decoded unless --decode asks for it.

The default model has random weights and a size at which a call of one of two stages takes some tens of milliseconds.
Exit status 0 if two stages are as much faster as they should be and every rank did exactly the work that it had to, 1
if not, 2 for bad input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.pipeline_job import Case, ChunkResult, Job, ModelSpec, launch
from benchmarks.pipeline_model import find_threshold, model_config
from benchmarks.pipeline_plan import problems
from benchmarks.pipeline_profile import header_seconds, profile_table, take_timings
from benchmarks.pipeline_report import (
    Row,
    barrier_table,
    csv,
    moved_table,
    row_of,
    rows_table,
    speed_figure,
    verdicts,
)
from benchmarks.processes import in_fresh_process
from benchmarks.report import machine_line, output_folder, run_app, save_figure, save_text
from benchmarks.verdict import verdict_table
from engine.reuse.settings import ReuseSettings
from launch.options import CacheName
from launch.reuse_presets import reuse_preset
from models.errors import InputError
from models.magi.sampling import MagiSampling
from parallel.health.errors import GangError
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes

_PLAIN = ReuseSettings()
_WARMUP = 3
_LAYOUTS = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4))
_PINGS = 30

app = typer.Typer(add_completion=False)


@dataclass(slots=True)
class _Runs:
    """What was made, by repeat."""

    alone: list[dict[bool, ChunkResult]] = field(default_factory=list)
    """Of one process; with reuse and without."""
    gangs: dict[tuple[Layout, Case], list[ChunkResult]] = field(default_factory=dict)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="random or magi-pocket.")] = "random",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the random model.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Width of the random model, a multiple of 192.")] = 384,
    side: Annotated[int, typer.Option(min=1, help="Pixels of a frame's side.")] = 64,
    weights: Annotated[Path | None, typer.Option(help="Folder of magi-pocket's weights.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Length of a video.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 16,
    videos: Annotated[int, typer.Option(min=1, help="Most videos in flight.")] = 4,
    ranks: Annotated[int | None, typer.Option(min=1, help="Most ranks; as many as cores by default.")] = None,
    fraction: Annotated[float, typer.Option(help="Share to compute with reuse, for random weights.")] = 0.55,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    decode: Annotated[bool, typer.Option("--decode", help="Decode frames on the lead as well.")] = False,
    profile: Annotated[bool, typer.Option(help="Say where the time of two stages goes.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of small videos.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/pipeline"),
) -> None:
    """Measure gangs against one process."""
    if quick:
        chunks, steps, videos, repeats = min(chunks, 4), min(steps, 8), min(videos, 2), 1
    spec = ModelSpec(
        name=model, layers=layers, width=width, side=side, weights=None if weights is None else str(weights)
    )
    base = Job(model=spec, layout=None, cases=(), chunks=chunks, steps=steps, decode=decode)
    layouts = layouts_for(base, ranks or _cores())
    output_folder(out)
    console = Console(stderr=True)
    try:
        with console.status("starting") as status:
            plain, reused = plain_and_reused(base, fraction)
            runs = _measure(base, layouts, (plain, reused), videos, repeats, status.update)
            found, checked = _problems(base, runs)
            parts = _profiles(base, runs, status.update) if profile else []
    except GangError as error:
        typer.echo(f"pipeline: error: {error}", err=True)
        raise typer.Exit(error.failure.status) from None
    raise typer.Exit(0 if _write(out, base, runs, found, checked, parts) else 1)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def layouts_for(job: Job, ranks: int) -> list[Layout]:
    """Gangs to measure: one rank, and those that the model and a number of ranks allow.

    Raises:
        InputError: the model or the videos cannot be.
    """
    config = model_config(job.model)
    MagiSampling(config=config, num_steps=job.steps)  # checks the steps
    model = config.model_config
    if job.decode and job.model.name != "magi-pocket":
        raise InputError("a random model has no autoencoder: leave out --decode")
    fits = [
        Layout(pp=pp, cp=cp)
        for pp, cp in _LAYOUTS
        if pp * cp <= ranks and pp <= model.num_layers and model.num_query_groups % cp == 0
    ]
    return [Layout(), *fits]


def plain_and_reused(job: Job, fraction: float) -> tuple[ReuseSettings, ReuseSettings]:
    """No reuse, and flowcache: magi-pocket's own, or with a threshold that computes a share of the steps.

    Raises:
        InputError: that share cannot be had.
    """
    if job.model.name == "magi-pocket":
        return _PLAIN, reuse_preset(CacheName.FLOWCACHE_SLOW, "magi-pocket")
    if not _WARMUP / job.steps < fraction < 1:
        raise InputError(f"--fraction {fraction:g} cannot be had with {_WARMUP} warm-up steps of {job.steps}")
    cache = ReuseSettings(
        policy="flowcache", warmup_steps=_WARMUP, reuse="extrapolate", clean_pass=False, copy_pass=False
    )
    return _PLAIN, cache.with_threshold(in_fresh_process(find_threshold, job, cache, fraction))


def _cases(layout: Layout, caches: tuple[ReuseSettings, ReuseSettings], videos: int) -> tuple[Case, ...]:
    """All numbers of videos on a pipeline, one or two elsewhere."""
    most = videos if layout.pp > 1 and layout.cp == 1 else min(videos, 2)
    cases = [Case(videos=count, cache=cache) for cache in caches for count in range(1, most + 1)]
    if layout.pp > 1:
        cases += [Case(videos=count, cache=cache, barrier=True) for count, cache in enumerate(caches, 1)]
    return tuple(case for case in cases if case.videos <= videos)


def _measure(
    base: Job,
    layouts: Sequence[Layout],
    caches: tuple[ReuseSettings, ReuseSettings],
    videos: int,
    repeats: int,
    say: Callable[[str], None],
) -> _Runs:
    runs = _Runs()
    for repeat in range(repeats):
        where = f"repeat {repeat + 1} of {repeats}: "
        say(where + "one process")
        (made,) = launch(replace(base, cases=tuple(Case(videos=videos, cache=cache) for cache in caches)))
        runs.alone.append(dict(zip((False, True), made, strict=True)))
        for layout in layouts if repeat % 2 == 0 else layouts[::-1]:
            say(f"{where}pp {layout.pp}, cp {layout.cp}")
            cases = _cases(layout, caches, videos)
            (made,) = launch(replace(base, layout=layout, cases=cases, pings=_PINGS))
            for case, one in zip(cases, made, strict=True):
                runs.gangs.setdefault((layout, case), []).append(one)
    return runs


def _say(say: object, text: str) -> None:
    if callable(say):
        say(text)


def _problems(base: Job, runs: _Runs) -> tuple[list[str], int]:
    found, checked = [], 0
    for (layout, case), made in runs.gangs.items():
        for one, alone in zip(made, runs.alone, strict=True):
            where = f"pp {layout.pp}, cp {layout.cp}, {case.videos} videos, {case.cache.policy}"
            found += [
                f"{where}: {what}" for what in problems(replace(base, layout=layout), case, one, alone[case.reuses])
            ]
            checked += 1
    return found, checked


def _profiles(base: Job, runs: _Runs, say: Callable[[str], None]) -> list[str]:
    """Of two stages: one video without reuse, two with it."""
    layout = Layout(pp=2)
    cases = [case for own, case in runs.gangs if own == layout and not case.barrier and case.videos == 1 + case.reuses]
    if not cases:
        return []
    say("where the time goes")
    timings = take_timings(replace(base, cases=tuple(cases)), stage_sizes(model_config(base.model), layout.pp))
    parts = []
    for place, case in enumerate(cases):
        made = runs.gangs[layout, case]
        middle = sorted(range(len(made)), key=lambda repeat: made[repeat].seconds)[len(made) // 2]
        job = replace(base, layout=layout)
        pair = timings.quiet[place], timings.busy[place]
        table = profile_table(job, case, pair, made[middle], runs.alone[middle][case.reuses])
        title = f"{case.videos} video{'s' * (case.videos > 1)}, {'reuse' if case.reuses else 'no reuse'}"
        rest = f"{1e3 * pair[0].rest:.2f} ms per call outside of calls in one process, "
        rest += f"{1e3 * pair[0].embed:.2f} ms for a patch embedding"
        parts.append(f"### pp 2, {title}\n\n{table}\n\n{rest}.")
    write, read, size = header_seconds(base, cases[0])
    hop = runs.gangs[layout, cases[0]][0].hop
    parts.append(
        f"A header takes {1e6 * write:.0f} us to write and {1e6 * read:.0f} us to read ({size} bytes of it are the "
        f"item); a message from one rank to the other takes {1e3 * hop:.2f} ms."
    )
    return parts


def _write(out: Path, base: Job, runs: _Runs, found: list[str], checked: int, profiles: list[str]) -> bool:
    rows: list[Row] = []
    for (layout, case), made in runs.gangs.items():
        alone = [sum(one[case.reuses].videos[: case.videos]) for one in runs.alone]
        rows.append(row_of(layout, case, made, alone))
    held = verdicts(rows, found, checked)
    config = model_config(base.model).model_config
    about = f"{base.model.name}: {config.num_layers} layers of width {config.hidden_size}, {base.model.side} pixels"
    title = f"{about}, {base.chunks} chunks of {base.steps} steps, {len(runs.alone)} repeats"
    table, loss = verdict_table(held), barrier_table(rows)
    parts = [
        "# Pipeline stages against one process",
        f"{title}. {machine_line()}; one thread per rank.",
        _NOTES,
        f"## Verdicts\n\n{table}",
        f"## Speed\n\n{rows_table(rows)}",
        f"## A barrier per tick\n\n{loss}" if loss else "",
        f"## Calls and bytes\n\n{moved_table(rows)}",
        *(["## Where the time of two stages goes\n\n" + _PROFILE, *profiles] if profiles else []),
        *(["## What differs\n\n" + "\n".join(f"- {one}" for one in found)] if found else []),
    ]
    text = "\n\n".join(part for part in parts if part)
    save_text(out / "pipeline.md", text)
    save_text(out / "pipeline.csv", csv(rows))
    save_figure(out / "pipeline.png", speed_figure(rows, f"Speed-up of ranks over one process\n{title}"))
    typer.echo(f"{text}\n\nwritten to {out}")
    return all(one.passed for one in held)


_NOTES = """\
- s: seconds of denoising, from the submission of the first video to its last chunk, median; starting, loading and
  warming up apart. s of 1 process: the same videos one after another with the engine of one process, one thread.
  speed-up: median of the repeats, each against the process that ran in the same repeat; of each: those.
- computed: chunk-steps that are computed, as a share of all. Without reuse there are a clean pass for each chunk and a
  context-free copy of the cleanest one besides; with reuse there are neither, on one process as on a gang.
- stages busy: share of the time in the layers. lead else: seconds that the lead is neither there nor waiting."""
_PROFILE = """\
Simulated from what calls take in one process on a quiet machine; in two processes that do the same at once; with
messages and the lead's own work besides; and what was measured. Speed-ups are over one process on a quiet machine."""


if __name__ == "__main__":
    sys.exit(run_app(app, "pipeline"))
