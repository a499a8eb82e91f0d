"""How long will videos take on a layout that is not at hand? Simulated; and the simulation checked on this machine.

    python -m benchmarks.simulate --out results/simulate          # MAGI-1-4.5B on 8 A800s: one video, many videos
    python -m benchmarks.simulate --record RUN_DIR --steps 16     # with the reuse of a recorded run
    python -m benchmarks.simulate --check --out results/check     # predict two stages from one process, and measure

docs/simulation.md says what is assumed. Exit status 1 if a prediction is more than 10% off what --check measures; 2 for
bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.common import output_folder, publish, run_app
from benchmarks.simulate.check import check_stages
from benchmarks.simulate.layouts import (
    Cluster,
    Hardware,
    Reuse,
    Study,
    layouts_on,
    reuse_of_record,
    run_study,
    sampled_reuse,
)
from benchmarks.simulate.report import about, csv_rows, sections, throughput_figure
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.presets import find_preset

_FRACTIONS = (0.53, 0.46)
_CONCURRENCY = (1, 2, 4, 8, 16)

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="A preset of MAGI-1.")] = "magi-4.5b-distill",
    chunks: Annotated[int, typer.Option(min=1, help="Length of a video.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 64,
    window: Annotated[int | None, typer.Option(min=1, help="Chunks of the window, in place of the model's.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the machine.")] = 8,
    concurrency: Annotated[list[int] | None, typer.Option(help="Videos in flight; give it several times.")] = None,
    pass_seconds: Annotated[float, typer.Option(help="Seconds of a full pass of a chunk on one GPU.")] = 3.6,
    mfu: Annotated[float, typer.Option(help="Share of the peak that it reaches.")] = 0.34,
    cp_doubling: Annotated[float, typer.Option(help="Share of the speed kept when cp doubles.")] = 0.95,
    kv_budget: Annotated[int, typer.Option(min=0, help="KV budget, in chunks.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="First steps of a chunk that are computed.")] = 5,
    fraction: Annotated[list[float] | None, typer.Option(help="Operations with reuse, as a share of all.")] = None,
    record: Annotated[Path | None, typer.Option(help="Folder of a record, whose reuse is taken.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the simulation on this machine instead.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short videos, few in flight.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/simulate"),
) -> None:
    """Predict what layouts take."""
    output_folder(out)
    if check:
        raise typer.Exit(check_stages(out, quick=quick))
    if quick:
        chunks, concurrency = min(chunks, 5), concurrency or [1, 4]
    for name, value in (("--pass-seconds", pass_seconds), ("--mfu", mfu), ("--cp-doubling", cp_doubling)):
        if not value > 0:
            raise InputError(f"{name} {value:g} must be more than zero")
    hardware = replace(Hardware(), gpus=gpus, doubling=cp_doubling)
    config = _config(model, window)
    study = Study(
        cluster=Cluster(config=config, hardware=hardware, pass_seconds=pass_seconds, mfu=mfu, budget=kv_budget),
        chunks=chunks,
        steps=steps,
        layouts=layouts_on(config, gpus),
        concurrency=tuple(concurrency or _CONCURRENCY),
    )
    with Console(stderr=True).status("simulating"):
        reuses = _reuses(study, warmup, fraction or _FRACTIONS, record)
        runs = run_study(study, reuses)
        tables = sections(study, reuses, runs)
    publish(
        out,
        "simulate",
        title="Simulated layouts",
        about=about(study, reuses, model),
        sections=tables,
        data=csv_rows(study, runs),
        figures={"simulate": throughput_figure(study, runs, f"Simulated: {model} on {gpus} GPUs")},
    )


def _config(model: str, window: int | None) -> MagiConfig:
    config = find_preset(model).config()
    if window is None:
        return config
    values = config.to_dict()
    values["runtime_config"]["window_size"] = window
    return MagiConfig.from_dict(values, source=f"{model} with a window of {window}")


def _reuses(study: Study, warmup: int, fractions: Sequence[float], record: Path | None) -> list[Reuse]:
    none = Reuse(name="no reuse")
    if record is not None:
        return [none, reuse_of_record(study, record)]
    return [none, *(sampled_reuse(study, fraction, warmup) for fraction in fractions)]


if __name__ == "__main__":
    sys.exit(run_app(app, "simulate"))
