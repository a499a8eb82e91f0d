"""Do videos survive when processes, machines and disks fail? Causes failures while they are made, and keeps account.

    python -m benchmarks.chaos --out results/chaos                     # all kinds
    python -m benchmarks.chaos --quick --out /tmp/chaos                # at most 3 failures of gangs, and small videos
    python -m benchmarks.chaos --failures 50 --kinds rank,gang --seed 7
    python -m benchmarks.chaos --kinds generate,service,service-rank     # SIGKILL at 10, 5 and 5 random times

Gangs make videos on a Ray cluster of several nodes, all of them on this machine: first a batch that nothing disturbs,
then the same videos again and again until all failures were caused. Ranks, whole gangs and nodes fail, chosen by seed:
killed, stopped, or cut off as by a loss of power. Most failures wait until the gang that was hit before works again,
some do not. An account is kept from the log of events and from the checkpoints on the disk at the moment of each loss.
The kinds driver, part, checkpoint, disk and gcs hit `flowcache batch`, once each: see `benchmarks.chaos.batch`. And
generate, service and service-rank kill `flowcache generate` and `flowcache serve`: see `benchmarks.chaos.kills`.

Exit status 0 if every video is complete with the latents of the undisturbed run, no work from before a checkpoint was
done again, and no process is left; 1 if not, 2 for bad input.
"""

import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from benchmarks.chaos.account import Account, ChaosRun, Mark, facts, fault_rows, verdicts
from benchmarks.chaos.batch import run_batches
from benchmarks.chaos.faults import (
    GANG_KINDS,
    KILL_KINDS,
    Injector,
    Kind,
    Nodes,
    PlannedFault,
    marked,
    parse_kinds,
    plan_faults,
    simulated_cluster,
    survivors,
)
from benchmarks.chaos.kills import run_kills
from benchmarks.cluster import GangSetup, warm_up
from benchmarks.common import Out, machine_line, new_log, output_folder, publish, run_command
from benchmarks.runs import reuse_for
from benchmarks.workload import QUICK, ModelSpec, Workload
from engine.checkpoint.files import CheckpointConfig, newest
from engine.files import remove_folder
from engine.kv.layout import KVSettings
from parallel.cluster.controller import Controller
from parallel.cluster.messages import Event, GangDown, GangLost, GangReady, VideoDone, VideoOrder
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout

_TIMEOUTS = Timeouts(silent=5.0, first=90.0, step=40.0, grace=1.0)
_RANKS_END, _ALL_END = 10.0, 30.0
_SPARE_RESTARTS = 20
_LAYOUT, _GANGS, _KV_BUDGET = Layout(pp=2), 2, 3
_NOTES = """\
Seconds after the failure until the controller knew of it, until the gang waited for work again, and until it had done a
quantum again. Quanta again, chunks again: of the videos that were hit; what a gang's loss has cost stands with the
first failure that led to it. Hasty: it did not wait until failures before it were made good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is made, and what is to happen to it."""

    gangs: GangSetup
    nodes: int
    plan: tuple[PlannedFault, ...]
    limit: int  # seconds after which the run is broken off


def run(
    videos: Annotated[int, typer.Option(min=1, help="Videos of the batch.")] = 8,
    failures: Annotated[int, typer.Option(min=1, help="How many failures.")] = 20,
    kinds: Annotated[str, typer.Option(help="What fails, with commas between.")] = ",".join(Kind),
    kills: Annotated[int, typer.Option(min=1, help="Of generate; of the service and its ranks half as many.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of failures.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Seconds after which the run is broken off.")] = 900,
    quick: Annotated[bool, typer.Option("--quick", help="At most three failures, and small videos.")] = False,
    out: Out = Path("results/chaos"),
) -> int:
    """Disturb videos while they are made."""
    chosen = parse_kinds(kinds)
    of_gangs, killed = [[kind for kind in chosen if kind in group] for group in (GANG_KINDS, KILL_KINDS)]
    others = [kind for kind in chosen if kind not in (*of_gangs, *killed)]
    output_folder(out)
    log, status = new_log(), 0
    with (out / "ray.log").open("w") as file, redirect_stdout(file):  # Ray prints every process that it has lost
        if of_gangs:
            setup = _setup(of_gangs, failures, videos, seed, limit, quick)
            found = _disturb(setup, log)
    if of_gangs:
        status = _write(out, setup, found, seed)
    status |= run_kills(out, killed, min(kills, 2) if quick else kills, seed, log) if killed else 0
    return status | (run_batches(out, others, log) if others else 0)


def _setup(kinds: Sequence[Kind], failures: int, videos: int, seed: int, limit: int, quick: bool) -> Setup:
    model, chunks, steps = ModelSpec(), 6, 16
    if quick:
        model, chunks, steps, failures, videos = QUICK, 4, 8, min(failures, 3), min(videos, 4)
    plain = Workload(model=model, chunks=chunks, steps=steps, videos=videos)
    workload = replace(plain, kv=KVSettings(budget=_KV_BUDGET), reuse=reuse_for(model))
    restarts = _GANGS * failures + _SPARE_RESTARTS
    gangs = GangSetup(workload=workload, layout=_LAYOUT, gangs=_GANGS, timeouts=_TIMEOUTS, max_restarts=restarts)
    nodes = _GANGS + (Kind.NODE in kinds)  # each with room for one gang
    return Setup(gangs=gangs, nodes=nodes, plan=tuple(plan_faults(failures, kinds, seed)), limit=limit)


