"""Is the simulation right? Predicts two stages from what one process takes, runs them, and compares.

Times of passes are taken in one process for each stage at the same time, since cores that work side by side are slower
than one that works alone. The gang and the processes alternate, and medians count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import typer
from rich.console import Console

from benchmarks.common import Cell, Verdict, columns, machine_line, markdown_table, median, publish
from benchmarks.models import ModelSpec, model_config
from benchmarks.pipeline.plan import predict, problems, take_timings
from benchmarks.runs import alone, on_ranks, reuse_for
from benchmarks.simulate.clock import Outcome
from benchmarks.workload import Made, Workload
from parallel.health.errors import GangError
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes

_LAYOUT, _PINGS, _OFF = Layout(pp=2), 50, 0.10


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
    def row(self) -> dict[str, Cell]:
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


def check_stages(out: Path, *, quick: bool) -> int:
    """Predict, measure and compare.

    Returns:
        The exit status.
    """
    chunks, steps, repeats = (4, 8, 1) if quick else (8, 16, 3)
    plain = Workload(model=ModelSpec(), chunks=chunks, steps=steps)
    with Console(stderr=True).status("starting") as status:
        reused = replace(plain, reuse=reuse_for(plain, 0.55))
        workloads = (plain, replace(plain, barrier=True), reused, replace(reused, videos=2))
        try:
            compared, found = _compare(workloads, repeats, status.update)
        except GangError as error:
            typer.echo(f"simulate: error: {error}", err=True)
            return error.failure.status
    measured = found[0] if found else "as worked out"
    exact = Verdict("calls, bytes and flags of every rank, latents", measured, "as worked out", not found)
    rows: list[Sequence[Cell]] = [(one.workload.name, *one.seconds, one.off) for one in compared]
    return publish(
        out,
        "check",
        title="Simulated against measured",
        about=f"pp {_LAYOUT.pp}, {plain.size}. {machine_line()}; one thread per rank.",
        verdicts=[*(one.verdict for one in compared), exact],
        sections={"Times": markdown_table(*columns([one.row for one in compared]))},
        data=(("videos", "predicted_s", "measured_s", "off"), rows),
    )


def _compare(
    workloads: Sequence[Workload], repeats: int, log: Callable[[str], None]
) -> tuple[list[Compared], list[str]]:
    sizes = stage_sizes(model_config(workloads[0].model), _LAYOUT.pp)
    compared, found = [Compared(workload=one) for one in workloads], []
    for repeat in range(repeats):
        log(f"repeat {repeat + 1} of {repeats}")
        timings = take_timings(workloads, sizes)
        gang = on_ranks(_LAYOUT, workloads, pings=_PINGS)
        (single,) = alone(workloads)
        for one, timing, made, other in zip(compared, timings.busy, gang, single, strict=True):
            one.predicted.append(predict(one.workload, timing, other.decisions, hop=made.hop))
            one.measured.append(made)
            found += problems(_LAYOUT, one.workload, made, other)
    return compared, found
