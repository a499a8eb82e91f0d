"""What reuse and KV compression cost and what they spoil, on magi-pocket.

    python -m benchmarks.quality --out results/quality          # about an hour on one core
    python -m benchmarks.quality --quick --out /tmp/quality     # a small sweep

Makes the same videos without reuse, with chunk-wise reuse (flowcache), with one decision for the window (teacache),
with each kind of reuse and over a range of thresholds, and with compressed KV. Exit status 0 if all that the project
holds itself to is so, 1 if not, 2 for bad input. A run that is stopped goes on where it was when it is started again.

Which passes count: `vanilla` is the model as released, with a clean pass for every finished chunk and a context-free
copy of the cleanest one; `lean` has neither, as the published reuse runs. Leaving them out saves work but reuses
nothing, so PSNR and speed-up of a reuse run are against the run without reuse and with the *same* passes, and vanilla
stands beside it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.common import machine_line, output_folder, progress_bar, publish, run_app
from benchmarks.models import POCKET, balanced_scenes
from benchmarks.quality.report import csv_rows, curve_table, pareto_figure, setting_tables, speed_figure, verdicts
from benchmarks.quality.sweep import WORK, Grid, Setting, StandIn, make_plan
from benchmarks.quality.trial import Case, Results, TrialRunner, image_metrics
from engine.reuse.settings import ReuseSettings
from launch.options import CacheName
from launch.plan import REUSE_FIGURES, reuse_preset
from models.errors import InputError
from models.magi.pipeline import Loading, MagiPipeline, load_pipeline
from models.pocket.preset import pocket_config

_SEEDS = 1000  # of noise per seed of the benchmark, so that two runs share none
_QUICK_FRACTIONS, _QUICK_BUDGETS, _QUICK_RUNGS = (0.85, 0.65, 0.5), (1, 2, 4), 5
_PROMPTS, _QUICK_PROMPTS = 20, 4
_NOTES = """\
- passes: vanilla has a clean pass per finished chunk and a context-free copy of the cleanest one, as released; lean
  has neither, as the published reuse runs. What lean saves over vanilla is not caching.
- kv budget: own range is the model's own limited range; a number of chunks is compressed to that size.
- computed: computed chunk-steps as a share of all. tflop: operations of all matrix products of the passes that ran,
  counted, in 10^12; flop vs vanilla: the same as a share of vanilla's.
- seconds: of denoising, median over the prompts; frames are decoded outside. speedup: median over the prompts of the
  time without reuse with the same passes and KV, measured beside it, over its own (without reuse it shows the noise of
  the timing); speedup vs vanilla likewise.
- psnr (dB), ssim, latent error (relative L2): against the same prompt and seed without reuse, with the same passes and
  KV; means over the prompts. psnr uncompressed: against no reuse and no compression, with the same passes. Videos that
  do not differ count as 100 dB.
