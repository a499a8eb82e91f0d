"""How much faster are pipeline stages than one process? Measured on the ranks of this machine.

    python -m benchmarks.pipeline --out results/pipeline            # as many ranks as there are cores
    python -m benchmarks.pipeline --quick --out /tmp/pipeline       # small videos, no speed to speak of
    python -m benchmarks.pipeline --model magi-pocket

The same videos are made by one process (the base), by a gang of one rank (what the loop costs), and by gangs of several
ranks; with and without reuse, one or more videos in flight, with a barrier for comparison. One process and gangs
alternate in every repeat, and each rank has one thread. Seconds are of denoising, from the submission of the first
video to its last chunk: starting, loading and a video that warms up are not counted, and nothing is decoded.

The default model has random weights and a size at which a call of one of two stages takes some tens of milliseconds.
Calls, bytes and flags of every rank are compared with those that the schedule and the decisions ask for. Exit status 0
if two stages are as much faster as they should be and every rank did exactly the work that it had to, 1 if not, 2 for
bad input.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import common
from benchmarks.common import Out, Row, Verdict, median
from benchmarks.runs import alone, on_ranks, reuse_for
from benchmarks.simulate.clock import plans_of
from benchmarks.workload import POCKET, QUICK, Chunks, Flags, Made, ModelSpec, Steps, Workload, model_config
from engine.reuse.flags import FlagLog
from engine.schedule import Schedule
from models.magi.config import MagiConfig
from models.protocols import CELL_PIXELS
from parallel.comm.messages import HEADER_BYTES
from parallel.comm.ulysses import TokenSplit
from parallel.mesh import Layout, Mesh

_POWERS = (1, 2, 4, 8, 16, 32, 64)
_PLAIN, _REUSED = 1.75, 1.7  # speed-ups of two stages that are wanted, of one video and of two that reuse
_FLOAT = 4  # bytes of a value
_NOTES = """\
- seconds: of denoising, from the submission of the first video to its last chunk, median; starting, loading and
  warming up apart. alone: the same videos one after another in one process, one thread. speed-up: median of the
  repeats, each against the process that ran in the same repeat; of each: those.
- computed: chunk-steps that are computed, as a share of all. Without reuse there are a clean pass for each chunk and a
  context-free copy of the cleanest one besides; with reuse there are neither, on one process as on a gang.
- stages busy: share of the time in the layers. leader else: seconds that the leader is neither there nor waiting.
- calls: of each stage. sent: megabytes, by all ranks."""


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
        shares = [(rank.stage, rank.busy / one.seconds) for one in self.made for rank in one.ranks]
        return [statistics.fmean(share for at, share in shares if at == stage) for stage in range(self.layout.pp)]

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Videos, with reuse, with a barrier."""
        return self.workload.videos, self.workload.reuses, self.workload.barrier

    @property
    def name(self) -> str:
        """The layout in words."""
        return f"pp {self.layout.pp}" + (f" x cp {self.layout.cp}" if self.layout.cp > 1 else "")

    @property
    def row(self) -> Row:
        """A line of the table."""
        first, other = self.made[0], [one.seconds - one.ranks[0].busy - one.ranks[0].waiting for one in self.made]
        row: Row = {"layout": self.name, "videos": self.workload.videos, "computed": f"{first.computed:.2f}"}
        row |= {"barrier": self.workload.barrier, "seconds": f"{median(self.seconds):.2f}"}
        row |= {"alone": f"{median(self.alone):.2f}", "speed-up": f"{self.speed_up:.2f}"}
        row |= {"of_each": " ".join(f"{one:.2f}" for one in self.speed_ups)}
        row |= {"stages_busy": " ".join(f"{share:.0%}" for share in self.utilisation)}
        row |= {"leader_else": f"{median(other):.2f}", "calls": first.ranks[0].items}
        return row | {"sent": f"{sum(rank.sent_bytes for rank in first.ranks) / 1e6:.2f}"}

    def problems(self) -> list[str]:
        """What is not as it must be, over all repeats."""
        where = f"{self.name}, {self.workload.name}: "
        pairs = zip(self.made, self.beside, strict=True)
        return [where + what for one, other in pairs for what in problems(self.layout, self.workload, one, other)]


def run(
    model: Annotated[str, typer.Option(help="random or magi-pocket.")] = "random",
    chunks: Chunks = 10,
    steps: Steps = 16,
    videos: Annotated[int, typer.Option(min=1, help="Most videos in flight.")] = 4,
    ranks: Annotated[int | None, typer.Option(min=1, help="Most ranks; as many as cores by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of small videos.")] = False,
    out: Out = Path("results/pipeline"),
) -> int:
    """Measure gangs against one process."""
    spec = ModelSpec(name=model)
    if quick:
        chunks, steps, videos, repeats = min(chunks, 4), min(steps, 8), min(videos, 2), 1
        spec = spec if model == POCKET else replace(QUICK, name=model)
    plain = Workload(model=spec, chunks=chunks, steps=steps, videos=videos)
    layouts, _ = layouts_for(model_config(spec), ranks or common.cores()), plain.sampling  # which checks the steps
    common.output_folder(out)
    with Console(stderr=True).status("starting") as status:
        kinds = (plain, replace(plain, reuse=reuse_for(spec)))
        gangs = _measure(kinds, layouts, repeats, status.update)
    title, found = f"{plain.size}, {repeats} repeats", [what for one in gangs for what in one.problems()]
    return common.publish(
        out,
        "pipeline",
        title="Pipeline stages against one process",
        about=f"{title}. {common.machine_line()}; one thread per rank.\n\n{_NOTES}",
        verdicts=verdicts(gangs, found),
        sections={
            "Speed": [one.row for one in gangs],
            "A barrier per tick": barrier_rows(gangs),
            "What differs": common.bullets(found),
        },
    )


