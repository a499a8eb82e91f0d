"""Tables and a figure of simulated layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from benchmarks.report import Cell, csv_text, markdown_table
from benchmarks.simulate_runs import Reuse, Run, Study, run_study, whole_plan
from parallel.topology.mesh import Layout

_COLOURS = ("#27548a", "#d55e00", "#009e73", "#cc79a7", "#f3b23f", "#444444")
_DOUBLINGS = (1.0, 0.95, 0.9, 0.85, 0.8)
_SENSITIVITY = """\
One video, seconds per chunk on all GPUs as one gang, if doubling cp keeps this share of the speed, communication apart.
The best of each line is in bold."""
_ROOM = 0.9
"""Share of a GPU's memory that weights and KV may take."""


def document(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run], model: str) -> str:
    """Everything as Markdown."""
    cluster, vanilla = study.cluster, whole_plan(study, None, Layout())
    about = " ".join(
        (
            f"{model} on {cluster.hardware.gpus} GPUs, {study.chunks} chunks of {study.steps} steps.",
            f"A full pass of a chunk takes {cluster.pass_seconds:g} s on one GPU, which at {cluster.mfu:.0%} of the",
            f"peak is with {cluster.attended:.1f} chunks of keys; a hop carries {cluster.hidden_bytes / 1e6:.0f} MB.",
            f"Without reuse one video is {vanilla.calls} passes, {cluster.petaflops(vanilla):.0f} PFLOP and",
            f"{vanilla.seconds:.0f} s on one GPU.",
        )
    )
    computed = [f"{one.name} computes {one.computed:.2f} of the chunk-steps" for one in reuses if one.flags]
    parts = [
        "# Simulated layouts",
        about + (f" {'; '.join(computed)}." if computed else ""),
        f"## Best\n\n{_best(study, reuses, runs)}",
        f"## One video\n\n{_one_video(study, reuses, runs)}",
    ]
    parts += [f"## Many videos, {one.name}: chunks per minute\n\n{_many(study, one, runs)}" for one in reuses]
    parts.append(f"## If cp costs more\n\n{_SENSITIVITY}\n\n{_sensitivity(study, reuses)}")
    parts += [f"## What cp costs\n\n{_cp_table(study)}", f"## Memory of the fullest rank\n\n{_memory(study)}"]
    return "\n\n".join(parts)


def _name(study: Study, layout: Layout) -> str:
    gangs = study.gangs(layout)
    return f"pp {layout.pp} x cp {layout.cp}" + (f", {gangs} gangs" if gangs > 1 else "")


def _one_video(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run]) -> str:
    headers = ["layout"]
    for reuse in reuses:
        headers += [f"{reuse.name}: s per chunk", "first chunk (s)", "speed-up", "stages busy"]
    rows: list[tuple[Cell, ...]] = []
    for layout in study.layouts:
        row: list[Cell] = [f"pp {layout.pp} x cp {layout.cp}"]
        for reuse in reuses:
            found = _find(runs, layout, reuse.name, min(study.concurrency))
            low, high = min(found.utilisation), max(found.utilisation)
            busy = f"{low:.0%}" if len(found.utilisation) == 1 else f"{low:.0%}-{high:.0%}"
            row += [f"{found.per_chunk:.1f}", f"{found.first_chunk:.0f}", f"{found.speed_up:.2f}", busy]
        rows.append(tuple(row))
    return markdown_table(headers, rows)


def _many(study: Study, reuse: Reuse, runs: Sequence[Run]) -> str:
    headers = ["layout", *(f"{count} in flight" for count in study.concurrency), "first chunk of the most (s)"]
    rows: list[tuple[Cell, ...]] = []
    for layout in study.layouts:
        cells: list[Cell] = [_name(study, layout)]
        for count in study.concurrency:
            found = _find(runs, layout, reuse.name, count)
            fits = "" if _fits(study, layout, count) else " (too big)"
            cells.append(f"{60 / found.per_chunk:.2f}{fits}")
        cells.append(f"{_find(runs, layout, reuse.name, max(study.concurrency)).first_chunk:.0f}")
        rows.append(tuple(cells))
    return markdown_table(headers, rows)


def _best(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run]) -> str:
    headers = ("", "best for one video", "s per chunk", "best for many", "chunks per minute", "best for many, one gang")
    rows: list[tuple[Cell, ...]] = []
    one, most = min(study.concurrency), max(study.concurrency)
    for reuse in reuses:
        single = min((r for r in runs if (r.reuse, r.videos) == (reuse.name, one)), key=lambda run: run.seconds)
        many = [r for r in runs if (r.reuse, r.videos) == (reuse.name, most) and _fits(study, r.layout, most)]
        best = min(many, key=lambda run: run.seconds, default=None)
        gang = min((r for r in many if study.gangs(r.layout) == 1), key=lambda run: run.seconds, default=None)
        rows.append(
            (
                reuse.name,
                f"pp {single.layout.pp} x cp {single.layout.cp}",
                f"{single.per_chunk:.1f}",
                "none fits" if best is None else _name(study, best.layout),
                "" if best is None else f"{60 / best.per_chunk:.2f}",
                "none fits"
                if gang is None
                else f"pp {gang.layout.pp} x cp {gang.layout.cp}: {60 / gang.per_chunk:.2f}",
            )
        )
    return markdown_table(headers, rows)


