"""What reuse and KV compression cost and what they spoil, on magi-pocket.

    python -m benchmarks.quality --out results/quality          # about an hour on one core
    python -m benchmarks.quality --quick --out /tmp/quality     # a small sweep

Makes the same videos without reuse, with chunk-wise reuse (flowcache), with one decision for the window (teacache), with
each kind of reuse and over a range of thresholds, and with compressed KV. Exit status 0 if all that the project holds
itself to is so, 1 if not, 2 for bad input. A run that is stopped goes on where it was when it is started again.

Which passes count: `vanilla` is the model as released, with a clean pass for every finished chunk and a context-free
copy of the cleanest one; `lean` has neither, as the published reuse runs. Leaving them out saves work but reuses
nothing, so PSNR and speed-up of a reuse run are against the run without reuse and with the *same* passes, and vanilla
stands beside it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.ledger import Ledger, Plan
from benchmarks.pareto import pareto_figure, speed_figure
from benchmarks.prompts import balanced_scenes
from benchmarks.quality_report import FRACTIONS, WORK, csv, curve_table, setting_tables, verdicts
from benchmarks.report import machine_line, output_folder, run_app, save_figure, save_text
from benchmarks.sweep import LEAN, Grid, Setting, calibrate, estimate_threshold
from benchmarks.trial import Case, Studio
from benchmarks.verdict import verdict_table
from engine.cache import CacheSettings, Policy
from models.errors import InputError
from models.loading import load_magi
from models.magi.pipeline import Loading, MagiPipeline
from models.pocket.preset import pocket_config

__all__ = ["app"]

_MODEL = "magi-pocket"
_SEEDS = 1000  # of noise per seed of the benchmark, so that two runs share none
_QUICK = Grid(fractions=(0.85, 0.65, 0.45), budgets=(2,))
_PROMPTS, _QUICK_PROMPTS = 20, 4
_CALIBRATION_CASES = 4

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
    kind: Annotated[str | None, typer.Option(help="Kind of reuse that is chosen; the engine's default.")] = None,
    warmup: Annotated[int, typer.Option(min=1, help="First steps of a chunk that are computed.")] = 5,
    weights: Annotated[Path | None, typer.Option(help="Folder of weights, in place of those that ship.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts, few thresholds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/quality"),
) -> None:
    """Measure what reuse and KV compression save, and what they cost in quality."""
    if model != _MODEL:
        raise InputError(f"quality is measured on {_MODEL}, whose prompts can be checked, not on {model!r}")
    chosen = CacheSettings(policy="flowcache", reuse=kind or CacheSettings().reuse, warmup_steps=warmup).reuse
    sizes = _QUICK if quick else Grid()
    grid = Grid(fractions=sizes.fractions, budgets=sizes.budgets, kind=chosen, warmup=warmup)
    output_folder(out)
    pipeline = load_magi(pocket_config(), weights, Loading(device=device))
    scenes = balanced_scenes(prompts or (_QUICK_PROMPTS if quick else _PROMPTS), seed)
    cases = [Case(scene=s, seed=seed * _SEEDS + i, chunks=chunks, num_steps=steps) for i, s in enumerate(scenes)]
    about = {"model": model, "weights": _digest(pipeline), "prompts": len(cases), "chunks": chunks, "steps": steps}
    about |= {"seed": seed, "kind": chosen, "warmup": warmup, "quick": quick, "device": device}
    ledger = Ledger(out, {**about, "threads": torch.get_num_threads()})
    studio = Studio(pipeline)
    console = Console(stderr=True)
    if ledger.plan is None:
        with console.status("finding thresholds"):
            ledger.begin(_plan(studio, grid, cases[:_CALIBRATION_CASES], {**about, "threads": torch.get_num_threads()}))
    _run_trials(studio, ledger, cases, console)
    raise typer.Exit(0 if _write(out, ledger, grid) else 1)


def _plan(studio: Studio, grid: Grid, cases: Sequence[Case], about: dict[str, Any]) -> Plan:
    """Find thresholds for the curves, and calibrate those of the presets on counted operations."""
    seen = [studio.observe(case) for case in cases]
    vanilla = [studio.make(Setting(), case).flops for case in cases]

    def estimate(method: str, fraction: float) -> float:
        def policy(threshold: float) -> Policy:
            return CacheSettings(policy=method, threshold=threshold, warmup_steps=grid.warmup).new_policy()

        return estimate_threshold(seen, policy, fraction)

    def work(setting: Setting) -> float:
        shares = [studio.make(setting, case).flops / whole for case, whole in zip(cases, vanilla, strict=True)]
        return sum(shares) / len(shares)

    lean = work(Setting(passes=LEAN))
    slow, fast = (
        calibrate(lambda one: work(grid.preset(one)), start=estimate("flowcache", target / lean), target=target)
        for target in WORK.values()
    )
    return Plan(run=about, settings=tuple(grid.settings(estimate, (slow, fast))), presets=(slow, fast))


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
    lines = f"{run['model']}, {run['prompts']} prompts, {run['chunks']} chunks, {run['steps']} steps, seed {run['seed']}"
    found = verdicts(trials, grid.kind, [grid.preset(one) for one in plan.presets])
    table, curves = verdict_table(found), curve_table(trials)
    title = "What reuse and KV compression save, and what they spoil"
    presets = ", ".join(f"{name} {one:g}" for name, one in zip(WORK, plan.presets, strict=True))
    parts = [
        f"# {title}",
        f"{lines}, warm-up {run['warmup']} steps, chosen kind of reuse: {grid.kind}. {machine_line()}.",
        f"Calibrated thresholds of flowcache: {presets}.",
        _NOTES,
        f"## Verdicts\n\n{table}",
        f"## PSNR at equal computed fraction\n\n{curves}",
        setting_tables(trials),
    ]
    save_text(out / "quality.md", "\n\n".join(parts))
    save_text(out / "quality.csv", csv(trials))
    save_figure(out / "pareto.png", pareto_figure(trials, f"Quality kept by reuse\n{lines}", FRACTIONS))
    save_figure(out / "speed.png", speed_figure(trials, f"Time saved by reuse\n{lines}"))
    typer.echo(f"{lines}; thresholds {presets}\n\n{table}\n\n{curves}\n\nwritten to {out}")
    return all(one.passed for one in found)


def _digest(pipeline: MagiPipeline) -> str:
    """A short name of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(pipeline.model.dit.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


_NOTES = """\
- `passes`: vanilla has a clean pass per finished chunk and a context-free copy of the cleanest one, as released; lean has
  neither, as the published reuse runs. What lean saves over vanilla is not caching.
- `computed`: computed chunk-steps as a share of all. `tflop`: operations of all matrix products of the passes that were
  run, counted, in 10^12; `flop_vs_vanilla`: the same as a share of vanilla's.
- `seconds`: of denoising, median over the prompts; frames are decoded outside. `speedup`: median over the prompts of the
  time without reuse with the same passes and KV, measured beside it, over its own; `speedup_vs_vanilla` likewise.
- `psnr` (dB), `ssim`, `latent_error` (relative L2): against the same prompt and seed without reuse, with the same passes
  and KV; means over the prompts. `psnr_uncompressed`: against no reuse and no compression, with the same passes.
- `colour_right`, `direction_right`, `whole_shape`: shares of the videos that show what the prompt says."""


if __name__ == "__main__":
    sys.exit(run_app(app, "quality"))