def _write(out: Path, setup: Setup, found: ChaosRun, seed: int) -> int:
    workload = setup.gangs.workload
    about = (
        f"{_GANGS} gangs of pp {_LAYOUT.pp} on {setup.nodes} simulated nodes; videos of {workload.chunks} chunks and "
        f"{workload.steps} steps, a checkpoint at every chunk; seed {seed}. {machine_line()}; one thread per rank."
    )
    return publish(
        out,
        "chaos",
        title="Failures of gangs",
        about=f"{about}\n\n{_NOTES}",
        verdicts=verdicts(found),
        sections={"Failures": fault_rows(found), "What it cost": facts(found)},
    )


def _disturb(setup: Setup, log: Callable[[str], None]) -> ChaosRun:
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, marked() as mark:
        runner = _Runner(setup, Path(name), log)
        found = runner.found
        log(f"starting {setup.nodes} nodes")
        with simulated_cluster(setup.nodes, setup.gangs.layout.world_size, mark) as nodes:
            signal.signal(signal.SIGALRM, _too_long)
            signal.alarm(setup.limit)
            try:
                runner.run(nodes)
            except TimeoutError:
                found.unfinished = f"not through after {setup.limit} s"
            finally:
                signal.alarm(0)
            left = survivors(mark, _RANKS_END, runner.pids)
        found.left = {**left, **survivors(mark, _ALL_END)}
        return found


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def _mark(folder: Path) -> Mark | None:
    """The newest whole checkpoint in a folder."""
    found = newest(folder) or newest(folder)  # a leader that is dying may just have put a newer one in its place
    return None if found is None else Mark(quantum=found.quantum, chunks=found.counts["chunks"])


class _Runner:
    """Makes the batch on the gangs, first undisturbed, then with failures; `folder` is that of the checkpoints."""

    def __init__(self, setup: Setup, folder: Path, log: Callable[[str], None]) -> None:
        self._setup, self._folder, self._log, self._began = setup, folder, log, time.monotonic()
        self._requests = setup.gangs.workload.requests
        account = Account(lambda video: _mark(folder / video))
        distinct = len(self._requests)
        self.found = ChaosRun(wanted=len(setup.plan), distinct=distinct, account=account)
        self._done: deque[str] = deque()
        self.pids: set[int] = set()
        """Of all ranks that were ever seen."""

    def run(self, nodes: Nodes) -> None:
        setup, account = self._setup, self.found.account

        def count(entry: dict[str, object]) -> None:
            account.add({**entry, "seconds": self._clock()})

        with Controller(setup.gangs.settings, log=count) as controller:
            self._log("starting the gangs")
            warm_up(controller, setup.gangs, self._show)
            self._run_undisturbed(controller)
            with Injector(setup.plan, nodes, account, self._clock) as injector:
                self.pids = injector.pids
                try:
                    self._run_disturbed(controller, nodes, injector)
                finally:
                    self.found.faults = tuple(injector.faults)

    def _clock(self) -> float:
        return time.monotonic() - self._began

    def _run_undisturbed(self, controller: Controller) -> None:
        found, began, before = self.found, self._clock(), self.found.account.quanta
        orders = [self._order(f"undisturbed-{number}", number) for number in range(found.distinct)]
        found.undisturbed.submit(controller, orders)
        for event in controller.run():
            found.undisturbed.on_event(event)
            self._show(event)
        found.undisturbed_seconds = self._clock() - began
        found.undisturbed_quanta = found.account.quanta - before
        self._log(f"{found.distinct} videos in {found.undisturbed_seconds:.1f} s undisturbed")

    def _run_disturbed(self, controller: Controller, nodes: Nodes, injector: Injector) -> None:
        """Make the videos again and again until all failures are made good."""
        found, began, shown, enough = self.found, self._clock(), 0, False
        videos, most = found.disturbed, max(found.distinct, 2 * self._setup.gangs.gangs)
        videos.submit(controller, [self._next(number) for number in range(most)])
        for event in controller.run():
            videos.on_event(event)
            injector.update(controller.gangs())
            if len(found.account.working) == self._setup.gangs.gangs:
                nodes.mend()  # not before: it takes seconds in which the controller would neglect its gangs
            for fault in injector.faults[shown:]:
                self._log(f"{fault.seconds:6.1f} s  {fault.number}: {fault.target}, {fault.how}")
                shown += 1
            self._show(event)
            if isinstance(event, VideoDone):
                self._tidy(event.video, most)
            enough = enough or injector.finished or isinstance(event, GangDown)
            while videos.waiting < most and not enough:
                videos.submit(controller, [self._next(len(videos.chunks))])
        found.seconds = self._clock() - began

    def _tidy(self, video: str, keep: int) -> None:
        """Delete checkpoints of videos that are done, later: ranks may still be writing the last one."""
        self._done.append(video)
        if len(self._done) > keep:
            remove_folder(self._folder / self._done.popleft())

    def _next(self, number: int) -> VideoOrder:
        return self._order(f"video-{number}", number % self.found.distinct)

    def _order(self, video: str, number: int) -> VideoOrder:
        checkpoint = CheckpointConfig(folder=self._folder / video, every=1)
        return self._setup.gangs.order(video, self._requests[number], checkpoint)

    def _show(self, event: Event) -> None:
        if isinstance(event, GangLost | GangReady):
            what = f"lost: {event.message}" if isinstance(event, GangLost) else "ready"
            self._log(f"{self._clock():6.1f} s  {event.gang} {what}")


if __name__ == "__main__":
    sys.exit(run_command(run, "chaos"))
