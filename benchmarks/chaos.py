"""Do videos survive when processes and machines fail? Causes failures while a batch is made, and keeps account.

    python -m benchmarks.chaos --out results/chaos                     # 20 failures, some minutes
    python -m benchmarks.chaos --quick --out /tmp/chaos                # 3 failures
    python -m benchmarks.chaos --failures 50 --kinds rank,gang --seed 7

Gangs make videos on a Ray cluster of several nodes, all of them on this machine: first a batch that nobody disturbs,
then the same videos again and again until all failures have struck. Ranks, whole gangs and nodes fail, by tie-break:
killed, stopped, or cut off as by a loss of power. Most failures wait until the gang that was hit before works again,
some do not. An account is kept from the log of events and from the checkpoints on the disk at the moment of each loss.

Exit status 0 if every video is complete with the latents of the undisturbed run, no work from before a checkpoint was
done again, and no process is left; 1 if not, 2 for bad input.
"""

from __future__ import annotations

import _thread
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.chaos_account import Accountant, Mark
from benchmarks.chaos_ground import Ground, marked, simulated_cluster, survivors
from benchmarks.chaos_report import Storm, csv, facts, strikes_table, verdicts
from benchmarks.chaos_strikes import Injector, Kind, Planned, parse_kinds, plan_strikes
from benchmarks.cluster_making import Making, warm_up
from benchmarks.pipeline import plain_and_reused
from benchmarks.pipeline_job import Job, ModelSpec
from benchmarks.report import machine_line, output_folder, run_app, save_text
from benchmarks.verdict import verdict_table
from engine.checkpoint.files import CheckpointConfig, newest
from engine.kv.size import KVSettings
from models.errors import InputError
from parallel.cluster.controller import Controller
from parallel.cluster.messages import Event, GangDown, GangLost, GangReady, VideoDone, VideoOrder
from parallel.health.timeouts import Timeouts
from parallel.topology.mesh import Layout

_TIMEOUTS = Timeouts(silent=5.0, first=90.0, step=40.0, grace=1.0)
_RANKS_END, _ALL_END = 10.0, 30.0
_SPARE_RESTARTS = 20

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """What is made, and what is to happen to it."""

    making: Making
    videos: int
    every: int
    nodes: int
    plan: tuple[Planned, ...]
    seed: int
    limit: float


