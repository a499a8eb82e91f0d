"""Tables and a figure of simulated layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from benchmarks.common import COLOURS, Cell, Headers, Rows, columns, light_grid, markdown_table
from benchmarks.simulate.layouts import Reuse, Run, Study, run_study
from parallel.topology.mesh import Layout

_DOUBLINGS = (1.0, 0.95, 0.9, 0.85, 0.8)
_SENSITIVITY = """\
One video, seconds per chunk on all GPUs as one gang, if doubling cp keeps this share of the speed, communication apart.
The best of each line is in bold."""
_SHARE = 0.9  # of a GPU's memory that weights and KV may take


def about(study: Study, reuses: Sequence[Reuse], model: str) -> str:
    """What was simulated, in a paragraph."""
    cluster, vanilla = study.cluster, study.plan(None, Layout())
    text = " ".join(
        (
            f"{model} on {cluster.hardware.gpus} GPUs, {study.chunks} chunks of {study.steps} steps.",
            f"A full pass of a chunk takes {cluster.pass_seconds:g} s on one GPU, which at {cluster.mfu:.0%} of the",
            f"peak is with {cluster.attended:.1f} chunks of keys; a hop carries {cluster.hidden_bytes / 1e6:.0f} MB.",
            f"Without reuse one video is {vanilla.calls} passes, {cluster.petaflops(vanilla):.0f} PFLOP and",
            f"{vanilla.total:.0f} s on one GPU.",
        )
    )
    computed = [f"{one.name} computes {one.computed:.2f} of the chunk-steps" for one in reuses if one.flags]
    return text + (f" {'; '.join(computed)}." if computed else "")


def sections(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run]) -> dict[str, str]:
    """All tables as Markdown, by heading."""
    parts = {"Best": _best(study, reuses, runs), "One video": _one_video(study, reuses, runs)}
    parts |= {f"Many videos, {one.name}: chunks per minute": _many(study, one, runs) for one in reuses}
    parts["If cp costs more"] = f"{_SENSITIVITY}\n\n{_sensitivity(study, reuses)}"
    return parts | {"What cp costs": _cp_table(study), "Memory of the fullest rank": _memory(study)}


def _layout(layout: Layout) -> str:
    return f"pp {layout.pp} x cp {layout.cp}"


def _name(study: Study, layout: Layout) -> str:
    gangs = study.gangs(layout)
    return _layout(layout) + (f", {gangs} gangs" if gangs > 1 else "")


def _one_video(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run]) -> str:
    headers = ["layout"]
    for reuse in reuses:
        headers += [f"{reuse.name}: s per chunk", "first chunk (s)", "speed-up", "stages busy"]
    rows: list[list[Cell]] = []
    for layout in study.layouts:
        row: list[Cell] = [_layout(layout)]
        for reuse in reuses:
            found = _find(runs, layout, reuse.name, min(study.concurrency))
            low, high = min(found.utilisation), max(found.utilisation)
            busy = f"{low:.0%}" if len(found.utilisation) == 1 else f"{low:.0%}-{high:.0%}"
            row += [f"{found.per_chunk:.1f}", f"{found.first_chunk:.0f}", f"{found.speed_up:.2f}", busy]
        rows.append(row)
    return markdown_table(headers, rows)


def _many(study: Study, reuse: Reuse, runs: Sequence[Run]) -> str:
    rows: list[dict[str, Cell]] = []
    for layout in study.layouts:
        row: dict[str, Cell] = {"layout": _name(study, layout)}
        for count in study.concurrency:
            fits = "" if _fits(study, layout, count) else " (too big)"
            row[f"{count} in flight"] = f"{60 / _find(runs, layout, reuse.name, count).per_chunk:.2f}{fits}"
        most = _find(runs, layout, reuse.name, max(study.concurrency))
        rows.append({**row, "first chunk of the most (s)": f"{most.first_chunk:.0f}"})
    return markdown_table(*columns(rows))


def _best(study: Study, reuses: Sequence[Reuse], runs: Sequence[Run]) -> str:
    rows: list[dict[str, Cell]] = []
    one, most = min(study.concurrency), max(study.concurrency)
    for reuse in reuses:
        single = min((r for r in runs if (r.reuse, r.videos) == (reuse.name, one)), key=lambda run: run.seconds)
        many = [r for r in runs if (r.reuse, r.videos) == (reuse.name, most) and _fits(study, r.layout, most)]
        best = min(many, key=lambda run: run.seconds, default=None)
        gang = min((r for r in many if study.gangs(r.layout) == 1), key=lambda run: run.seconds, default=None)
        rows.append(
            {
                "": reuse.name,
                "best for one video": _layout(single.layout),
                "s per chunk": f"{single.per_chunk:.1f}",
                "best for many": _name(study, best.layout) if best else "none fits",
                "chunks per minute": f"{60 / best.per_chunk:.2f}" if best else "",
                "best for many, one gang": f"{_layout(gang.layout)}: {60 / gang.per_chunk:.2f}"
                if gang
                else "none fits",
            }
        )
    return markdown_table(*columns(rows))


def _sensitivity(study: Study, reuses: Sequence[Reuse]) -> str:
    whole = tuple(layout for layout in study.layouts if study.gangs(layout) == 1)
    rows: list[list[Cell]] = []
    for doubling in _DOUBLINGS:
        hardware = replace(study.cluster.hardware, doubling=doubling)
        other = replace(study, cluster=replace(study.cluster, hardware=hardware), layouts=whole, concurrency=(1,))
        runs = run_study(other, reuses)
        for reuse in reuses:
            own = [_find(runs, layout, reuse.name, 1) for layout in whole]
            best = min(own, key=lambda run: run.seconds)
            cells = [f"**{run.per_chunk:.1f}**" if run is best else f"{run.per_chunk:.1f}" for run in own]
            rows.append([f"{doubling:.2f}", reuse.name, *cells])
    return markdown_table(("doubling", "", *map(_layout, whole)), rows)


def _cp_table(study: Study) -> str:
    cluster, rows = study.cluster, []
    for cp in sorted({layout.cp for layout in study.layouts}):
        spent = cluster.config.model_config.num_layers * cluster.exchange_seconds(cp)
        whole = cluster.pass_seconds / cluster.cp_speed(cp) + spent
        row: dict[str, Cell] = {
            "cp": cp,
            "MB sent per rank and layer": f"{cluster.exchange_bytes(cp) / 1e6:.1f}",
            "ms of exchange per pass": f"{1e3 * spent:.1f}",
            "s per pass": f"{whole:.2f}",
            "speed-up": f"{cluster.pass_seconds / whole:.2f}",
        }
        rows.append(row)
    return markdown_table(*columns(rows))


def _memory(study: Study) -> str:
    rows = []
    for layout in study.layouts:
        held = study.cluster.memory(layout)
        row: dict[str, Cell] = {"layout": _name(study, layout), "weights (GB)": f"{held.weights / 1e9:.1f}"}
        row["KV of a video (GB)"] = f"{held.kv / 1e9:.1f}"
        for count in study.concurrency:
            row[f"{count} in flight (GB)"] = f"{_bytes(study, layout, count) / 1e9:.1f}"
        rows.append(row)
    return markdown_table(*columns(rows))


def _bytes(study: Study, layout: Layout, videos: int) -> int:
    held, gangs = study.cluster.memory(layout), study.gangs(layout)
    return held.weights + -(-videos // gangs) * held.kv


def _fits(study: Study, layout: Layout, videos: int) -> bool:
    return _bytes(study, layout, videos) <= _SHARE * study.cluster.hardware.memory


def _find(runs: Sequence[Run], layout: Layout, reuse: str, videos: int) -> Run:
    return next(run for run in runs if (run.layout, run.reuse, run.videos) == (layout, reuse, videos))


def csv_rows(study: Study, runs: Sequence[Run]) -> tuple[Headers, Rows]:
    """All runs."""
    rows = []
    for run in runs:
        row: dict[str, Cell] = {"pp": run.layout.pp, "cp": run.layout.cp, "gangs": run.gangs}
        row |= {"reuse": run.reuse, "videos": run.videos, "seconds": run.seconds, "per_chunk_s": run.per_chunk}
        row |= {"first_chunk_s": run.first_chunk, "speedup": run.speed_up}
        row |= {"utilisation": " ".join(f"{share:.4f}" for share in run.utilisation)}
        rows.append({**row, "gb_per_rank": _bytes(study, run.layout, run.videos) / 1e9})
    return columns(rows)


def throughput_figure(study: Study, runs: Sequence[Run], title: str) -> Figure:
    """Chunks per minute over videos in flight; a panel for each kind of reuse, a line for each layout."""
    names = list(dict.fromkeys(run.reuse for run in runs))
    figure = Figure(figsize=(4.4 * len(names) + 0.6, 5.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for place, layout in enumerate(study.layouts):
            own = [run for run in runs if (run.layout, run.reuse) == (layout, name)]
            panel.plot(
                [run.videos for run in own],
                [60 / run.per_chunk for run in own],
                "-" if study.gangs(layout) == 1 else "--",
                marker="o",
                markersize=4,
                color=COLOURS[place % len(COLOURS)],
                label=_name(study, layout),
            )
        panel.set(title=name, xlabel="videos in flight")
        panel.set_xscale("log", base=2)
        panel.set_xticks(study.concurrency, [str(count) for count in study.concurrency])
        light_grid(panel)
    panels[0].set_ylabel("chunks per minute")
    panels[0].set_ylim(bottom=0)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure
