"""What the stages of a gang must do and should take, and whether they do.

Calls, bytes and flags of every rank come from the schedule and the decisions alone. Seconds are simulated from what the
passes of one process took. `--check` predicts two stages, runs them and compares: times of passes are taken in one
process for each stage at the same time, since cores that work side by side are slower than one that works alone. The
gang and the processes alternate, and medians count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.common import Row, Verdict, machine_line, median, publish
from benchmarks.runs import alone, on_ranks, reuse_for
from benchmarks.simulate.clock import Machine, Outcome, simulate
from benchmarks.simulate.plan import Seconds, VideoPlan, plan_video
from benchmarks.workload import Flags, Made, ModelSpec, TimedCall, Timing, Workload, model_config
from engine.reuse.flags import FlagLog
from engine.schedule import Schedule
from models.protocols import CELL_PIXELS, Pass
from parallel.comm.messages import HEADER_BYTES
from parallel.comm.ulysses import TokenSplit
from parallel.mesh import Layout, Mesh, stage_sizes

_FLOAT = 4  # bytes of a value
_LAYOUT, _PINGS, _OFF = Layout(pp=2), 50, 0.10


def plans_of(workload: Workload, seconds: Seconds, flags: Sequence[Flags]) -> list[VideoPlan]:
    """The plan of each video; without flags every step is computed."""
    schedule, whole = workload.schedule, workload.reuse.new_policy().scope == "window"
    tables = [np.array(flags[number], dtype=np.uint8) if flags else None for number in range(workload.videos)]
    return [plan_video(schedule, workload.sampling, seconds, one, whole_window=whole) for one in tables]


def predict(workload: Workload, timing: Timing, flags: Sequence[Flags], *, hop: float | None) -> Outcome:
    """What a pipeline will take, simulated from what passes took in one process; without flags all is computed.

    A hop is the seconds of a message. None counts passes alone: no messages, no work on the leader besides its layers.
    """
    by_step, mean = {(call.name, call.step): call.seconds for call in timing.calls}, timing.means

    def seconds(what: Pass, step: int | None) -> tuple[float, ...]:
        return by_step.get((what.name, step), mean)

    machine = Machine(stages=len(mean), barrier=workload.barrier)
    if hop is not None:
        machine = replace(machine, latency=hop, take=timing.rest)
    return simulate(plans_of(workload, seconds, flags), machine)


def take_timings(workloads: Sequence[Workload], split: Sequence[int]) -> tuple[list[Timing], list[Timing]]:
    """What passes take on each stage, for each workload: in one process, and the mean of one for each stage at once."""

    def timings(made: Sequence[Made]) -> list[Timing]:
        return [one.timing for one in made if one.timing is not None]

    (quiet,) = alone(workloads, split=split)
    copies = alone(workloads, split=split, copies=len(split))
    return timings(quiet), [_mean(same) for same in zip(*map(timings, copies), strict=True)]


def _mean(timings: Sequence[Timing]) -> Timing:
    """Of the same passes in several processes."""
    seconds = np.mean([[call.seconds for call in one.calls] for one in timings], axis=0).tolist()
    calls = [
        TimedCall(name=call.name, step=call.step, count=call.count, seconds=tuple(own))
        for call, own in zip(timings[0].calls, seconds, strict=True)
    ]
    embed, rest = np.mean([(one.embed, one.rest) for one in timings], axis=0).tolist()
    return Timing(calls=tuple(calls), embed=embed, rest=rest)


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
        rank = f"rank {counters['rank']}"
        wanted = _item_bytes(hidden, Mesh(layout=layout, rank=counters["rank"]), calls, returning)
        if counters["items"] != calls:
            found.append(f"{rank}: {counters['items']} calls, not {calls}")
        if counters["item_bytes"] != wanted:
            found.append(f"{rank}: {counters['item_bytes']} bytes received with items, not {wanted}")
        if counters["digests"] != digests:
            found.append(f"{rank}: other flags than those of one process")
    velocities = returning * (HEADER_BYTES + velocity) if layout.pp > 1 else 0
    if made.ranks[0]["velocity_bytes"] != velocities:
        found.append(f"rank 0: {made.ranks[0]['velocity_bytes']} bytes of velocities, not {velocities}")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One workload, predicted and measured in every repeat."""

    workload: Workload
    predicted: list[Outcome] = field(default_factory=list)
    measured: list[Made] = field(default_factory=list)

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians of what was predicted and of what was measured."""
        return median(one.seconds for one in self.predicted), median(one.seconds for one in self.measured)

    @property
    def off(self) -> float:
        """How far the prediction is from what was measured, as a share of that; less than zero is too fast."""
        predicted, measured = self.seconds
        return (predicted - measured) / measured

    @property
    def verdict(self) -> Verdict:
        """Within 10% or not."""
        name = f"pp {_LAYOUT.pp}, {self.workload.name}: predicted against measured"
        return Verdict(name, f"{self.off:+.1%}", f"within {_OFF:.0%}", abs(self.off) <= _OFF)

    @property
    def row(self) -> Row:
        """A line of the table; the stages' shares are those of the last repeat."""
        (predicted, measured), made = self.seconds, self.measured[-1]
        return {
            "videos": self.workload.name,
            "predicted (s)": f"{predicted:.2f}",
            "measured (s)": f"{measured:.2f}",
            "off": f"{self.off:+.1%}",
            "stages busy, predicted": " ".join(f"{share:.0%}" for share in self.predicted[-1].utilisation),
            "measured": " ".join(f"{rank['busy'] / made.seconds:.0%}" for rank in made.ranks),
        }

    @property
    def csv_row(self) -> Row:
        """A line of the CSV file."""
        predicted, measured = self.seconds
        return {"videos": self.workload.name, "predicted_s": predicted, "measured_s": measured, "off": self.off}


def check_stages(out: Path, *, quick: bool) -> int:
    """Predict, measure and compare; the exit status."""
    chunks, steps, repeats = (4, 8, 1) if quick else (8, 16, 3)
    plain = Workload(model=ModelSpec(), chunks=chunks, steps=steps)
    with Console(stderr=True).status("starting") as status:
        reused = replace(plain, reuse=reuse_for(plain, 0.55))
        workloads = (plain, replace(plain, barrier=True), reused, replace(reused, videos=2))
        compared, found = _compare(workloads, repeats, status.update)
    measured = found[0] if found else "as worked out"
    exact = Verdict("calls, bytes and flags of every rank, latents", measured, "as worked out", not found)
    return publish(
        out,
        "check",
        title="Simulated against measured",
        about=f"pp {_LAYOUT.pp}, {plain.size}. {machine_line()}; one thread per rank.",
        verdicts=[*(one.verdict for one in compared), exact],
        sections={"Times": [one.row for one in compared]},
        data=[one.csv_row for one in compared],
    )


def _compare(
    workloads: Sequence[Workload], repeats: int, log: Callable[[str], None]
) -> tuple[list[Compared], list[str]]:
    sizes = stage_sizes(model_config(workloads[0].model), _LAYOUT.pp)
    compared, found = [Compared(workload=one) for one in workloads], []
    for repeat in range(repeats):
        log(f"repeat {repeat + 1} of {repeats}")
        _, busy = take_timings(workloads, sizes)
        gang = on_ranks(_LAYOUT, workloads, pings=_PINGS)
        (single,) = alone(workloads)
        for one, timing, made, other in zip(compared, busy, gang, single, strict=True):
            one.predicted.append(predict(one.workload, timing, other.flags, hop=made.hop))
            one.measured.append(made)
            found += problems(_LAYOUT, one.workload, made, other)
    return compared, found
