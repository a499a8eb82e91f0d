"""Is the simulation right? Two stages, predicted from the times of passes in one process, and measured.

Times of passes are taken in one process that is alone, and in one for each stage at the same time, since cores that
work side by side are slower. The gang and the processes alternate, and medians count. The rows go from what passes
allow to what was measured, one cost after the other, and so say where the time goes; what is left between the last
prediction and the measurement is what ranks cost each other besides: threads that want the interpreter, and processes
that the system moves about.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import nn

from benchmarks.common import Row, Verdict, in_fresh_process, in_fresh_processes, machine_line, median, publish
from benchmarks.pipeline import problems
from benchmarks.runs import alone, make_alone, on_ranks, pipeline_here, reuse_for
from benchmarks.simulate.clock import Machine, Outcome, plans_of, simulate
from benchmarks.workload import Flags, Made, ModelSpec, Workload, model_config
from engine.executor import LocalRunner
from engine.video import Work, WorkItem
from models.attention import Attention
from models.magi.dit import MagiDiT
from models.protocols import Pass
from parallel.mesh import Layout
from parallel.split import stage_sizes

_LAYOUT, _PINGS, _OFF = Layout(pp=2), 50, 0.10
_NOTES = """\
Simulated from what calls take in one process on a quiet machine; in two processes that do the same at once; with
messages and the leader's own work besides; and measured. Medians of all repeats; the third is held to the fourth."""
_ROWS = ("calls alone", "calls with all cores busy", "and messages, and the leader's own work", "measured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time of one process goes."""

    calls: dict[tuple[str, int | None], tuple[float, ...]]
    """Mean seconds of passes by name and step on each stage, embedding and reading out counted in."""
    rest: float  # seconds per pass outside of calls: decisions and distances, steps, bookkeeping


class TimedRunner(LocalRunner):
    """Runs a whole model here, and takes times for every stage that its layers will be cut into.

    The clock is read where a stage would begin. What every stage does for itself before its first layer (embedding the
    condition and the text, changing its KV) counts for each of them, as each will do it. `split` says how many of the
    layers each stage will have.
    """

    def __init__(self, model: MagiDiT, attention: Attention, split: Sequence[int]) -> None:
        super().__init__(model, attention)
        self._marks: list[float] = []
        self._seconds: dict[tuple[str, int | None], list[np.ndarray]] = {}  # of each pass, by stage
        self._total = 0.0
        self._hooks = [
            model.videodit_blocks.layers[str(start)].register_forward_pre_hook(self._mark)
            for start in (0, *accumulate(split[:-1]))
        ]

    def begin(self, work: Work) -> None:
        self._marks.clear()
        item, stage, began = work.item, self._stage, time.perf_counter()
        patches = stage.embed(work.x)
        embedded = time.perf_counter()
        stage.change(item)
        hidden = stage.forward(item, patches)
        through = ended = time.perf_counter()
        if item.what.weight:
            self._results.append((item, stage.velocity(item, hidden)))
            ended = time.perf_counter()
        self._note(item, embedded - began, embedded, through, ended - through)
        self._total += ended - began

    def timing(self, seconds: float) -> Timing:
        """What was measured; `seconds` is what making the videos took in all."""
        for hook in self._hooks:
            hook.remove()
        passes = sum(map(len, self._seconds.values()))
        calls = {which: tuple(np.mean(taken, axis=0).tolist()) for which, taken in self._seconds.items()}
        return Timing(calls=calls, rest=(seconds - self._total) / passes)

    def _mark(self, module: nn.Module, arguments: tuple[object, ...]) -> None:
        self._marks.append(time.perf_counter())

    def _note(self, item: WorkItem, embed: float, began: float, through: float, read_out: float) -> None:
        spent = self._marks[0] - began + np.diff([*self._marks, through])
        spent[0] += embed
        spent[-1] += read_out
        self._seconds.setdefault((item.what.name, item.step), []).append(spent)


def timings(workloads: Sequence[Workload], split: Sequence[int]) -> list[Timing]:
    """Make videos in this process, all of one model, and take times."""
    pipeline, found = pipeline_here(workloads[0]), []
    for workload in workloads:
        runner = TimedRunner(pipeline.model, pipeline.attention, split)
        found.append(runner.timing(make_alone(workload, pipeline, runner).seconds))
    return found


def mean_timing(same: Sequence[Timing]) -> Timing:
    """Of the same passes in several processes."""
    calls = {which: tuple(np.mean([one.calls[which] for one in same], axis=0).tolist()) for which in same[0].calls}
    return Timing(calls=calls, rest=float(np.mean([one.rest for one in same])))


def predict(workload: Workload, timing: Timing, flags: Sequence[Flags], *, hop: float | None) -> Outcome:
    """What a pipeline will take, simulated from what passes took in one process; without flags all is computed.

    A hop is the seconds of a message. None counts passes alone: no messages, no work on the leader besides its layers.
    """
    mean = tuple(np.mean(list(timing.calls.values()), axis=0).tolist())  # for steps that one process has not computed

    def seconds(what: Pass, step: int | None) -> tuple[float, ...]:
        return timing.calls.get((what.name, step), mean)

    machine = Machine(stages=len(mean), barrier=workload.barrier)
    if hop is not None:
        machine = replace(machine, latency=hop, take=timing.rest)
    return simulate(plans_of(workload, seconds, flags), machine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One workload, predicted in three ways and measured in every repeat."""

    workload: Workload
    repeats: list[tuple[float, ...]] = field(default_factory=list)  # seconds as in `_ROWS`
    busy: list[tuple[tuple[float, ...], ...]] = field(default_factory=list)  # of each, share of the time of each stage

    @property
    def seconds(self) -> list[float]:
        """Medians, as in `_ROWS`."""
        return [median(same) for same in zip(*self.repeats, strict=True)]

    @property
    def verdict(self) -> Verdict:
        """Within 10% of what was measured or not; less than zero is too fast."""
        *_, predicted, measured = self.seconds
        off = (predicted - measured) / measured
        name = f"pp {_LAYOUT.pp}, {self.workload.name}: predicted against measured"
        return Verdict(name, f"{off:+.1%}", f"within {_OFF:.0%}", abs(off) <= _OFF)

    @property
    def rows(self) -> list[Row]:
        """Lines of the table; the stages' shares are those of the last repeat."""
        return [
            {
                "videos": self.workload.name,
                "what": what,
                "seconds": f"{seconds:.2f}",
                "off": f"{seconds / self.seconds[-1] - 1:+.1%}",
                "stages_busy": " ".join(f"{share:.0%}" for share in busy),
            }
            for what, seconds, busy in zip(_ROWS, self.seconds, self.busy[-1], strict=True)
        ]

    def add(self, quiet: Timing, busy: Timing, made: Made, flags: Sequence[Flags]) -> None:
        """Predict, and put beside it what was measured."""
        ways = ((quiet, None), (busy, None), (busy, made.hop))
        outcomes = [predict(self.workload, timing, flags, hop=hop) for timing, hop in ways]
        self.repeats.append((*(one.seconds for one in outcomes), made.seconds))
        shares = tuple(rank.busy / made.seconds for rank in made.ranks)
        self.busy.append((*(one.utilisation for one in outcomes), shares))


def check_stages(out: Path, *, quick: bool) -> int:
    """Predict, measure and compare; the exit status."""
    chunks, steps, repeats = (4, 8, 1) if quick else (8, 16, 3)
    plain = Workload(model=ModelSpec(), chunks=chunks, steps=steps)
    with Console(stderr=True).status("starting") as status:
        reused = replace(plain, reuse=reuse_for(plain.model))
        workloads = (plain, replace(plain, barrier=True), reused, replace(reused, videos=2))
        compared, found = _compare(workloads, repeats, status.update)
    measured = found[0] if found else "as worked out"
    exact = Verdict("calls, bytes and flags of every rank, latents", measured, "as worked out", not found)
    return publish(
        out,
        "check",
        title="Simulated against measured",
        about=f"pp {_LAYOUT.pp}, {plain.size}. {machine_line()}; one thread per rank.\n\n{_NOTES}",
        verdicts=[*(one.verdict for one in compared), exact],
        sections={"Where the time goes": [row for one in compared for row in one.rows]},
    )


def _compare(
    workloads: Sequence[Workload], repeats: int, log: Callable[[str], None]
) -> tuple[list[Compared], list[str]]:
    split = stage_sizes(model_config(workloads[0].model), _LAYOUT.pp)
    compared, found = [Compared(workload=one) for one in workloads], list[str]()
    for repeat in range(repeats):
        log(f"repeat {repeat + 1} of {repeats}")
        quiet = in_fresh_process(timings, workloads, split)
        both = in_fresh_processes(_LAYOUT.pp, timings, workloads, split)
        busy = [mean_timing(same) for same in zip(*both, strict=True)]
        gang, single = on_ranks(_LAYOUT, workloads, pings=_PINGS), alone(workloads)
        for place, (made, other) in enumerate(zip(gang, single, strict=True)):
            compared[place].add(quiet[place], busy[place], made, other.flags)
            found += problems(_LAYOUT, workloads[place], made, other)
    return compared, found
