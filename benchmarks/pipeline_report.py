"""Tables, figures and verdicts of the pipeline benchmark. It measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.pipeline_job import Case, ChunkResult
from benchmarks.report import Cell, csv_text, markdown_table
from benchmarks.verdict import Verdict
from parallel.topology.mesh import Layout

_PLAIN, _REUSED = 1.75, 1.7
CSV = (
    "pp",
    "cp",
    "videos",
    "reuse",
    "barrier",
    "seconds",
    "fastest",
    "slowest",
    "alone_seconds",
    "speedup",
    "first_chunk_s",
    "utilisation",
    "head_other_s",
    "sent_mb",
    "stage_calls",
    "computed",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case on one layout, over all repeats."""

    layout: Layout  # of the gang
    case: Case
    seconds: tuple[float, ...]  # of each repeat
    alone: tuple[float, ...]  # of one process with the same videos, beside each
    first_chunk: float  # seconds until the first chunk, median
    utilisation: tuple[float, ...]  # of each stage, share of the time that its ranks are in their layers, mean
    other: float  # seconds that the lead was neither in its layers nor waiting, median
    sent: int  # bytes that all ranks have sent
    calls: int  # of each stage
    computed: float  # chunk-steps, as a share of all

    @property
    def speed_up(self) -> float:
        """Over one process: median over the repeats, each against the one beside it."""
        return statistics.median(alone / own for alone, own in zip(self.alone, self.seconds, strict=True))

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def row_of(layout: Layout, case: Case, made: Sequence[ChunkResult], alone: Sequence[float]) -> Row:
    """Put the repeats of a case together.

    Args:
        layout: of the gang.
        case: the videos.
        made: in each repeat.
        alone: seconds of one process in each repeat.
    """
    stages = []
    for stage in range(layout.pp):
        shares = [report["busy"] / one.seconds for one in made for report in one.ranks if report["stage"] == stage]
        stages.append(statistics.fmean(shares))
    flags = [flag for video in made[0].decisions for steps in video for flag in steps]
    return Row(
        layout=layout,
        case=case,
        seconds=tuple(one.seconds for one in made),
        alone=tuple(alone),
        first_chunk=statistics.median(one.first_chunk for one in made),
        utilisation=tuple(stages),
        other=statistics.median(one.seconds - one.ranks[0]["busy"] - one.ranks[0]["waiting"] for one in made),
        sent=sum(report["sent_bytes"] for report in made[0].ranks),
        calls=made[0].ranks[0]["items"],
        computed=flags.count(0) / len(flags) if flags else 1.0,
    )


def _layout(layout: Layout) -> str:
    return f"pp {layout.pp}" + (f" x cp {layout.cp}" if layout.cp > 1 else "")


def rows_table(rows: Sequence[Row]) -> str:
    """The cases without a barrier, as Markdown."""
    headers = (
        "layout",
        "videos",
        "computed",
        "s",
        "s of 1 process",
        "speed-up",
        "of each",
        "stages busy",
        "lead else (s)",
    )
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        if row.case.barrier:
            continue
        each = " ".join(f"{a / b:.2f}" for a, b in zip(row.alone, row.seconds, strict=True))
        busy = " ".join(f"{share:.0%}" for share in row.utilisation)
        cells.append(
            (
                _layout(row.layout),
                row.case.videos,
                f"{row.computed:.2f}",
                f"{row.median:.2f}",
                f"{statistics.median(row.alone):.2f}",
                f"{row.speed_up:.2f}",
                each,
                busy,
                f"{row.other:.2f}",
            )
        )
    return markdown_table(headers, cells)


def moved_table(rows: Iterable[Row]) -> str:
    """Calls and bytes, as Markdown."""
    cells = [
        (_layout(row.layout), row.case.videos, f"{row.computed:.2f}", row.calls, f"{row.sent / 1e6:.2f}")
        for row in rows
        if not row.case.barrier
    ]
    return markdown_table(("layout", "videos", "computed", "calls of each stage", "MB sent by all ranks"), cells)


