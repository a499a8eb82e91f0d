"""What reuse and KV compression cost and what they spoil, on magi-pocket; or on a model of diffusion forcing.

    python -m benchmarks.quality --out results/quality          # about an hour on one core
    python -m benchmarks.quality --quick --out /tmp/quality     # a small sweep
    python -m benchmarks.quality --model skyreels-v2-df-1.3b-540p   # some minutes: see forcing.py

Makes the same videos without reuse, with chunk-wise reuse (flowcache), with one decision for the window (teacache),
with each kind of reuse and over a range of thresholds, and with compressed KV. Exit status 0 if all that the project
holds itself to is so, 1 if not, 2 for bad input. A run that is stopped goes on where it was when it is started again,
once it has found its thresholds.

Which passes count: `vanilla` is the model as released, with a clean pass for every finished chunk and a context-free
copy of the cleanest one; `lean` has neither, as the published reuse runs. Leaving them out saves work but reuses
nothing, so PSNR and speed-up of a reuse run are against the run without reuse and with the *same* passes, and vanilla
stands beside it.

The distances of a model decide what a threshold means. So thresholds of the curves are not listed: a few videos show
which ones compute the wanted share of the steps.
"""

import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console

from benchmarks.common import Out, machine_line, nearest, output_folder, progress, publish, run_command, search
from benchmarks.quality.forcing import study
from benchmarks.quality.report import curve_table, pareto_figure, setting_rows, speed_figure, verdicts
from benchmarks.quality.trial import LEAN, WORK, Results, Setting, Trial, TrialRunner, image_metrics
from benchmarks.workload import MOST_PROMPTS, POCKET, Weights, pocket_pipeline, pocket_requests, pocket_reuse
from engine.request import Request
from engine.reuse.policy import KINDS, ReuseSettings
from launch.options import CacheName
from models.magi.pipeline import MagiPipeline

METHODS = ("flowcache", "teacache")
STAND_INS = (*((kind, 1.0) for kind in KINDS), ("velocity", 0.5))
"""What stands in for a reused step, and the share of the threshold above which it is extrapolated; 1 never does."""
_FRACTIONS, _QUICK_FRACTIONS = (0.9, 0.8, 0.65, 0.5, 0.4), (0.8, 0.5)  # computed, that the curves aim at
_BUDGETS, _QUICK_BUDGETS = (1, 2, 3, 4), (2,)  # of the KV buffer
_PROMPTS, _QUICK_PROMPTS, _STEPS = 20, 4, 16
_CURVE_PROMPTS, _WORK_PROMPTS = 2, 4  # that thresholds are found on
_RANGE, _TRIES, _QUICK_TRIES = 50, 10, 2  # how far from the preset's a threshold may be; how often to try
_NEAR, _EXACT = 0.02, 0.002  # of a computed fraction, and of a share of the operations
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
    prompts: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROMPTS, help=f"How many prompts; {_PROMPTS}, or {_QUICK_PROMPTS} if quick."),
    ] = None,
    chunks: Annotated[int, typer.Option(min=2, help="Length of each video, in chunks of 24 frames.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Denoising steps of a chunk; {_STEPS}, or those of the --model.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of all noise.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="A model of SkyReels-V2, in place of magi-pocket: structure and reuse apart.")
    ] = None,
    weights: Weights = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts, few thresholds.")] = False,
    out: Out = Path("results/quality"),
) -> int:
    """Measure what reuse and KV compression save, and what they cost in quality."""
    if model is not None:
        return study(model, steps=steps, quick=quick, out=out)
    image_metrics()  # says at once if it is missing
    output_folder(out)
    steps = steps or _STEPS
    pipeline = pocket_pipeline(weights)
    count = prompts or (_QUICK_PROMPTS if quick else _PROMPTS)
    requests = pocket_requests(count, chunks=chunks, num_steps=steps, seed=seed)
    presets = presets_of_pocket()
    run = {"weights": _digest(pipeline), "prompts": count, "chunks": chunks, "steps": steps, "seed": seed}
    run |= {"quick": quick, "presets": list(presets.values()), "threads": torch.get_num_threads()}
    name = hashlib.sha256(repr(run).encode()).hexdigest()[:8]
    results, runner = Results(out / f"trials-{name}.jsonl"), TrialRunner(pipeline)
    with Console(stderr=True).status("finding thresholds") as status:
        settings, found = _thresholds(runner, requests, presets, quick, status.update)
    _run_trials(runner, results, settings, requests)
    title = f"{POCKET}, {count} prompts, {chunks} chunks, {steps} steps, seed {seed}"
    return _write(out, results.trials, presets, found, title)


def presets_of_pocket() -> dict[str, Setting]:
    """What `--cache` stands for."""
    return {name: Setting(reuse=pocket_reuse(name)) for name in get_args(CacheName) if name != "none"}