def layouts_for(config: MagiConfig, ranks: int) -> list[Layout]:
    """Powers of two that a model and a number of ranks allow."""
    model = config.model_config
    return [
        Layout(pp=pp, cp=cp)
        for pp in _POWERS
        for cp in _POWERS
        if pp * cp <= ranks and pp <= model.num_layers and not model.num_query_groups % cp
    ]


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
        plain, reused = alone(kinds)
        for layout in layouts if repeat % 2 == 0 else layouts[::-1]:
            log(f"{where}pp {layout.pp}, cp {layout.cp}")
            own = gangs[layout]
            for one, made in zip(own, on_ranks(layout, [one.workload for one in own]), strict=True):
                one.made.append(made)
                one.beside.append(reused if one.workload.reuses else plain)
    return [one for own in gangs.values() for one in own]


def barrier_rows(gangs: Sequence[Gang]) -> list[Row]:
    """What waiting for every tick costs, where something was made both ways."""
    free = {(one.layout, one.kind): one for one in gangs}
    rows = list[Row]()
    for one in gangs:
        other = free.get((one.layout, (*one.kind[:2], False)))
        if one.workload.barrier and other is not None:
            loss = 1 - median(a / b for a, b in zip(other.seconds, one.seconds, strict=True))
            row: Row = {"layout": one.name, "videos": one.workload.videos, "reuse": one.workload.reuses}
            row |= {"speed-up": f"{other.speed_up:.2f}", "with_a_barrier": f"{one.speed_up:.2f}"}
            rows.append(row | {"lost": f"{loss:.0%}"})
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


def flag_digest(schedule: Schedule, flags: Flags | None) -> str:
    """What every rank's log of flags must end with, as hexadecimal."""
    log = FlagLog(schedule)
    log.add(flags[tick.index][chunk] if flags else 0 for tick in schedule for chunk, _ in tick.active)
    return log.digest.hex()


def problems(layout: Layout, workload: Workload, made: Made, alone: Made) -> list[str]:
    """What is not as it must be of a gang's videos: calls and bytes of every rank, flags, and latents.

    One process has made the same videos, or more.
    """
    flags = alone.flags[: workload.videos]
    plans = plans_of(workload, lambda what, step: (1.0,), flags)
    calls, returning = sum(plan.calls for plan in plans), sum(plan.returning for plan in plans)
    given = flags or [None] * workload.videos
    digests = {str(number): flag_digest(workload.schedule, one) for number, one in enumerate(given)}
    hidden, velocity = _chunk_bytes(workload, layout)
    found = []
    for counters in made.ranks:
        rank = f"rank {counters.rank}"
        wanted = _item_bytes(hidden, Mesh(layout=layout, rank=counters.rank), calls, returning)
        if counters.items != calls:
            found.append(f"{rank}: {counters.items} calls, not {calls}")
        if counters.item_bytes != wanted:
            found.append(f"{rank}: {counters.item_bytes} bytes received with items, not {wanted}")
        if counters.digests != digests:
            found.append(f"{rank}: other flags than those of one process")
    velocities = returning * (HEADER_BYTES + velocity) if layout.pp > 1 else 0
    if made.ranks[0].velocity_bytes != velocities:
        found.append(f"rank 0: {made.ranks[0].velocity_bytes} bytes of velocities, not {velocities}")
    if layout.cp == 1 and made.latents != alone.latents[: workload.videos]:
        found.append("latents are not those of one process")
    return found


def _chunk_bytes(workload: Workload, layout: Layout) -> tuple[list[int], int]:
    """Bytes of a chunk's hidden states on each cp_rank of a stage, and of its velocity."""
    config, cells = model_config(workload.model), (workload.model.side // CELL_PIXELS) ** 2
    frames, model = config.runtime_config.chunk_width, config.model_config
    split = TokenSplit(frames * cells // model.patch_size**2, layout.cp)
    return [count * model.hidden_size * _FLOAT for count in split.counts], frames * cells * model.in_channels * _FLOAT


def _item_bytes(hidden: Sequence[int], mesh: Mesh, calls: int, returning: int) -> int:
    """Bytes that a rank receives with items: its tokens, and on the tail those of its stage for reading out."""
    received = 0 if mesh.leads else calls * (HEADER_BYTES + hidden[mesh.cp_rank])
    if mesh.stage == mesh.last_stage and mesh.cp_rank == 0:
        received += returning * sum(HEADER_BYTES + size for size in hidden[1:])
    return received


if __name__ == "__main__":
    sys.exit(common.run_command(run, "pipeline"))