@app.command()
def run(
    model: Annotated[str, typer.Option(help="random or magi-pocket.")] = "random",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the random model.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Width of the random model, a multiple of 192.")] = 384,
    side: Annotated[int, typer.Option(min=1, help="Pixels of a frame's side.")] = 64,
    videos: Annotated[int, typer.Option(min=1, help="Videos of the batch.")] = 8,
    chunks: Annotated[int, typer.Option(min=1, help="Length of a video.")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a chunk.")] = 16,
    fraction: Annotated[float, typer.Option(help="Share to compute with reuse, for random weights.")] = 0.55,
    kv_budget: Annotated[int, typer.Option(min=1, help="Finished chunks that are held.")] = 3,
    gangs: Annotated[int, typer.Option(min=1, help="Gangs.")] = 2,
    pp: Annotated[int, typer.Option(min=1, help="Stages of a gang.")] = 2,
    cp: Annotated[int, typer.Option(min=1, help="Ranks of a stage.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, each with room for one gang.")] = 3,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Chunks from one checkpoint to the next.")] = 1,
    failures: Annotated[int, typer.Option(min=1, help="How many failures.")] = 20,
    kinds: Annotated[str, typer.Option(help="What fails: of rank, gang and node.")] = "rank,gang,node",
    seed: Annotated[int, typer.Option(min=0, help="Of the lots.")] = 0,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which the run is broken off.")] = 900.0,
    quick: Annotated[bool, typer.Option("--quick", help="Three failures, and small videos.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/chaos"),
) -> None:
    """Disturb a batch of videos."""
    if quick:
        failures, videos, layers, steps = min(failures, 3), min(videos, 4), min(layers, 4), min(steps, 8)
    chosen = parse_kinds(kinds)
    if nodes < gangs + (Kind.NODE in chosen):
        raise InputError(f"--nodes {nodes} are too few for --gangs {gangs}: one for each, and one more if nodes fail")
    spec = ModelSpec(name=model, layers=layers, width=width, side=side)
    making = Making(
        spec=spec,
        layout=Layout(pp=pp, cp=cp),
        gangs=gangs,
        chunks=chunks,
        steps=steps,
        kv=KVSettings(budget=kv_budget),
        timeouts=_TIMEOUTS,
        max_restarts=gangs * failures + _SPARE_RESTARTS,
    )
    making.settings()  # checks all of it
    output_folder(out)
    say = partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    say("looking for a threshold of reuse")
    cache = plain_and_reused(Job(model=spec, layout=None, cases=(), chunks=chunks, steps=steps), fraction)[1]
    setup = _Setup(
        making=replace(making, cache=cache),
        videos=videos,
        every=checkpoint_every,
        nodes=nodes,
        plan=tuple(plan_strikes(failures, chosen, seed)),
        seed=seed,
        limit=limit,
    )
    with (out / "ray.log").open("w") as log, redirect_stdout(log):  # Ray tells standard output of every process it lost
        found = _storm(setup, say)
    raise typer.Exit(0 if _write(out, setup, found) else 1)


def _storm(setup: _Setup, say: Callable[[str], None]) -> Storm:
    """Do all of it."""
    layout = setup.making.layout
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, marked() as mark:
        folder = Path(name)
        account = Accountant(lambda video: _mark(folder / video))
        found = Storm(wanted=len(setup.plan), every=setup.every, distinct=setup.videos, account=account)
        say(f"starting {setup.nodes} nodes")
        with simulated_cluster(setup.nodes, layout.world_size, mark) as ground, _limit(setup.limit, found):
            field = _Field(setup, ground, folder, found, say, lambda: time.monotonic() - began)
            try:
                field.play()
            except KeyboardInterrupt:
                if not found.unfinished:
                    raise
            left = ground.left(field.pids, _RANKS_END)
        found.left = {**left, **survivors(mark, _ALL_END)}
        return found


@contextmanager
def _limit(seconds: float, found: Storm) -> Iterator[None]:
    """Break off what takes too long."""

    def end() -> None:
        found.unfinished = f"not through after {seconds:.0f} s"
        _thread.interrupt_main()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _mark(folder: Path) -> Mark | None:
    """The newest whole checkpoint in a folder."""
    found = newest(folder) or newest(folder)  # a lead that is dying may just have put a newer one in its place
    return None if found is None else Mark(quantum=found.quantum, chunks=found.counts["chunks"])


class _Field:
    """The gangs, the batch, and what disturbs it."""

    def __init__(
        self,
        setup: _Setup,
        ground: Ground,
        folder: Path,
        found: Storm,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._setup, self._ground, self._folder, self._found = setup, ground, folder, found
        self._say, self._clock = say, clock
        self._requests = setup.making.requests(setup.videos)
        self._done: deque[str] = deque()
        self.pids: set[int] = set()

    def play(self) -> None:
        """First undisturbed, then with failures."""
        setup, account = self._setup, self._found.account

        def log(entry: dict[str, object]) -> None:
            account.hear({**entry, "seconds": self._clock()})

        with Controller(setup.making.settings(setup.seed), log=log) as engine:
            self._say("starting the gangs")
            warm_up(engine, setup.making, self._tell)
            self._calm(engine)
            injector = Injector(setup.plan, self._ground, account, self._clock)
            self.pids = injector.pids
            with injector:
                try:
                    self._disturbed(engine, injector)
                finally:
                    self._found.strikes = tuple(injector.strikes)

    def _calm(self, engine: Controller) -> None:
        found = self._found
        before, began = found.account.quanta, self._clock()
        found.calm.submit(engine, [self._order(f"calm-{number}", number) for number in range(self._setup.videos)])
        for event in engine.run():
            found.calm.hear(event)
            self._tell(event)
        found.calm_seconds = self._clock() - began
        found.calm_quanta = found.account.quanta - before
        self._say(f"{self._setup.videos} videos in {found.calm_seconds:.1f} s undisturbed")

    def _disturbed(self, engine: Controller, injector: Injector) -> None:
        """Make the videos again and again until all failures are made good."""
        found, began, told, enough = self._found, self._clock(), 0, False
        storm, most = found.storm, max(self._setup.videos, 2 * self._setup.making.gangs)
        storm.submit(engine, [self._next(number) for number in range(most)])
        for event in engine.run():
            storm.hear(event)
            injector.see(engine.gangs())
            if len(found.account.working) == self._setup.making.gangs:
                self._ground.mend()  # not before, for it takes seconds in which the driver would not see to its gangs
            for strike in injector.strikes[told:]:
                self._say(f"{strike.seconds:6.1f} s  {strike.number}: {strike.whom}, {strike.how}")
                told += 1
            self._tell(event)
            if isinstance(event, VideoDone):
                self._tidy(event.video, most)
            enough = enough or injector.over or isinstance(event, GangDown)
            while storm.waiting < most and not enough:
                storm.submit(engine, [self._next(len(storm.chunks))])
        found.seconds = self._clock() - began

    def _tidy(self, video: str, keep: int) -> None:
        """Delete checkpoints of videos that are done, later: ranks may still be writing the last one."""
        self._done.append(video)
        if len(self._done) > keep:
            shutil.rmtree(self._folder / self._done.popleft(), ignore_errors=True)

    def _next(self, number: int) -> VideoOrder:
        return self._order(f"storm-{number}", number % self._setup.videos)

    def _order(self, video: str, number: int) -> VideoOrder:
        plan = CheckpointConfig(folder=self._folder / video, every=self._setup.every)
        return self._setup.making.order(video, self._requests[number], plan)

    def _tell(self, event: Event) -> None:
        if isinstance(event, GangLost | GangReady):
            what = f"lost: {event.message}" if isinstance(event, GangLost) else "ready"
            self._say(f"{self._clock():6.1f} s  {event.gang} {what}")


def _write(out: Path, setup: _Setup, found: Storm) -> bool:
    making, held = setup.making, verdicts(found)
    text = "\n\n".join(
        [
            "# Failures during a batch",
            f"{making.gangs} gangs of pp {making.layout.pp} x cp {making.layout.cp} on {setup.nodes} simulated nodes; "
            f"videos of {making.chunks} chunks and {making.steps} steps, a checkpoint every {setup.every} chunks; "
            f"seed {setup.seed}. {machine_line()}; one thread per rank.",
            f"## Verdicts\n\n{verdict_table(held)}",
            f"## Failures\n\n{_NOTES}\n\n{strikes_table(found)}",
            f"## What it cost\n\n{facts(found)}",
        ]
    )
    save_text(out / "chaos.md", text)
    save_text(out / "chaos.csv", csv(found))
    typer.echo(f"{text}\n\nwritten to {out}")
    return all(one.passed for one in held) and not found.unfinished


_NOTES = """\
Seconds after the failure until the driver knew of it, until the gang waited for work again, and until it had done a
quantum again. Turns again, chunks again: of the videos that were hit; what a gang's loss has cost stands with the first
failure that led to it. At once: it did not wait until failures before it were made good."""


if __name__ == "__main__":
    sys.exit(run_app(app, "chaos"))
