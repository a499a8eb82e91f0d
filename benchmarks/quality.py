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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.ledger import Ledger
from benchmarks.pareto import pareto_figure, speed_figure
from benchmarks.plan import make_plan
from benchmarks.prompts import balanced_scenes
from benchmarks.quality_report import FRACTIONS, csv, curve_table, setting_tables, verdicts
from benchmarks.report import machine_line, output_folder, run_app, save_figure, save_text
from benchmarks.sweep import WORK, Grid, Setting, StandIn
from benchmarks.trial import Case, Studio
from benchmarks.verdict import verdict_table
from engine.reuse.settings import ReuseSettings
from launch.options import CacheName
from launch.reuse_presets import REUSE_FIGURES, reuse_preset
from models.errors import InputError
from models.magi.pipeline import Loading, MagiPipeline, load_pipeline
from models.pocket.preset import pocket_config

_MODEL = "magi-pocket"
_SEEDS = 1000  # of noise per seed of the benchmark, so that two runs share none
_QUICK_FRACTIONS, _QUICK_BUDGETS, _QUICK_RUNGS = (0.85, 0.65, 0.5), (1, 2, 4), 5
_PROMPTS, _QUICK_PROMPTS = 20, 4

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="Which model; its prompts must be checkable.")] = _MODEL,
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
    if model != _MODEL:
        raise InputError(f"quality is measured on {_MODEL}, whose prompts can be checked, not on {model!r}")
    figures = REUSE_FIGURES[model]
    share = extrapolate_from
    if share is None:
        share = figures.extrapolate_from if kind is None else 1.0
    chosen = StandIn(kind=str(kind or figures.reuse), extrapolate_from=share)
    grid = Grid(warmup=warmup or figures.warmup_steps, chosen=chosen)
    ReuseSettings(policy="flowcache", reuse=chosen.kind, extrapolate_from=share)  # checks them
    if quick:
        grid = replace(grid, fractions=_QUICK_FRACTIONS, budgets=_QUICK_BUDGETS, rungs=_QUICK_RUNGS)
    output_folder(out)
    pipeline = load_pipeline(pocket_config(), weights, Loading(device=device))
    scenes = balanced_scenes(prompts or (_QUICK_PROMPTS if quick else _PROMPTS), seed)
    cases = [Case(scene=s, seed=seed * _SEEDS + i, chunks=chunks, num_steps=steps) for i, s in enumerate(scenes)]
    about = {"model": model, "weights": _digest(pipeline), "prompts": len(cases), "chunks": chunks, "steps": steps}
    about |= {"seed": seed, "stands in": chosen.label, "warmup": grid.warmup, "quick": quick, "device": device}
    presets = None if calibrated else _presets(model, grid)
    about |= {"thresholds": [one.threshold for one in presets.values()] if presets else "calibrated"}
    about |= {"threads": torch.get_num_threads()}
    ledger, studio, console = Ledger(out, about), Studio(pipeline), Console(stderr=True)
    if ledger.plan is None:
        with console.status("finding thresholds") as status:
            ledger.begin(make_plan(studio, grid, cases, presets, about, status.update))
    _run_trials(studio, ledger, cases, console)
    raise typer.Exit(0 if _write(out, ledger, grid) else 1)


def _presets(model: str, grid: Grid) -> dict[str, Setting]:
    """The thresholds of `--cache`, with what the grid has stand in for reused steps, and its warm-up."""
    names = [name for name in CacheName if name is not CacheName.NONE]
    cache = {name: reuse_preset(name, model) for name in names}
    return {name.value: grid.reuse(one.policy, grid.chosen, one.threshold) for name, one in cache.items()}


def _run_trials(studio: Studio, ledger: Ledger, cases: Sequence[Case], console: Console) -> None:
    """Run what is missing, prompt by prompt, each result on disk as soon as it is there."""
    missing = {case: ledger.missing(case.scene.prompt, case.seed) for case in cases}
    total = len(ledger.trials) + sum(len(settings) for settings in missing.values())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("videos", total=total, completed=len(ledger.trials))
        if any(missing.values()):
            studio.make(Setting(), cases[0])  # the first video of a process is slow
        for case, settings in missing.items():
            bar.update(task, description=case.scene.prompt)
            for trial in studio.trials(case, settings):
                ledger.add(trial)
                bar.update(task, advance=1)


def _write(out: Path, ledger: Ledger, grid: Grid) -> bool:
    """Write Markdown, CSV and figures, and print what was found; tells whether all is as wanted."""
    plan, trials = ledger.plan, ledger.trials
    assert plan is not None
    run = plan.run
    sizes = ", ".join(f"{run[name]} {name}" for name in ("prompts", "chunks", "steps"))
    lines = f"{run['model']}, {sizes}, seed {run['seed']}"
    found = verdicts(trials, grid.chosen.label, plan.presets)
    table, curves = verdict_table(found), curve_table(trials)
    title = "What reuse and KV compression save, and what they spoil"
    thresholds = "Thresholds that would do the paper's share of vanilla's operations: "
    thresholds += ", ".join(f"{name} {one:g} ({WORK[name]:.2f})" for name, one in plan.calibrated.items()) + "."
    parts = [
        f"# {title}",
        f"{lines}, warm-up {run['warmup']} steps. Stands in for reused steps in the presets: {grid.chosen.label}.",
        f"{machine_line()}.",
        thresholds,
        _NOTES,
        f"## Verdicts\n\n{table}",
        f"## PSNR at equal computed fraction\n\n{curves}",
        setting_tables(trials, plan.presets),
    ]
    save_text(out / "quality.md", "\n\n".join(parts))
    save_text(out / "quality.csv", csv(trials, plan.presets))
    save_figure(out / "pareto.png", pareto_figure(trials, f"Quality kept by reuse\n{lines}", FRACTIONS))
    save_figure(out / "speed.png", speed_figure(trials, f"Time saved by reuse\n{lines}"))
    typer.echo(f"{lines}\n\n{thresholds}\n\n{table}\n\n{curves}\n\nwritten to {out}")
    return all(one.passed for one in found)


def _digest(pipeline: MagiPipeline) -> str:
    """A short name of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(pipeline.model.dit.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


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


if __name__ == "__main__":
    sys.exit(run_app(app, "quality"))
