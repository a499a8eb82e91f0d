"""How long will videos take on a layout that is not at hand? Simulated; and the simulation checked on this machine.

    python -m benchmarks.simulate --out results/simulate          # MAGI-1-4.5B on 8 A800s: one video, many videos
    python -m benchmarks.simulate --record RUN_DIR --steps 16     # with the reuse of a recorded run
    python -m benchmarks.simulate --check --out results/check     # predict two stages from one process, and measure

docs/simulation.md says what is assumed. Exit status 1 if a prediction is more than 10% off what --check measures; 2 for
bad input.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import common
from benchmarks.common import Out, Row
from benchmarks.simulate.check import check_stages
from benchmarks.simulate.layouts import (
    Cluster,
    Reuse,
    Run,
    Study,
    layouts_on,
    reuse_of_record,
    run_study,
    sampled_reuse,
)
from benchmarks.workload import Chunks, Steps
from models.errors import InputError
from models.magi.presets import find_preset
from parallel.mesh import Layout

_FRACTIONS = (0.53, 0.46)
_CONCURRENCY = (1, 2, 4, 8, 16)
_DOUBLINGS = (1.0, 0.95, 0.9, 0.85, 0.8)
_SENSITIVITY = """\
One video, seconds per chunk on all GPUs as one gang, if doubling cp keeps this share of the speed, communication apart.
The best of each line is in bold."""


def run(
    model: Annotated[str, typer.Option(help="A preset of MAGI-1.")] = "magi-4.5b-distill",
    chunks: Chunks = 10,
    steps: Steps = 64,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the machine.")] = 8,
    concurrency: Annotated[list[int] | None, typer.Option(help="Videos in flight; give it several times.")] = None,
    pass_seconds: Annotated[float, typer.Option(help="Seconds of a full pass of a chunk on one GPU.")] = 3.6,
    record: Annotated[Path | None, typer.Option(help="Folder of a record, whose reuse is taken.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the simulation on this machine instead.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short videos, few in flight.")] = False,
    out: Out = Path("results/simulate"),
) -> int:
    """Predict what layouts take."""
    common.output_folder(out)
    if check:
        return check_stages(out, quick=quick)
    if quick:
        chunks, concurrency = min(chunks, 5), concurrency or [1, 4]
    if not pass_seconds > 0:
        raise InputError(f"--pass-seconds {pass_seconds:g} must be more than zero")
    cluster = Cluster(config=find_preset(model).config(), pass_seconds=pass_seconds, gpus=gpus)
    wanted, layouts = tuple(concurrency or _CONCURRENCY), layouts_on(cluster.config, gpus)
    study = Study(cluster=cluster, chunks=chunks, steps=steps, layouts=layouts, concurrency=wanted)
    with Console(stderr=True).status("simulating"):
        kinds = (
            [sampled_reuse(study, one) for one in _FRACTIONS] if record is None else [reuse_of_record(study, record)]
        )
        reuses = [Reuse(name="no reuse"), *kinds]
        runs = run_study(study, reuses)
        tables = sections(study, reuses, runs)
    return common.publish(
        out,
        "simulate",
        title="Simulated layouts",
        about=about(study, reuses, model),
        sections=tables,
        data=[csv_row(study, run) for run in runs],
    )


def about(study: Study, reuses: Sequence[Reuse], model: str) -> str:
    """What was simulated, in a paragraph."""
    cluster, vanilla = study.cluster, study.plan(None, Layout())
    text = " ".join(
        (
            f"{model} on {cluster.gpus} GPUs, {study.chunks} chunks of {study.steps} steps.",
            f"A full pass of a chunk takes {cluster.pass_seconds:g} s on one GPU, which at {cluster.mfu:.0%} of the",
            f"peak is with {cluster.attended:.1f} chunks of keys; a hop carries {cluster.hidden_bytes / 1e6:.0f} MB.",
            f"Without reuse one video is {vanilla.calls} passes, {cluster.petaflops(vanilla):.0f} PFLOP and",
            f"{vanilla.total:.0f} s on one GPU.",
        )
    )
    computed = [f"{one.name} computes {one.computed:.2f} of the chunk-steps" for one in reuses if one.flags]
    return text + (f" {'; '.join(computed)}." if computed else "")


def sections(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run]) -> dict[str, str | Sequence[Row]]:
    """All tables, by heading."""
    parts: dict[str, str | Sequence[Row]] = {"Best": [_best(study, one.name, runs) for one in reuses]}
    for one in reuses:
        parts[f"One video, {one.name}"] = [_one_video(study, one, runs, layout) for layout in study.layouts]
        parts[f"Many videos, {one.name}: chunks per minute"] = _many(study, one, runs)
    parts["If cp costs more"] = f"{_SENSITIVITY}\n\n{common.table(_sensitivity(study, reuses))}"
    return parts | {"What cp costs": _cp_rows(study), "Memory of the fullest rank": _memory(study)}


def _layout(layout: Layout) -> str:
    return f"pp {layout.pp} x cp {layout.cp}"


def _name(study: Study, layout: Layout) -> str:
    gangs = study.gangs(layout)
    return _layout(layout) + (f", {gangs} gangs" if gangs > 1 else "")


def _find(runs: Sequence[Run], layout: Layout, reuse: str, videos: int) -> Run:
    return next(run for run in runs if (run.layout, run.reuse, run.videos) == (layout, reuse, videos))


def _best(study: Study, reuse: str, runs: Sequence[Run]) -> Row:
    one, most = min(study.concurrency), max(study.concurrency)
    single = min((r for r in runs if (r.reuse, r.videos) == (reuse, one)), key=lambda run: run.seconds)
    many = [r for r in runs if (r.reuse, r.videos) == (reuse, most) and study.fits(r.layout, most)]
    best = min(many, key=lambda run: run.seconds, default=None)
    gang = min((r for r in many if study.gangs(r.layout) == 1), key=lambda run: run.seconds, default=None)
    return {
        "": reuse,
        "best for one video": _layout(single.layout),
        "s per chunk": f"{single.per_chunk:.1f}",
        "best for many": _name(study, best.layout) if best else "none fits",
        "chunks per minute": f"{60 / best.per_chunk:.2f}" if best else "",
        "best for many, one gang": f"{_layout(gang.layout)}: {60 / gang.per_chunk:.2f}" if gang else "none fits",
    }


def _one_video(study: Study, reuse: Reuse, runs: Sequence[Run], layout: Layout) -> Row:
    found = _find(runs, layout, reuse.name, min(study.concurrency))
    busy = "-".join(f"{one(found.utilisation):.0%}" for one in ((min, max) if layout.pp > 1 else (min,)))
    row: Row = {"layout": _layout(layout), "s per chunk": f"{found.per_chunk:.1f}"}
    row |= {"first chunk (s)": f"{found.first_chunk:.0f}", "speed-up": f"{found.speed_up:.2f}"}
    return row | {"stages busy": busy}


def _many(study: Study, reuse: Reuse, runs: Sequence[Run]) -> list[Row]:
    rows: list[Row] = []
    for layout in study.layouts:
        row: Row = {"layout": _name(study, layout)}
        for count in study.concurrency:
            fits = "" if study.fits(layout, count) else " (too big)"
            row[f"{count} in flight"] = f"{60 / _find(runs, layout, reuse.name, count).per_chunk:.2f}{fits}"
        most = _find(runs, layout, reuse.name, max(study.concurrency))
        rows.append({**row, "first chunk of the most (s)": f"{most.first_chunk:.0f}"})
    return rows


def _sensitivity(study: Study, reuses: Sequence[Reuse]) -> list[Row]:
    whole = tuple(layout for layout in study.layouts if study.gangs(layout) == 1)
    rows = list[Row]()
    for doubling in _DOUBLINGS:
        cluster = replace(study.cluster, doubling=doubling)
        runs = run_study(replace(study, cluster=cluster, layouts=whole, concurrency=(1,)), reuses)
        for reuse in reuses:
            own = {_layout(run.layout): run.per_chunk for run in runs if run.reuse == reuse.name}
            best = min(own, key=own.__getitem__)
            cells = {name: f"**{one:.1f}**" if name == best else f"{one:.1f}" for name, one in own.items()}
            rows.append({"doubling": f"{doubling:.2f}", "": reuse.name, **cells})
    return rows


def _cp_rows(study: Study) -> list[Row]:
    cluster, rows = study.cluster, list[Row]()
    for cp in sorted({layout.cp for layout in study.layouts}):
        spent = cluster.config.model_config.num_layers * cluster.exchange_seconds(cp)
        whole = cluster.pass_seconds / cluster.cp_speed(cp) + spent
        row: Row = {"cp": cp, "MB sent per rank and layer": f"{cluster.exchange_bytes(cp) / 1e6:.1f}"}
        row |= {"ms of exchange per pass": f"{1e3 * spent:.1f}", "s per pass": f"{whole:.2f}"}
        rows.append(row | {"speed-up": f"{cluster.pass_seconds / whole:.2f}"})
    return rows


def _memory(study: Study) -> list[Row]:
    rows = list[Row]()
    for layout in study.layouts:
        weights, kv = study.cluster.held(layout)
        row: Row = {"layout": _name(study, layout), "weights (GB)": f"{weights / 1e9:.1f}"}
        row |= {"KV of a video (GB)": f"{kv / 1e9:.1f}"}
        counts = study.concurrency
        rows.append(row | {f"{one} in flight (GB)": f"{study.rank_bytes(layout, one) / 1e9:.1f}" for one in counts})
    return rows


def csv_row(study: Study, run: Run) -> Row:
    """A run as a line of the CSV file."""
    row: Row = {"pp": run.layout.pp, "cp": run.layout.cp, "gangs": run.gangs}
    row |= {"reuse": run.reuse, "videos": run.videos, "seconds": run.seconds, "per_chunk_s": run.per_chunk}
    row |= {"first_chunk_s": run.first_chunk, "speedup": run.speed_up}
    row |= {"utilisation": " ".join(f"{share:.4f}" for share in run.utilisation)}
    return row | {"gb_per_rank": study.rank_bytes(run.layout, run.videos) / 1e9}


if __name__ == "__main__":
    sys.exit(common.run_command(run, "simulate"))