def _thresholds(
    runner: TrialRunner,
    requests: Sequence[Request],
    presets: Mapping[str, Setting],
    quick: bool,
    log: Callable[[str], None],
) -> tuple[tuple[Setting, ...], dict[str, float]]:
    """All settings, and the thresholds at which presets would do their share of the work, from a few videos."""
    few, more = requests[:_CURVE_PROMPTS], requests[:_WORK_PROMPTS]
    vanilla = {one: runner.make(Setting(), one).flops for one in more}

    def computed(setting: Setting) -> float:
        log(f"thresholds: {setting.reuse.policy}, {setting.label}, {setting.reuse.threshold:g}")
        return statistics.fmean(runner.make(setting, one).computed for one in few)

    def work(setting: Setting) -> float:
        log(f"operations at threshold {setting.reuse.threshold:g}")
        return statistics.fmean(runner.make(setting, one).flops / vanilla[one] for one in more)

    fractions, budgets = (_QUICK_FRACTIONS, _QUICK_BUDGETS) if quick else (_FRACTIONS, _BUDGETS)
    tries = _QUICK_TRIES if quick else _TRIES
    points = curves(presets, fractions, computed, tries)
    return settings_of(presets, points, budgets), calibrated(presets, work, tries)


def settings_of(
    presets: Mapping[str, Setting], points: Sequence[Setting], budgets: Sequence[int]
) -> tuple[Setting, ...]:
    """All settings, each once: the presets of `WORK` are also run with vanilla passes and with compression."""
    lean, held = Setting(reuse=LEAN), [presets[name] for name in WORK]
    found = [Setting(), lean, *presets.values(), *points]
    found += [Setting(reuse=replace(one.reuse, clean_pass=True, copy_pass=True)) for one in held]
    found += [replace(one, budget=budget) for budget in budgets for one in (lean, *held)]
    return tuple(dict.fromkeys(found))


def curves(
    presets: Mapping[str, Setting], fractions: Sequence[float], computed: Callable[[Setting], float], tries: int
) -> list[Setting]:
    """The points of all curves: of each method and all that may stand in, at each computed fraction."""
    like, found = presets["flowcache-slow"].reuse, []
    chosen = like.reuse, like.extrapolate_from
    for method, (kind, share) in itertools.product(METHODS, dict.fromkeys((*STAND_INS, chosen))):
        curve = replace(like, policy=method, reuse=kind, extrapolate_from=share)
        known = {like.threshold / _RANGE: math.inf, like.threshold * _RANGE: -math.inf}

        def measure(threshold: float, curve: ReuseSettings = curve) -> float:
            return computed(Setting(reuse=curve.with_threshold(threshold)))

        for fraction in fractions:
            search(measure, fraction, known, tries=tries, near=_NEAR, geometric=True)
            found.append(Setting(reuse=curve.with_threshold(nearest(known, fraction))))
    return found


def calibrated(presets: Mapping[str, Setting], work: Callable[[Setting], float], tries: int) -> dict[str, float]:
    """Thresholds at which the presets would do the share of vanilla's operations that `WORK` asks for."""
    like = presets["flowcache-slow"].reuse
    known = {like.threshold / _RANGE: math.inf, like.threshold * _RANGE: -math.inf}

    def measure(threshold: float) -> float:
        return work(Setting(reuse=like.with_threshold(threshold)))

    for target in WORK.values():
        search(measure, target, known, tries=tries, near=_EXACT, geometric=True)
    return {name: nearest(known, target) for name, target in WORK.items()}


def _run_trials(
    runner: TrialRunner, results: Results, settings: Sequence[Setting], requests: Sequence[Request]
) -> None:
    """Run what is missing, prompt by prompt, each result on disk as soon as it is there."""
    missing = {request: results.missing(settings, request) for request in requests}
    total = sum(map(len, missing.values()))
    if total:
        runner.make(Setting(), requests[0])  # the first video of a process is slow
    trials = (one for request, own in missing.items() for one in runner.trials(request, own))
    for trial in progress(trials, "videos", total):
        results.add(trial)


def _write(
    out: Path, trials: Sequence[Trial], presets: Mapping[str, Setting], found: Mapping[str, float], title: str
) -> int:
    slow = presets["flowcache-slow"]
    thresholds = ", ".join(f"{name} {one:g} ({WORK[name]:.2f})" for name, one in found.items())
    about = (
        f"{title}, warm-up {slow.reuse.warmup_steps} steps. Stands in for reused steps in the presets: {slow.label}.",
        f"{machine_line()}.",
        f"Thresholds that would do the paper's share of vanilla's operations: {thresholds}.",
        _NOTES,
    )
    return publish(
        out,
        "quality",
        title="What reuse and KV compression save, and what they spoil",
        about="\n\n".join(about),
        verdicts=verdicts(trials, slow.label, presets),
        sections={"PSNR at equal computed fraction": curve_table(trials), "Settings": setting_rows(trials, presets)},
        figures={"pareto": pareto_figure(trials, title), "speed": speed_figure(trials, title)},
    )


def _digest(pipeline: MagiPipeline) -> str:
    """A short name of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(pipeline.model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(run_command(run, "quality"))