- colour right, direction right, whole shape: shares of the videos that show what the prompt says."""

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="Which model; its prompts must be checkable.")] = POCKET,
    prompts: Annotated[
        int | None, typer.Option(min=1, max=_SEEDS, help=f"How many prompts; {_PROMPTS}, or {_QUICK_PROMPTS} if quick.")
    ] = None,
    chunks: Annotated[int, typer.Option(min=2, help="Length of each video, in chunks of 24 frames.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of all noise.")] = 0,
    kind: Annotated[str | None, typer.Option(help="Kind of reuse of the presets; that of the model's own.")] = None,
    extrapolate_from: Annotated[
        float | None, typer.Option(help="Share of the threshold from which presets extrapolate; the model's own.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(min=1, help="First steps that are computed; the model's own.")] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Take thresholds found here in place of the presets' own.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Folder of weights, in place of those that ship.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts, few thresholds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/quality"),
) -> None:
    """Measure what reuse and KV compression save, and what they cost in quality."""
    if model != POCKET:
        raise InputError(f"quality is measured on {POCKET}, whose prompts can be checked, not on {model!r}")
    grid = _grid(kind, extrapolate_from, warmup, quick=quick)
    image_metrics()  # says at once if it is missing
    output_folder(out)
    pipeline = load_pipeline(pocket_config(), weights, Loading(device=device))
    scenes = balanced_scenes(prompts or (_QUICK_PROMPTS if quick else _PROMPTS), seed)
    cases = [Case(scene=s, seed=seed * _SEEDS + i, chunks=chunks, num_steps=steps) for i, s in enumerate(scenes)]
    about = {"model": model, "weights": _digest(pipeline), "prompts": len(cases), "chunks": chunks, "steps": steps}
    about |= {"seed": seed, "stands in": grid.chosen.label, "warmup": grid.warmup, "quick": quick, "device": device}
    presets = None if calibrated else _presets(grid)
    about |= {"thresholds": [one.threshold for one in presets.values()] if presets else "calibrated"}
    about |= {"threads": torch.get_num_threads()}
    results, runner = Results(out, about), TrialRunner(pipeline)
    if results.plan is None:
        with Console(stderr=True).status("finding thresholds") as status:
            results.begin(make_plan(runner.probe(cases), grid, presets, about, status.update))
    _run_trials(runner, results, cases)
    raise typer.Exit(_write(out, results, grid))


def _grid(kind: str | None, extrapolate_from: float | None, warmup: int | None, *, quick: bool) -> Grid:
    """What is swept; the model's own figures where nothing is given.

    Raises:
        InputError: a figure makes no sense.
    """
    figures, share = REUSE_FIGURES[POCKET], extrapolate_from
    if share is None:
        share = figures.extrapolate_from if kind is None else 1.0
    chosen = StandIn(kind=str(kind or figures.reuse), extrapolate_from=share)
    ReuseSettings(policy="flowcache", reuse=chosen.kind, extrapolate_from=share)  # checks them
    grid = Grid(warmup=warmup or figures.warmup_steps, chosen=chosen)
    if quick:
        return replace(grid, fractions=_QUICK_FRACTIONS, budgets=_QUICK_BUDGETS, rungs=_QUICK_RUNGS)
    return grid


def _presets(grid: Grid) -> dict[str, Setting]:
    """The thresholds of `--cache`, with what the grid has stand in for reused steps, and its warm-up."""
    presets = {name: reuse_preset(name, POCKET) for name in CacheName if name is not CacheName.NONE}
    return {name.value: grid.reuse(one.policy, grid.chosen, one.threshold) for name, one in presets.items()}


def _run_trials(runner: TrialRunner, results: Results, cases: Sequence[Case]) -> None:
    """Run what is missing, prompt by prompt, each result on disk as soon as it is there."""
    missing = {case: results.missing(case) for case in cases}
    total = len(results.trials) + sum(len(settings) for settings in missing.values())
    with progress_bar() as bar:
        task = bar.add_task("videos", total=total, completed=len(results.trials))
        if any(missing.values()):
            runner.make(Setting(), cases[0])  # the first video of a process is slow
        for case, settings in missing.items():
            bar.update(task, description=case.scene.prompt)
            for trial in runner.trials(case, settings):
                results.add(trial)
                bar.update(task, advance=1)


def _write(out: Path, results: Results, grid: Grid) -> int:
    plan, trials = results.plan, results.trials
    assert plan is not None
    run = plan.run
    sizes = ", ".join(f"{run[name]} {name}" for name in ("prompts", "chunks", "steps"))
    title = f"{run['model']}, {sizes}, seed {run['seed']}"
    thresholds = ", ".join(f"{name} {one:g} ({WORK[name]:.2f})" for name, one in plan.calibrated.items())
    about = (
        f"{title}, warm-up {run['warmup']} steps. Stands in for reused steps in the presets: {grid.chosen.label}.",
        f"{machine_line()}.",
        f"Thresholds that would do the paper's share of vanilla's operations: {thresholds}.",
        _NOTES,
    )
    return publish(
        out,
        "quality",
        title="What reuse and KV compression save, and what they spoil",
        about="\n\n".join(about),
        verdicts=verdicts(trials, grid.chosen.label, plan.presets),
        sections={
            "PSNR at equal computed fraction": curve_table(trials),
            **setting_tables(trials, plan.presets),
        },
        data=csv_rows(trials, plan.presets),
        figures={"pareto": pareto_figure(trials, title), "speed": speed_figure(trials, title)},
    )


def _digest(pipeline: MagiPipeline) -> str:
    """A short name of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(pipeline.model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(run_app(app, "quality"))
