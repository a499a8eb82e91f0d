"""A gang: the pp x cp ranks that hold one copy of a model, from this rank's point of view.

It opens the process groups, watches the others, and serves models one after another: on the lead as an engine,
elsewhere as a loop. What goes wrong on any rank ends all of them with one message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from engine.cache import CacheSettings
from engine.kv import KVSettings
from engine.prepare import Pipeline
from engine.schedule import Schedule
from models.errors import InputError
from parallel.decoder import Decoder
from parallel.engine import ParallelEngine
from parallel.failure import BAD_INPUT, STOPPED, GangError
from parallel.flags import FlagLog
from parallel.groups import Groups, connect, open_groups, pick_device, serve_store
from parallel.head import Head
from parallel.links import Links
from parallel.mesh import Layout, Mesh
from parallel.monitor import Monitor, Timeouts, is_connection_error
from parallel.rank_loop import RankLoop
from parallel.report import RankReport, collect_reports, file_report
from parallel.seat import Seat
from parallel.stage import StageModel, StageRunner
from parallel.timeline import Timeline, merge_traces, shipped_events

__all__ = ["Gang", "Reports", "open_gang"]

_DEFAULTS = Timeouts()


@dataclass(slots=True)
class Reports:
    """What all ranks have counted; on the lead, once an engine is closed."""

    ranks: list[RankReport] = field(default_factory=list)


class Gang:
    """The gang that this rank belongs to. Opened by `open_gang`.

    Args:
        mesh: this rank's place.
        groups: open process groups.
        store: where ranks meet.
        monitor: watches the others.
        timeline: told what this rank does when.
        device: of this rank.
    """

    def __init__(self, mesh: Mesh, groups: Groups, store: dist.Store, monitor: Monitor, timeline: Timeline) -> None:
        self.mesh, self.timeline, self.monitor = mesh, timeline, monitor
        self.device = groups.device
        self._groups, self._store = groups, store
        self._sessions, self._load_seconds = 0, 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the loading of weights, which is measured and may take long."""
        self.monitor.working("loading")
        began = time.perf_counter()
        yield
        self._load_seconds = time.perf_counter() - began

    def serve(self, stage: StageModel, flag_log: Callable[[Schedule], FlagLog] = FlagLog) -> RankReport:
        """Serve with these layers until the lead lets go; on every rank but the lead.

        Args:
            stage: this rank's layers.
            flag_log: makes the log of a request's flags.

        Returns:
            What this rank has counted.

        Raises:
            GangError: another rank has failed.
        """
        runner = self._runner(stage, flag_log)
        RankLoop(runner, Links(self.mesh, self._groups, self.monitor, self.timeline), self.timeline).run()
        report = runner.finish()
        self.timeline.ship(self._store, self._sessions)
        file_report(self._store, self._sessions, report)
        self._sessions += 1
        return report

    @contextmanager
    def lead(
        self,
        pipeline: Pipeline,
        cache: CacheSettings | None = None,
        kv: KVSettings | None = None,
        *,
        barrier: bool = False,
        identity: str = "",
    ) -> Iterator[tuple[ParallelEngine, Reports]]:
        """An engine whose work the gang does; on the lead.

        Args:
            pipeline: the model, with the first stage's layers.
            cache: which steps are reused.
            kv: how much of the past is held.
            barrier: wait for all chunks of a tick before the next; for comparison.
            identity: names the model, its weights and their split; a checkpoint is taken up by the same only.

        Yields:
            The engine, and the reports of all ranks, which are there after the end.

        Raises:
            GangError: another rank has failed.
        """
        runner = self._runner(StageModel(model=pipeline.model, attention=pipeline.attention), FlagLog)
        head = Head(
            runner,
            Links(self.mesh, self._groups, self.monitor, self.timeline),
            self.monitor,
            self.timeline,
            barrier=barrier,
        )
        engine = ParallelEngine(
            pipeline,
            head,
            runner.kv,
            lambda: Decoder(pipeline.autoencoder, self.timeline, self.device),
            cache or CacheSettings(),
            kv or KVSettings(),
            layout=self.mesh.layout,
            identity=identity,
        )
        reports = Reports()
        yield engine, reports
        engine.close()
        file_report(self._store, self._sessions, runner.finish())
        reports.ranks = collect_reports(self._store, self._sessions, self.mesh.layout.world_size)
        self._sessions += 1

    def write_trace(self, path: Path) -> None:
        """Write what all ranks have done when to one file; on the lead, once an engine is closed.

        Args:
            path: of the file; Chrome's and Perfetto's format.

        Raises:
            InputError: it cannot be written.
        """
        others = range(1, self.mesh.layout.world_size)
        shipped = [shipped_events(self._store, session, rank) for session in range(self._sessions) for rank in others]
        merge_traces([self.timeline.lines(), *shipped], path)

    def _runner(self, stage: StageModel, flag_log: Callable[[Schedule], FlagLog]) -> StageRunner:
        runner = StageRunner(stage, self.mesh, self._groups, self.monitor, self.timeline, flag_log)
        runner.report.load_seconds = self._load_seconds
        return runner


