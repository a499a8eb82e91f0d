"""Is the simulation right? Predicts two stages from what one process takes, runs them, and compares.

Times of calls are taken in one process for each stage at the same time, since cores that work side by side are slower
than one that works alone. The gang and the processes alternate, and medians count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console

from benchmarks.pipeline import plain_and_reused
from benchmarks.pipeline_job import Case, ChunkResult, Job, ModelSpec, launch
from benchmarks.pipeline_model import model_config
from benchmarks.pipeline_plan import predict, problems
from benchmarks.pipeline_profile import take_timings
from benchmarks.report import csv_text, machine_line, markdown_table, save_text
from benchmarks.verdict import Verdict, verdict_table
from parallel.health.errors import GangError
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes

_STAGES, _PINGS, _OFF = 2, 50, 0.10


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One case."""

    case: Case
    predicted: tuple[float, ...]  # seconds, of each repeat
    measured: tuple[float, ...]  # seconds, of each repeat
    predicted_busy: tuple[float, ...]  # of each stage, share of the time
    measured_busy: tuple[float, ...]

    @property
    def off(self) -> float:
        """How far the prediction is from what was measured, as a share of that; less than zero is too fast."""
        measured = statistics.median(self.measured)
        return (statistics.median(self.predicted) - measured) / measured

    @property
    def name(self) -> str:
        """The case in words."""
        kind = "reuse" if self.case.reuses else "no reuse"
        wait = ", barrier" if self.case.barrier else ""
        return f"{self.case.videos} video{'s' * (self.case.videos > 1)}, {kind}{wait}"


def verdict_of(one: Compared) -> Verdict:
    """Within 10% or not."""
    return Verdict(
        name=f"pp {_STAGES}, {one.name}: predicted against measured",
        measured=f"{one.off:+.1%}",
        wanted=f"within {_OFF:.0%}",
        passed=abs(one.off) <= _OFF,
    )


def check_stages(out: Path, *, quick: bool) -> int:
    """Predict, measure and compare.

    Returns:
        The exit status.
    """
    chunks, steps, repeats = (4, 8, 1) if quick else (8, 16, 3)
    base = Job(model=ModelSpec(), layout=None, cases=(), chunks=chunks, steps=steps)
    with Console(stderr=True).status("starting") as status:
        plain, reused = plain_and_reused(base, 0.55)
        cases = (
            Case(videos=1, cache=plain),
            Case(videos=1, cache=plain, barrier=True),
            Case(videos=1, cache=reused),
            Case(videos=2, cache=reused),
        )
        base = replace(base, cases=cases)
        try:
            compared, found = _compare(base, repeats, status.update)
        except GangError as error:
            typer.echo(f"simulate: error: {error}", err=True)
            return error.failure.status
    return 0 if _write(out, base, compared, found) else 1


def _compare(base: Job, repeats: int, say: Callable[[str], None]) -> tuple[list[Compared], list[str]]:
    layout, sizes = Layout(pp=_STAGES), stage_sizes(model_config(base.model), _STAGES)
    predicted: list[list[float]] = [[] for _ in base.cases]
    measured: list[list[ChunkResult]] = [[] for _ in base.cases]
    shares: list[tuple[float, ...]] = []
    found: list[str] = []
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}")
        timings = take_timings(base, sizes)
        (made,) = launch(replace(base, layout=layout, pings=_PINGS))
        (alone,) = launch(base)
        shares = []
        for place, case in enumerate(base.cases):
            outcome = predict(base, case, timings.busy[place], alone[place].decisions, hop=made[place].hop)
            predicted[place].append(outcome.seconds)
            measured[place].append(made[place])
            shares.append(outcome.utilisation)
            found += problems(replace(base, layout=layout), case, made[place], alone[place])
    compared = [
        Compared(
            case=case,
            predicted=tuple(predicted[place]),
            measured=tuple(one.seconds for one in measured[place]),
            predicted_busy=shares[place],
            measured_busy=tuple(report["busy"] / measured[place][-1].seconds for report in measured[place][-1].ranks),
        )
        for place, case in enumerate(base.cases)
    ]
    return compared, found


def _write(out: Path, base: Job, compared: list[Compared], found: list[str]) -> bool:
    verdicts = [verdict_of(one) for one in compared]
    verdicts.append(
        Verdict(
            name="calls, bytes and flags of every rank, latents",
            measured="as worked out" if not found else found[0],
            wanted="as worked out",
            passed=not found,
        )
    )
    rows = [
        (
            one.name,
            f"{statistics.median(one.predicted):.2f}",
            f"{statistics.median(one.measured):.2f}",
            f"{one.off:+.1%}",
            " ".join(f"{share:.0%}" for share in one.predicted_busy),
            " ".join(f"{share:.0%}" for share in one.measured_busy),
        )
        for one in compared
    ]
    headers = ("videos", "predicted (s)", "measured (s)", "off", "stages busy, predicted", "measured")
    model = base.model
    text = "\n\n".join(
        (
            "# Simulated against measured",
            f"pp {_STAGES}, random weights: {model.layers} layers of width {model.width}, {model.side} pixels, "
            f"{base.chunks} chunks of {base.steps} steps. {machine_line()}; one thread per rank.",
            verdict_table(verdicts),
            markdown_table(headers, rows),
        )
    )
    save_text(out / "check.md", text)
    lines = [(one.name, statistics.median(one.predicted), statistics.median(one.measured), one.off) for one in compared]
    save_text(out / "check.csv", csv_text(("videos", "predicted_s", "measured_s", "off"), lines))
    typer.echo(f"{text}\n\nwritten to {out}")
    return all(one.passed for one in verdicts)