def _sensitivity(study: Study, reuses: Sequence[Reuse]) -> str:
    whole = tuple(layout for layout in study.layouts if study.gangs(layout) == 1)
    rows: list[tuple[Cell, ...]] = []
    for doubling in _DOUBLINGS:
        hardware = replace(study.cluster.hardware, doubling=doubling)
        other = replace(study, cluster=replace(study.cluster, hardware=hardware), layouts=whole, concurrency=(1,))
        runs = run_study(other, reuses)
        for reuse in reuses:
            own = [_find(runs, layout, reuse.name, 1) for layout in whole]
            best = min(own, key=lambda run: run.seconds)
            cells = [f"**{run.per_chunk:.1f}**" if run is best else f"{run.per_chunk:.1f}" for run in own]
            rows.append((f"{doubling:.2f}", reuse.name, *cells))
    return markdown_table(("doubling", "", *(f"pp {one.pp} x cp {one.cp}" for one in whole)), rows)


def _cp_table(study: Study) -> str:
    cluster, rows = study.cluster, []
    for cp in sorted({layout.cp for layout in study.layouts}):
        moved = cluster.exchange_bytes(cp) if cp > 1 else 0.0
        layers = cluster.config.model_config.num_layers
        spent = layers * cluster.exchange_seconds(cp)
        whole = cluster.pass_seconds / cluster.cp_speed(cp) + spent
        rows.append(
            (cp, f"{moved / 1e6:.1f}", f"{1e3 * spent:.1f}", f"{whole:.2f}", f"{cluster.pass_seconds / whole:.2f}")
        )
    headers = ("cp", "MB sent per rank and layer", "ms of exchange per pass", "s per pass", "speed-up")
    return markdown_table(headers, rows)


def _memory(study: Study) -> str:
    headers = [
        "layout",
        "weights (GB)",
        "KV of a video (GB)",
        *(f"{count} in flight (GB)" for count in study.concurrency),
    ]
    rows: list[tuple[Cell, ...]] = []
    for layout in study.layouts:
        held = study.cluster.memory(layout)
        totals = [f"{_bytes(study, layout, count) / 1e9:.1f}" for count in study.concurrency]
        rows.append((_name(study, layout), f"{held.weights / 1e9:.1f}", f"{held.kv / 1e9:.1f}", *totals))
    return markdown_table(headers, rows)


def _bytes(study: Study, layout: Layout, videos: int) -> int:
    held, gangs = study.cluster.memory(layout), study.gangs(layout)
    return held.weights + -(-videos // gangs) * held.kv


def _fits(study: Study, layout: Layout, videos: int) -> bool:
    return _bytes(study, layout, videos) <= _ROOM * study.cluster.hardware.memory


def _find(runs: Sequence[Run], layout: Layout, reuse: str, videos: int) -> Run:
    return next(run for run in runs if (run.layout, run.reuse, run.videos) == (layout, reuse, videos))


def csv(study: Study, runs: Sequence[Run]) -> str:
    """All runs."""
    headers = ("pp", "cp", "gangs", "reuse", "videos", "seconds", "per_chunk_s", "first_chunk_s", "speedup")
    rows = [
        (
            run.layout.pp,
            run.layout.cp,
            run.gangs,
            run.reuse,
            run.videos,
            run.seconds,
            run.per_chunk,
            run.first_chunk,
            run.speed_up,
            " ".join(f"{share:.4f}" for share in run.utilisation),
            _bytes(study, run.layout, run.videos) / 1e9,
        )
        for run in runs
    ]
    return csv_text((*headers, "utilisation", "gb_per_rank"), rows)


def throughput_figure(study: Study, runs: Sequence[Run], title: str) -> Figure:
    """Chunks per minute over videos in flight; a panel for each kind of reuse, a line for each layout."""
    names = list(dict.fromkeys(run.reuse for run in runs))
    figure = Figure(figsize=(4.4 * len(names) + 0.6, 5.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    colours = (
        "#27548a",
        "#d55e00",
        "#009e73",
        "#cc79a7",
        "#f3b23f",
        "#444444",
        "#56b4e9",
        "#8c564b",
        "#e377c2",
        "#7f7f7f",
    )
    for panel, name in zip(panels, names, strict=True):
        for place, layout in enumerate(study.layouts):
            own = [run for run in runs if (run.layout, run.reuse) == (layout, name)]
            whole = study.gangs(layout) == 1
            panel.plot(
                [run.videos for run in own],
                [60 / run.per_chunk for run in own],
                "-" if whole else "--",
                marker="o",
                markersize=4,
                color=colours[place % len(colours)],
                label=_name(study, layout),
            )
        panel.set(title=name, xlabel="videos in flight")
        panel.set_xscale("log", base=2)
        panel.set_xticks(study.concurrency, [str(count) for count in study.concurrency])
        panel.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("chunks per minute")
    panels[0].set_ylim(bottom=0)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure
