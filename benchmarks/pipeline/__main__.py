"""How much faster are pipeline stages than one process? Measured on the ranks of this machine.

    python -m benchmarks.pipeline --out results/pipeline            # as many ranks as there are cores
    python -m benchmarks.pipeline --quick --out /tmp/pipeline       # small videos, no speed to speak of
    python -m benchmarks.pipeline --model magi-pocket --side 64

The same videos are made by one process (the base), by a gang of one rank (what the loop costs), and by gangs of several
ranks; with and without reuse, one or more videos in flight, with a barrier for comparison. One process and gangs
alternate in every repeat, and each rank has one thread. Seconds are of denoising, from the submission of the first
video to its last chunk: starting, loading and a video that warms up are not counted, and nothing is decoded unless
--decode asks for it.

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

from benchmarks.common import machine_line, output_folder, publish, run_app
from benchmarks.models import POCKET, ModelSpec, model_config
from benchmarks.pipeline.plan import problems, profile_table, take_timings
from benchmarks.pipeline.report import barrier_table, csv_rows, moved_table, row_of, rows_table, speed_figure, verdicts
from benchmarks.runs import alone, on_ranks, reuse_for
from benchmarks.workload import Made, Workload
from models.errors import InputError
from parallel.health.errors import GangError
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes

_LAYOUTS = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4))
_PINGS = 30
_NOTES = """\
- s: seconds of denoising, from the submission of the first video to its last chunk, median; starting, loading and
  warming up apart. s of 1 process: the same videos one after another in one process, one thread. speed-up: median of
  the repeats, each against the process that ran in the same repeat; of each: those.
- computed: chunk-steps that are computed, as a share of all. Without reuse there are a clean pass for each chunk and a
  context-free copy of the cleanest one besides; with reuse there are neither, on one process as on a gang.
- stages busy: share of the time in the layers. leader else: seconds that the leader is neither there nor waiting."""
_PROFILE = """\
Simulated from what calls take in one process on a quiet machine; in two processes that do the same at once; with
messages and the leader's own work besides; and what was measured. Speed-ups are over one process on a quiet machine."""

app = typer.Typer(add_completion=False)


@dataclass(slots=True)
class _Runs:
    """What was made, by repeat."""

    alone: list[dict[bool, Made]] = field(default_factory=list)  # by one process; with reuse and without
    gangs: dict[tuple[Layout, Workload], list[Made]] = field(default_factory=dict)

    def beside(self, workload: Workload) -> list[Made]:
        """What one process has made of the same videos, or more, in each repeat."""
        return [one[workload.reuses] for one in self.alone]


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
    decode: Annotated[bool, typer.Option("--decode", help="Decode frames on the leader as well.")] = False,
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
    plain = Workload(model=spec, chunks=chunks, steps=steps, videos=videos, decode=decode)
    layouts = layouts_for(plain, ranks or _cores())
    output_folder(out)
    try:
        with Console(stderr=True).status("starting") as status:
            kinds = (plain, replace(plain, reuse=reuse_for(plain, fraction)))
            runs = _measure(kinds, layouts, repeats, status.update)
            parts = _profiles(runs, status.update) if profile else []
    except GangError as error:
        typer.echo(f"pipeline: error: {error}", err=True)
        raise typer.Exit(error.failure.status) from None
    raise typer.Exit(_write(out, plain, runs, parts))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def layouts_for(workload: Workload, ranks: int) -> list[Layout]:
    """Gangs to measure: one rank, and those that the model and a number of ranks allow.

    Raises:
        InputError: the model or the videos cannot be.
    """
    model, _ = model_config(workload.model).model_config, workload.sampling  # which checks the steps
    if workload.decode and workload.model.name != POCKET:
        raise InputError("a random model has no autoencoder: leave out --decode")
    fits = [
        Layout(pp=pp, cp=cp)
        for pp, cp in _LAYOUTS
        if pp * cp <= ranks and pp <= model.num_layers and model.num_query_groups % cp == 0
    ]
    return [Layout(), *fits]


def _workloads(layout: Layout, kinds: Sequence[Workload]) -> list[Workload]:
    """All numbers of videos on a pipeline, one or two elsewhere; on a pipeline some with a barrier."""
    videos = kinds[0].videos
    most = videos if layout.pp > 1 and layout.cp == 1 else min(videos, 2)
    found = [replace(kind, videos=count) for kind in kinds for count in range(1, most + 1)]
    if layout.pp > 1:
        found += [replace(kind, videos=count, barrier=True) for count, kind in enumerate(kinds, 1)]
    return [one for one in found if one.videos <= videos]


def _measure(kinds: Sequence[Workload], layouts: Sequence[Layout], repeats: int, log: Callable[[str], None]) -> _Runs:
    runs = _Runs()
    for repeat in range(repeats):
        where = f"repeat {repeat + 1} of {repeats}: "
        log(where + "one process")
        (made,) = alone(kinds)
        runs.alone.append({kind.reuses: one for kind, one in zip(kinds, made, strict=True)})
        for layout in layouts if repeat % 2 == 0 else layouts[::-1]:
            log(f"{where}pp {layout.pp}, cp {layout.cp}")
            workloads = _workloads(layout, kinds)
            for workload, one in zip(workloads, on_ranks(layout, workloads, pings=_PINGS), strict=True):
                runs.gangs.setdefault((layout, workload), []).append(one)
    return runs


def _profiles(runs: _Runs, log: Callable[[str], None]) -> list[str]:
    """Of two stages: one video without reuse, two with it."""
    layout = Layout(pp=2)
    workloads = [one for own, one in runs.gangs if own == layout and not one.barrier and one.videos == 1 + one.reuses]
    if not workloads:
        return []
    log("where the time goes")
    timings = take_timings(workloads, stage_sizes(model_config(workloads[0].model), layout.pp))
    parts = [_PROFILE]
    for workload, quiet, busy in zip(workloads, timings.quiet, timings.busy, strict=True):
        made = runs.gangs[layout, workload]
        middle = sorted(range(len(made)), key=lambda repeat: made[repeat].seconds)[len(made) // 2]
        table = profile_table(workload, quiet, busy, made[middle], runs.beside(workload)[middle])
        rest = f"{1e3 * quiet.rest:.2f} ms per call outside of calls in one process, {1e3 * quiet.embed:.2f} ms for a "
        parts.append(f"### pp 2, {workload.name}\n\n{table}\n\n{rest}patch embedding.")
    hop = runs.gangs[layout, workloads[0]][0].hop
    return [*parts, f"A message from one rank to the other takes {1e3 * hop:.2f} ms."]


def _write(out: Path, plain: Workload, runs: _Runs, profiles: Sequence[str]) -> int:
    rows, found = [], []
    for (layout, workload), made in runs.gangs.items():
        beside = runs.beside(workload)
        rows.append(row_of(layout, workload, made, beside))
        where = f"pp {layout.pp}, cp {layout.cp}, {workload.name}: "
        for one, other in zip(made, beside, strict=True):
            found += [where + what for what in problems(layout, workload, one, other)]
    checked = sum(map(len, runs.gangs.values()))
    title = f"{plain.size}, {len(runs.alone)} repeats"
    return publish(
        out,
        "pipeline",
        title="Pipeline stages against one process",
        about=f"{title}. {machine_line()}; one thread per rank.\n\n{_NOTES}",
        verdicts=verdicts(rows, found, checked),
        sections={
            "Speed": rows_table(rows),
            "A barrier per tick": barrier_table(rows),
            "Calls and bytes": moved_table(rows),
            "Where the time of two stages goes": "\n\n".join(profiles),
            "What differs": "\n".join(f"- {one}" for one in found),
        },
        data=csv_rows(rows),
        figures={"pipeline": speed_figure(rows, f"Speed-up of ranks over one process\n{title}")},
    )


if __name__ == "__main__":
    sys.exit(run_app(app, "pipeline"))