@contextmanager
def open_gang(
    seat: Seat,
    layout: Layout,
    *,
    timeouts: Timeouts = _DEFAULTS,
    trace: bool = False,
    device: torch.device | None = None,
) -> Iterator[Gang]:
    """Join the other ranks.

    Args:
        seat: this rank's.
        layout: of all ranks.
        timeouts: how long to wait for others.
        trace: remember what is done when.
        device: in place of the seat's own.

    Yields:
        The gang.

    Raises:
        InputError: the layout does not fit the number of ranks.
        GangError: a rank has failed; one line says which, and at what. Who catches it shows it if its own rank is
            the failure's `reporter` and no launcher does, and then ends by `leave`; a process that was started by a
            launcher is ended soon in any case.
    """
    layout.check_world(seat.world_size)
    mesh = Mesh(layout=layout, rank=seat.rank)
    try:
        served = serve_store(seat, timeouts.first)
        store, own = connect(seat, timeouts.first), connect(seat, timeouts.silent)
    except RuntimeError as error:
        raise InputError(f"the ranks cannot meet at {seat.host}:{seat.port}: {str(error).splitlines()[0]}") from None
    monitor = Monitor(own, mesh, timeouts, seat)
    monitor.start()
    try:
        with open_groups(seat, mesh, timeouts, device or pick_device(seat)) as groups:
            place = {"stage": mesh.stage, "slot": mesh.slot}
            timeline = Timeline(seat.rank, mesh.name(seat.rank), wanted=trace, about=place)
            yield Gang(mesh, groups, store, monitor, timeline)
    except BaseException as error:
        try:
            _fail(monitor, mesh, error)
        finally:
            monitor.hand_over()
        raise
    monitor.stop()
    del served


def _fail(monitor: Monitor, mesh: Mesh, error: BaseException) -> None:
    """Report what has ended this rank, and raise what was reported first."""
    if isinstance(error, GangError):
        return
    if isinstance(error, KeyboardInterrupt):
        monitor.fail("stopped", status=STOPPED)
        return
    if isinstance(error, SystemExit | GeneratorExit):
        monitor.fail(f"{mesh.name(mesh.rank)} was told to stop", status=STOPPED)
        return
    if isinstance(error, InputError):
        failure = monitor.fail(str(error), status=BAD_INPUT)
    elif is_connection_error(error) and (found := monitor.await_failure()) is not None:
        failure = found  # a peer's doing, which another thread or rank names
    else:
        at = f": {monitor.doing}" if monitor.doing else ""
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        failure = monitor.fail(f"{mesh.name(mesh.rank)}{at}: {text}")
    raise GangError(failure) from error