def barrier_table(rows: Sequence[Row]) -> str:
    """What waiting for every tick costs, as Markdown; empty where nothing was made both ways."""
    free = {(row.layout, row.case.videos, row.case.reuses): row for row in rows if not row.case.barrier}
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        other = free.get((row.layout, row.case.videos, row.case.reuses))
        if not row.case.barrier or other is None:
            continue
        loss = 1 - statistics.median(a / b for a, b in zip(other.seconds, row.seconds, strict=True))
        speeds = f"{other.speed_up:.2f}", f"{row.speed_up:.2f}"
        cells.append((_layout(row.layout), row.case.videos, f"{row.computed:.2f}", *speeds, f"{loss:.0%}"))
    if not cells:
        return ""
    return markdown_table(("layout", "videos", "computed", "speed-up", "with a barrier", "lost"), cells)


def verdicts(rows: Sequence[Row], problems: Sequence[str], checked: int) -> list[Verdict]:
    """What the project holds itself to.

    Args:
        rows: all cases.
        problems: what was not as it must be.
        checked: gang runs that were looked at.
    """
    found = []
    for videos, reuses, wanted in ((1, False, _PLAIN), (2, True, _REUSED)):
        for row in rows:
            case = row.case
            if row.layout == Layout(pp=2) and (case.videos, case.reuses, case.barrier) == (videos, reuses, False):
                name = f"pp 2 over one process, {videos} video{'s' * (videos > 1)}, "
                found.append(
                    Verdict(
                        name=name + (f"reuse, {row.computed:.2f} computed" if reuses else "no reuse"),
                        measured=f"{row.speed_up:.2f}x",
                        wanted=f">= {wanted:.2f}x",
                        passed=row.speed_up >= wanted,
                    )
                )
    name = "calls, bytes and flags of every rank, latents of every pipeline"
    measured = f"{checked} runs as worked out" if not problems else f"{len(problems)} differ: {problems[0]}"
    return [*found, Verdict(name=name, measured=measured, wanted="as worked out", passed=not problems)]


def csv(rows: Iterable[Row]) -> str:
    """All cases."""
    lines: list[tuple[Cell, ...]] = []
    for row in rows:
        busy = " ".join(f"{share:.4f}" for share in row.utilisation)
        lines.append(
            (
                row.layout.pp,
                row.layout.cp,
                row.case.videos,
                int(row.case.reuses),
                int(row.case.barrier),
                row.median,
                min(row.seconds),
                max(row.seconds),
                statistics.median(row.alone),
                row.speed_up,
                row.first_chunk,
                busy,
                row.other,
                row.sent / 1e6,
                row.calls,
                row.computed,
            )
        )
    return csv_text(CSV, lines)


def speed_figure(rows: Sequence[Row], title: str) -> Figure:
    """Speed-up over videos in flight, a line for each layout, full without reuse and dashed with it."""
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#27548a", "#d55e00", "#009e73", "#cc79a7", "#f3b23f", "#444444", "#56b4e9", "#8c564b")
    layouts = list(dict.fromkeys(row.layout for row in rows))
    for colour, layout in zip(colours * len(layouts), layouts, strict=False):
        for reuses, style in ((False, "-"), (True, "--")):
            for barrier, marker in ((False, "o"), (True, "x")):
                own = [r for r in rows if r.layout == layout and (r.case.reuses, r.case.barrier) == (reuses, barrier)]
                if not own:
                    continue
                label = _layout(layout) + (", reuse" if reuses else "") + (", barrier" if barrier else "")
                xs, ys = [row.case.videos for row in own], [row.speed_up for row in own]
                axes.plot(xs, ys, "" if barrier else style, marker=marker, color=colour, label=label)
    for wanted in (_PLAIN, _REUSED):
        axes.axhline(wanted, color="#888888", linewidth=1, linestyle=":")
    axes.set(title=title, xlabel="videos in flight", ylabel="speed-up over one process with the same videos (x)")
    axes.set_xticks(sorted({row.case.videos for row in rows}))
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if rows:
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure
