"""How much faster are pipeline stages than one process? Measured on the ranks of this machine.

    python -m benchmarks.pipeline --out results/pipeline            # as many ranks as there are cores
    python -m benchmarks.pipeline --quick --out /tmp/pipeline       # small videos, no speed to speak of
    python -m benchmarks.pipeline --model magi-pocket --side 64

The same videos are made by one process (the base), by a gang of one rank (what the loop costs), and by gangs of several
ranks; with and without reuse, one or more videos in flight, with a barrier for comparison. One process and gangs
alternate in every repeat, and each rank has one thread. Seconds are of denoising, from the submission of the first
video to its last chunk: starting, loading and a video that warms up are not counted, and nothing is decoded.

The default model has random weights and a size at which a call of one of two stages takes some tens of milliseconds.
Exit status 0 if two stages are as much faster as they should be and every rank did exactly the work that it had to, 1
if not, 2 for bad input.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import common
from benchmarks.common import COLOURS, Out, Row, Verdict, median
from benchmarks.runs import alone, on_ranks, reuse_for
from benchmarks.simulate.stages import predict, problems, take_timings
from benchmarks.workload import (
    Chunks,
    Fraction,
    Layers,
    Made,
    Model,
    ModelSpec,
    Side,
    Steps,
    Timing,
    Width,
    Workload,
    model_config,
)
from parallel.mesh import Layout, stage_sizes

_LAYOUTS = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4))
_PINGS = 30
_PLAIN, _REUSED = 1.75, 1.7  # speed-ups of two stages that are wanted, of one video and of two that reuse
_NOTES = """\
- s: seconds of denoising, from the submission of the first video to its last chunk, median; starting, loading and
  warming up apart. s of 1 process: the same videos one after another in one process, one thread. speed-up: median of
  the repeats, each against the process that ran in the same repeat; of each: those.
- computed: chunk-steps that are computed, as a share of all. Without reuse there are a clean pass for each chunk and a
  context-free copy of the cleanest one besides; with reuse there are neither, on one process as on a gang.
- stages busy: share of the time in the layers. leader else: seconds that the leader is neither there nor waiting."""
_PROFILE = """\
Simulated from what calls take in one process on a quiet machine; in two processes that do the same at once; with
messages and the leader's own work besides; and what was measured. Speed-ups are over one process on a quiet machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """One workload on one layout, and the same videos, or more, by one process in the same repeat."""

    layout: Layout
    workload: Workload
    made: list[Made] = field(default_factory=list)  # in each repeat
    beside: list[Made] = field(default_factory=list)  # in each repeat, by one process

    @property
    def seconds(self) -> list[float]:
        """Of each repeat."""
        return [one.seconds for one in self.made]

    @property
    def alone(self) -> list[float]:
        """Seconds of one process with the same videos, beside each."""
        return [sum(one.videos[: self.workload.videos]) for one in self.beside]

    @property
    def speed_ups(self) -> list[float]:
        """Over one process, of each repeat."""
        return [alone / own for alone, own in zip(self.alone, self.seconds, strict=True)]

    @property
    def speed_up(self) -> float:
        """The median of them."""
        return median(self.speed_ups)

    @property
    def utilisation(self) -> list[float]:
        """Share of the time that a stage's ranks are in their layers, mean, of each stage."""
        shares = [(rank["stage"], rank["busy"] / one.seconds) for one in self.made for rank in one.ranks]
        return [statistics.fmean(share for at, share in shares if at == stage) for stage in range(self.layout.pp)]

    @property
    def other(self) -> float:
        """Seconds that the leader was neither in its layers nor waiting, median."""
        return median(one.seconds - one.ranks[0]["busy"] - one.ranks[0]["waiting"] for one in self.made)

    @property
    def sent(self) -> float:
        """Megabytes that all ranks have sent."""
        return sum(rank["sent_bytes"] for rank in self.made[0].ranks) / 1e6

    @property
    def calls(self) -> int:
        """Of each stage."""
        return int(self.made[0].ranks[0]["items"])

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Videos, with reuse, with a barrier."""
        return self.workload.videos, self.workload.reuses, self.workload.barrier

    @property
    def names(self) -> Row:
        """What stands first in every table."""
        layout = f"pp {self.layout.pp}" + (f" x cp {self.layout.cp}" if self.layout.cp > 1 else "")
        return {"layout": layout, "videos": self.workload.videos, "computed": f"{self.made[0].computed:.2f}"}

    def problems(self) -> list[str]:
        """What is not as it must be, over all repeats."""
        where = f"pp {self.layout.pp}, cp {self.layout.cp}, {self.workload.name}: "
        pairs = zip(self.made, self.beside, strict=True)
        return [where + what for one, other in pairs for what in problems(self.layout, self.workload, one, other)]


def run(
    model: Model = "random",
    layers: Layers = 8,
    width: Width = 384,
    side: Side = 64,
    chunks: Chunks = 10,
    steps: Steps = 16,
    videos: Annotated[int, typer.Option(min=1, help="Most videos in flight.")] = 4,
    ranks: Annotated[int | None, typer.Option(min=1, help="Most ranks; as many as cores by default.")] = None,
    fraction: Fraction = 0.55,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    profile: Annotated[bool, typer.Option(help="Say where the time of two stages goes.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of small videos.")] = False,
    out: Out = Path("results/pipeline"),
) -> int:
    """Measure gangs against one process."""
    if quick:
        chunks, steps, videos, repeats = min(chunks, 4), min(steps, 8), min(videos, 2), 1
    spec = ModelSpec(name=model, layers=layers, width=width, side=side)
    plain = Workload(model=spec, chunks=chunks, steps=steps, videos=videos)
    layouts = layouts_for(plain, ranks or _cores())
    common.output_folder(out)
    with Console(stderr=True).status("starting") as status:
        kinds = (plain, replace(plain, reuse=reuse_for(plain, fraction)))
        gangs = _measure(kinds, layouts, repeats, status.update)
        parts = _profiles(gangs, status.update) if profile else []
    title, found = f"{plain.size}, {repeats} repeats", [what for one in gangs for what in one.problems()]
    free = [one for one in gangs if not one.workload.barrier]
    return common.publish(
        out,
        "pipeline",
        title="Pipeline stages against one process",
        about=f"{title}. {common.machine_line()}; one thread per rank.\n\n{_NOTES}",
        verdicts=verdicts(gangs, found),
        sections={
            "Speed": [speed_row(one) for one in free],
            "A barrier per tick": barrier_rows(gangs),
            "Calls and bytes": [
                one.names | {"calls of each stage": one.calls, "MB sent by all ranks": f"{one.sent:.2f}"}
                for one in free
            ],
            "Where the time of two stages goes": "\n\n".join(parts),
            "What differs": "\n".join(f"- {one}" for one in found),
        },
        data=[csv_row(one) for one in gangs],
        figures={"pipeline": speed_figure(gangs, f"Speed-up of ranks over one process\n{title}")},
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def layouts_for(workload: Workload, ranks: int) -> list[Layout]:
    """One rank, and the gangs that the model and a number of ranks allow; an `InputError` if the videos cannot be."""
    model, _ = model_config(workload.model).model_config, workload.sampling  # which checks the steps
    fits = [
        Layout(pp=pp, cp=cp)
        for pp, cp in _LAYOUTS
        if pp * cp <= ranks and pp <= model.num_layers and model.num_query_groups % cp == 0
    ]
    return [Layout(), *fits]


def _workloads(layout: Layout, kinds: Sequence[Workload]) -> list[Workload]:
    """All numbers of videos on a pipeline, one or two elsewhere; on a pipeline some with a barrier."""
    videos = kinds[0].videos
    most = videos if layout.pp > 1 and layout.cp == 1 else min(videos, 2)
    found = [replace(kind, videos=count) for kind in kinds for count in range(1, most + 1)]
    if layout.pp > 1:
        found += [replace(kind, videos=count, barrier=True) for count, kind in enumerate(kinds, 1)]
    return [one for one in found if one.videos <= videos]


def _measure(
    kinds: Sequence[Workload], layouts: Sequence[Layout], repeats: int, log: Callable[[str], None]
) -> list[Gang]:
    gangs = {layout: [Gang(layout=layout, workload=one) for one in _workloads(layout, kinds)] for layout in layouts}
    for repeat in range(repeats):
        where = f"repeat {repeat + 1} of {repeats}: "
        log(where + "one process")
        ((plain, reused),) = alone(kinds)
        for layout in layouts if repeat % 2 == 0 else layouts[::-1]:
            log(f"{where}pp {layout.pp}, cp {layout.cp}")
            own = gangs[layout]
            for one, made in zip(own, on_ranks(layout, [one.workload for one in own], pings=_PINGS), strict=True):
                one.made.append(made)
                one.beside.append(reused if one.workload.reuses else plain)
    return [one for own in gangs.values() for one in own]


def _profiles(gangs: Sequence[Gang], log: Callable[[str], None]) -> list[str]:
    """Where the time of two stages goes: of one video without reuse, and of two with it."""
    own = [one for one in gangs if one.layout == Layout(pp=2) and one.kind in ((1, False, False), (2, True, False))]
    if not own:
        return []
    log("where the time goes")
    workloads = [one.workload for one in own]
    quiet, busy = take_timings(workloads, stage_sizes(model_config(workloads[0].model), 2))
    parts = [_PROFILE]
    for one, alone_timing, busy_timing in zip(own, quiet, busy, strict=True):
        rest = (
            f"{1e3 * alone_timing.rest:.2f} ms per call outside of calls in one process, "
            f"{1e3 * alone_timing.embed:.2f} ms for a patch embedding."
        )
        rows = profile_rows(one, alone_timing, busy_timing)
        parts.append(f"### pp 2, {one.workload.name}\n\n{common.table(rows)}\n\n{rest}")
    return [*parts, f"A message from one rank to the other takes {1e3 * own[0].made[0].hop:.2f} ms."]


def profile_rows(gang: Gang, quiet: Timing, busy: Timing) -> list[Row]:
    """From what passes allow, one cost after the other, to what was measured in the repeat of the median.

    What is left between the last prediction and the measurement is what ranks cost each other besides: threads that
    want the interpreter, and processes that the system moves about. Times of the passes were taken in one process with
    nothing else to do, and with all cores busy.
    """
    middle = sorted(range(len(gang.made)), key=gang.seconds.__getitem__)[len(gang.made) // 2]
    made, base, flags = gang.made[middle], gang.alone[middle], gang.beside[middle].flags

    def row(name: str, seconds: float, shares: Sequence[float], calls: Sequence[float]) -> Row:
        return {
            "": name,
            "s": f"{seconds:.2f}",
            "speed-up": f"{base / seconds:.2f}",
            "stages busy": " ".join(f"{share:.0%}" for share in shares),
            "ms of a call, by stage": " ".join(f"{1e3 * one:.2f}" for one in calls),
        }

    rows = []
    for name, timing, hop in (
        ("calls alone", quiet, None),
        ("calls with all cores busy", busy, None),
        ("and messages, and the leader's own work", busy, made.hop),
    ):
        outcome = predict(gang.workload, timing, flags[: gang.workload.videos], hop=hop)
        rows.append(row(name, outcome.seconds, outcome.utilisation, timing.means))
    ranks = [one for one in made.ranks if one["cp_rank"] == 0]
    shares, calls = [one["busy"] / made.seconds for one in ranks], [one["busy"] / one["items"] for one in ranks]
    return [*rows, row("measured", made.seconds, shares, calls)]


def speed_row(gang: Gang) -> Row:
    """A gang without a barrier as a line of the table."""
    return gang.names | {
        "s": f"{median(gang.seconds):.2f}",
        "s of 1 process": f"{median(gang.alone):.2f}",
        "speed-up": f"{gang.speed_up:.2f}",
        "of each": " ".join(f"{one:.2f}" for one in gang.speed_ups),
        "stages busy": " ".join(f"{share:.0%}" for share in gang.utilisation),
        "leader else (s)": f"{gang.other:.2f}",
    }


def barrier_rows(gangs: Sequence[Gang]) -> list[Row]:
    """What waiting for every tick costs, where something was made both ways."""
    free = {(one.layout, one.kind): one for one in gangs}
    rows = []
    for one in gangs:
        other = free.get((one.layout, (*one.kind[:2], False)))
        if one.workload.barrier and other is not None:
            loss = 1 - median(a / b for a, b in zip(other.seconds, one.seconds, strict=True))
            speeds = {"speed-up": f"{other.speed_up:.2f}", "with a barrier": f"{one.speed_up:.2f}"}
            rows.append(one.names | speeds | {"lost": f"{loss:.0%}"})
    return rows


def verdicts(gangs: Sequence[Gang], found: Sequence[str]) -> list[Verdict]:
    """What the project holds itself to; `found` is what was not as it must be."""
    held = []
    for kind, wanted in (((1, False, False), _PLAIN), ((2, True, False), _REUSED)):
        for one in gangs:
            if one.layout == Layout(pp=2) and one.kind == kind:
                name = f"pp 2 over one process, {one.workload.name}"
                name += f", {one.made[0].computed:.2f} computed" if one.workload.reuses else ""
                held.append(Verdict(name, f"{one.speed_up:.2f}x", f">= {wanted:.2f}x", one.speed_up >= wanted))
    runs = sum(len(one.made) for one in gangs)
    measured = f"{len(found)} differ: {found[0]}" if found else f"{runs} runs as worked out"
    name = "calls, bytes and flags of every rank, latents of every pipeline"
    return [*held, Verdict(name, measured, "as worked out", not found)]


def csv_row(gang: Gang) -> Row:
    """A line of the CSV file."""
    row: Row = {"pp": gang.layout.pp, "cp": gang.layout.cp, "videos": gang.workload.videos}
    row |= {"reuse": int(gang.workload.reuses), "barrier": int(gang.workload.barrier)}
    row |= {"seconds": median(gang.seconds), "fastest": min(gang.seconds), "slowest": max(gang.seconds)}
    row |= {"alone_seconds": median(gang.alone), "speedup": gang.speed_up}
    row |= {"first_chunk_s": median(one.first_chunk for one in gang.made)}
    row |= {"utilisation": " ".join(f"{share:.4f}" for share in gang.utilisation), "leader_other_s": gang.other}
    return row | {"sent_mb": gang.sent, "stage_calls": gang.calls, "computed": gang.made[0].computed}


def speed_figure(gangs: Sequence[Gang], title: str) -> Figure:
    """Speed-up over videos in flight, a line for each layout, full without reuse and dashed with it."""
    figure, axes = common.new_plot(title, "videos in flight", "speed-up over one process with the same videos (x)")
    groups: dict[tuple[Layout, bool, bool], list[Gang]] = {}
    for one in gangs:
        groups.setdefault((one.layout, *one.kind[1:]), []).append(one)
    layouts = list(dict.fromkeys(one.layout for one in gangs))
    for (layout, reuses, barrier), own in groups.items():
        label = f"{own[0].names['layout']}{', reuse' * reuses}{', barrier' * barrier}"
        xs, ys = [one.workload.videos for one in own], [one.speed_up for one in own]
        colour, marker = COLOURS[layouts.index(layout) % len(COLOURS)], "x" if barrier else "o"
        axes.plot(xs, ys, "" if barrier else "--" if reuses else "-", marker=marker, color=colour, label=label)
    for wanted in (_PLAIN, _REUSED):
        axes.axhline(wanted, color="#888888", linewidth=1, linestyle=":")
    axes.set_xticks(sorted({one.workload.videos for one in gangs}))
    axes.set_ylim(bottom=0)
    common.legend_below(figure, axes, 3)
    return figure


if __name__ == "__main__":
    sys.exit(common.run_command(run, "pipeline"))
