"""Tables, figures and verdicts of the pipeline benchmark. It measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.common import (
    COLOURS,
    Cell,
    Headers,
    Rows,
    Verdict,
    columns,
    legend_below,
    markdown_table,
    median,
    new_plot,
)
from benchmarks.workload import Made, Workload
from parallel.topology.mesh import Layout

_PLAIN, _REUSED = 1.75, 1.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One workload on one layout, over all repeats."""

    layout: Layout  # of the gang
    workload: Workload
    seconds: tuple[float, ...]  # of each repeat
    alone: tuple[float, ...]  # of one process with the same videos, beside each
    first_chunk: float  # seconds until the first chunk, median
    utilisation: tuple[float, ...]  # of each stage, share of the time that its ranks are in their layers, mean
    other: float  # seconds that the leader was neither in its layers nor waiting, median
    sent: int  # bytes that all ranks have sent
    calls: int  # of each stage
    computed: float  # chunk-steps, as a share of all

    @property
    def speed_up(self) -> float:
        """Over one process: median over the repeats, each against the one beside it."""
        return median(self.speed_ups)

    @property
    def speed_ups(self) -> list[float]:
        """The same of each repeat."""
        return [alone / own for alone, own in zip(self.alone, self.seconds, strict=True)]

    @property
    def names(self) -> dict[str, Cell]:
        """What stands first in every table."""
        layout = f"pp {self.layout.pp}" + (f" x cp {self.layout.cp}" if self.layout.cp > 1 else "")
        return {"layout": layout, "videos": self.workload.videos, "computed": f"{self.computed:.2f}"}


def row_of(layout: Layout, workload: Workload, made: Sequence[Made], alone: Sequence[Made]) -> Row:
    """Put the repeats of a workload together.

    Args:
        layout: of the gang.
        workload: the videos.
        made: in each repeat.
        alone: the same videos, or more, by one process in each repeat.
    """
    shares = [
        statistics.fmean(rank["busy"] / one.seconds for one in made for rank in one.ranks if rank["stage"] == stage)
        for stage in range(layout.pp)
    ]
    flags = [flag for video in made[0].decisions for steps in video for flag in steps]
    return Row(
        layout=layout,
        workload=workload,
        seconds=tuple(one.seconds for one in made),
        alone=tuple(sum(one.videos[: workload.videos]) for one in alone),
        first_chunk=median(one.first_chunk for one in made),
        utilisation=tuple(shares),
        other=median(one.seconds - one.ranks[0]["busy"] - one.ranks[0]["waiting"] for one in made),
        sent=sum(rank["sent_bytes"] for rank in made[0].ranks),
        calls=made[0].ranks[0]["items"],
        computed=flags.count(0) / len(flags) if flags else 1.0,
    )


def rows_table(rows: Sequence[Row]) -> str:
    """The runs without a barrier, as Markdown."""
    cells = [
        row.names
        | {
            "s": f"{median(row.seconds):.2f}",
            "s of 1 process": f"{median(row.alone):.2f}",
            "speed-up": f"{row.speed_up:.2f}",
            "of each": " ".join(f"{one:.2f}" for one in row.speed_ups),
            "stages busy": " ".join(f"{share:.0%}" for share in row.utilisation),
            "leader else (s)": f"{row.other:.2f}",
        }
        for row in rows
        if not row.workload.barrier
    ]
    return markdown_table(*columns(cells))


def moved_table(rows: Sequence[Row]) -> str:
    """Calls and bytes, as Markdown."""
    cells = [
        row.names | {"calls of each stage": row.calls, "MB sent by all ranks": f"{row.sent / 1e6:.2f}"}
        for row in rows
        if not row.workload.barrier
    ]
    return markdown_table(*columns(cells))


def barrier_table(rows: Sequence[Row]) -> str:
    """What waiting for every tick costs, as Markdown; empty where nothing was made both ways."""
    free = {(row.layout, row.workload.videos, row.workload.reuses): row for row in rows if not row.workload.barrier}
    cells: list[dict[str, Cell]] = []
    for row in rows:
        other = free.get((row.layout, row.workload.videos, row.workload.reuses))
        if row.workload.barrier and other is not None:
            loss = 1 - median(a / b for a, b in zip(other.seconds, row.seconds, strict=True))
            speeds = {"speed-up": f"{other.speed_up:.2f}", "with a barrier": f"{row.speed_up:.2f}"}
            cells.append(row.names | speeds | {"lost": f"{loss:.0%}"})
    return markdown_table(*columns(cells)) if cells else ""


def verdicts(rows: Sequence[Row], problems: Sequence[str], checked: int) -> list[Verdict]:
    """What the project holds itself to.

    Args:
        rows: all runs.
        problems: what was not as it must be.
        checked: runs of gangs that were looked at.
    """
    found = []
    for videos, reuses, wanted in ((1, False, _PLAIN), (2, True, _REUSED)):
        for row in rows:
            own = row.workload
            if row.layout == Layout(pp=2) and (own.videos, own.reuses, own.barrier) == (videos, reuses, False):
                name = f"pp 2 over one process, {own.name}" + (f", {row.computed:.2f} computed" if reuses else "")
                fast = row.speed_up >= wanted
                found.append(Verdict(name, f"{row.speed_up:.2f}x", f">= {wanted:.2f}x", fast))
    name = "calls, bytes and flags of every rank, latents of every pipeline"
    measured = f"{checked} runs as worked out" if not problems else f"{len(problems)} differ: {problems[0]}"
    return [*found, Verdict(name, measured, "as worked out", not problems)]


def csv_rows(rows: Sequence[Row]) -> tuple[Headers, Rows]:
    """All runs."""
    lines: list[dict[str, Cell]] = []
    for row in rows:
        line: dict[str, Cell] = {"pp": row.layout.pp, "cp": row.layout.cp, "videos": row.workload.videos}
        line |= {"reuse": int(row.workload.reuses), "barrier": int(row.workload.barrier)}
        line |= {"seconds": median(row.seconds), "fastest": min(row.seconds), "slowest": max(row.seconds)}
        line |= {"alone_seconds": median(row.alone), "speedup": row.speed_up, "first_chunk_s": row.first_chunk}
        line |= {"utilisation": " ".join(f"{share:.4f}" for share in row.utilisation), "leader_other_s": row.other}
        lines.append(line | {"sent_mb": row.sent / 1e6, "stage_calls": row.calls, "computed": row.computed})
    return columns(lines)


def speed_figure(rows: Sequence[Row], title: str) -> Figure:
    """Speed-up over videos in flight, a line for each layout, full without reuse and dashed with it."""
    figure, axes = new_plot(title, "videos in flight", "speed-up over one process with the same videos (x)")
    groups: dict[tuple[Layout, bool, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layout, row.workload.reuses, row.workload.barrier), []).append(row)
    layouts = list(dict.fromkeys(row.layout for row in rows))
    for (layout, reuses, barrier), own in groups.items():
        label = f"{own[0].names['layout']}{', reuse' * reuses}{', barrier' * barrier}"
        xs, ys = [row.workload.videos for row in own], [row.speed_up for row in own]
        colour, marker = COLOURS[layouts.index(layout) % len(COLOURS)], "x" if barrier else "o"
        axes.plot(xs, ys, "" if barrier else "--" if reuses else "-", marker=marker, color=colour, label=label)
    for wanted in (_PLAIN, _REUSED):
        axes.axhline(wanted, color="#888888", linewidth=1, linestyle=":")
    axes.set_xticks(sorted({row.workload.videos for row in rows}))
    axes.set_ylim(bottom=0)
    legend_below(figure, axes, 3)
    return figure
