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
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console

from benchmarks.common import Out, machine_line, output_folder, progress_bar, publish, run_command
from benchmarks.quality.report import csv_rows, curve_table, pareto_figure, setting_tables, speed_figure, verdicts
from benchmarks.quality.sweep import WORK, Grid, Setting, label_of, make_plan
from benchmarks.quality.trial import Results, TrialRunner, image_metrics
from benchmarks.workload import MOST_PROMPTS, POCKET, Steps, pocket_requests
from engine.request import Request
from launch.options import CacheName
from launch.plan import POCKET_FIGURES, reuse_preset
from models.errors import InputError
from models.magi.pipeline import MagiPipeline, load_pipeline
from models.magi.weights import Loading
from models.pocket.preset import pocket_config

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


def run(
    model: Annotated[str, typer.Option(help="Which model; its prompts must be checkable.")] = POCKET,
    prompts: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROMPTS, help=f"How many prompts; {_PROMPTS}, or {_QUICK_PROMPTS} if quick."),
    ] = None,
    chunks: Annotated[int, typer.Option(min=2, help="Length of each video, in chunks of 24 frames.")] = 8,
    steps: Steps = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of all noise.")] = 0,
    warmup: Annotated[int | None, typer.Option(min=1, help="First steps that are computed; the model's own.")] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Take thresholds found here in place of the presets' own.")
    ] = False,
    weights: Annotated[Path | None, typer.Option(help="Folder of weights, in place of those that ship.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts, few thresholds.")] = False,
    out: Out = Path("results/quality"),
) -> int:
    """Measure what reuse and KV compression save, and what they cost in quality."""
    if model != POCKET:
        raise InputError(f"quality is measured on {POCKET}, whose prompts can be checked, not on {model!r}")
    figures = POCKET_FIGURES
    grid = Grid(warmup=warmup or figures.warmup_steps, chosen=(figures.reuse, figures.extrapolate_from))
    if quick:
        grid = replace(grid, fractions=(0.85, 0.65, 0.5), budgets=(1, 2, 4), rungs=5)
    image_metrics()  # says at once if it is missing
    output_folder(out)
    pipeline = load_pipeline(pocket_config(), weights, Loading(device=device))
    count = prompts or (_QUICK_PROMPTS if quick else _PROMPTS)
    requests = pocket_requests(count, chunks=chunks, num_steps=steps, seed=seed)
    about = {"model": model, "weights": _digest(pipeline), "prompts": count, "chunks": chunks, "steps": steps}
    about |= {"seed": seed, "stands in": label_of(grid.chosen), "warmup": grid.warmup, "quick": quick, "device": device}
    presets = None if calibrated else _presets(grid)
    about |= {"thresholds": [one.reuse.threshold for one in presets.values()] if presets else "calibrated"}
    about |= {"threads": torch.get_num_threads()}
    results, runner = Results(out, about), TrialRunner(pipeline)
    if results.plan is None:
        with Console(stderr=True).status("finding thresholds") as status:
            results.begin(make_plan(runner.probe(requests), grid, presets, about, status.update))
    _run_trials(runner, results, requests)
    return _write(out, results, grid)


def _presets(grid: Grid) -> dict[str, Setting]:
    """The thresholds of `--cache`, with the warm-up of the grid."""
    presets = {name: reuse_preset(name, POCKET_FIGURES) for name in get_args(CacheName) if name != "none"}
    return {name: grid.reuse(one.policy, grid.chosen, one.threshold) for name, one in presets.items()}


def _run_trials(runner: TrialRunner, results: Results, requests: Sequence[Request]) -> None:
    """Run what is missing, prompt by prompt, each result on disk as soon as it is there."""
    missing = {request: results.missing(request) for request in requests}
    total = len(results.trials) + sum(len(settings) for settings in missing.values())
    with progress_bar() as bar:
        task = bar.add_task("videos", total=total, completed=len(results.trials))
        if any(missing.values()):
            runner.make(Setting(), requests[0])  # the first video of a process is slow
        for request, settings in missing.items():
            bar.update(task, description=request.prompt)
            for trial in runner.trials(request, settings):
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
        f"{title}, warm-up {run['warmup']} steps. Stands in for reused steps in the presets: {label_of(grid.chosen)}.",
        f"{machine_line()}.",
        f"Thresholds that would do the paper's share of vanilla's operations: {thresholds}.",
        _NOTES,
    )
    return publish(
        out,
        "quality",
        title="What reuse and KV compression save, and what they spoil",
        about="\n\n".join(about),
        verdicts=verdicts(trials, label_of(grid.chosen), plan.presets),
        sections={"PSNR at equal computed fraction": curve_table(trials), **setting_tables(trials, plan.presets)},
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
    sys.exit(run_command(run, "quality"))
