"""A gang: the pp x cp ranks that hold one copy of a model, from this rank's point of view.

It opens the process groups, watches the other ranks, and serves models one after another: on the leader as an engine,
on workers as a loop. An error on any rank ends all of them with one message.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from engine.engine import Engine
from engine.kv.size import KVSettings
from engine.reuse.settings import ReuseSettings
from models.errors import InputError
from models.protocols import Pipeline
from parallel.comm.edges import Edges
from parallel.comm.groups import Groups, connect, open_groups, pick_device, serve_store
from parallel.health.errors import BAD_INPUT, INTERRUPTED, GangError
from parallel.health.monitor import Monitor, is_connection_error
from parallel.health.timeouts import Timeouts
from parallel.ranks.environment import RankEnv
from parallel.ranks.leader import Leader
from parallel.ranks.worker import RankServices, StageModel, StageWorker, WorkerLoop
from parallel.topology.mesh import Layout, Mesh
from parallel.trace.counters import RankCounters, collect_counters, publish_counters
from parallel.trace.tracer import Tracer, merge_traces, shipped_events

_DEFAULTS = Timeouts()


@dataclass(slots=True)
class GangCounters:
    """What all ranks have counted; on the leader, once an engine is closed."""

    ranks: list[RankCounters] = field(default_factory=list)


class Gang:
    """The gang that this rank belongs to. Opened by `open_gang`.

    Args:
        mesh: this rank's place.
        groups: open process groups.
        store: where ranks meet.
        monitor: watches the others.
        tracer: of this rank.
        device: of this rank.
    """

    def __init__(self, mesh: Mesh, groups: Groups, store: dist.Store, monitor: Monitor, tracer: Tracer) -> None:
        self.mesh, self.tracer, self.monitor = mesh, tracer, monitor
        self.device, self.transfer = groups.device, groups.transfer
        self._groups, self._store = groups, store
        self._sessions, self._load_seconds = 0, 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the loading of weights, which is measured and may take long."""
        self.monitor.working("loading")
        began = time.perf_counter()
        yield
        self._load_seconds = time.perf_counter() - began

    def serve(self, stage: StageModel) -> RankCounters:
        """Serve with these layers until the leader lets go; on every rank but the leader.

        Returns:
            What this rank has counted.

        Raises:
            GangError: another rank has failed.
        """
        worker = StageWorker(stage, self._services)
        worker.counters.load_seconds = self._load_seconds
        WorkerLoop(worker, self._edges(), self.tracer).run()
        counters = worker.finish()
        self.tracer.ship(self._store, self._sessions)
        publish_counters(self._store, self._sessions, counters)
        self._sessions += 1
        return counters

    @contextmanager
    def lead(
        self,
        pipeline: Pipeline,
        reuse: ReuseSettings | None = None,
        kv: KVSettings | None = None,
        *,
        barrier: bool = False,
        identity: str = "",
    ) -> Iterator[tuple[Engine, GangCounters]]:
        """An engine whose work the gang does; on the leader.

        Args:
            pipeline: the model, with the first stage's layers.
            reuse: which steps are reused.
            kv: how much of the past is held.
            barrier: wait for all chunks of a tick before the next; for comparison.
            identity: names the model, its weights and their split; a checkpoint is taken up by the same only.

        Yields:
            The engine, and the counters of all ranks, which are there after the end.

        Raises:
            GangError: another rank has failed.
        """
        stage = StageModel(model=pipeline.model, attention=pipeline.attention)
        leader = Leader(stage, self._services, self._edges())
        leader.worker.counters.load_seconds = self._load_seconds
        engine = Engine(
            pipeline,
            leader,
            reuse=reuse or ReuseSettings(),
            kv=kv or KVSettings(),
            barrier=barrier,
            identity=identity,
            on_decoded=partial(self.tracer.add, "decode", track=1),
        )
        counters = GangCounters()
        yield engine, counters
        engine.close()
        publish_counters(self._store, self._sessions, leader.worker.finish())
        counters.ranks = collect_counters(self._store, self._sessions, self.mesh.layout.world_size)
        self._sessions += 1

    def write_trace(self, path: Path) -> None:
        """Write the traces of all ranks to one file; on the leader, once an engine is closed.

        Args:
            path: of the file; Chrome's and Perfetto's format.

        Raises:
            InputError: it cannot be written.
        """
        others = range(1, self.mesh.layout.world_size)
        shipped = [shipped_events(self._store, session, rank) for session in range(self._sessions) for rank in others]
        merge_traces([self.tracer.lines(), *shipped], path)

    @property
    def _services(self) -> RankServices:
        return RankServices(
            mesh=self.mesh, groups=self._groups, store=self._store, monitor=self.monitor, tracer=self.tracer
        )

    def _edges(self) -> Edges:
        return Edges(self.mesh, self._groups, self.monitor, self.tracer)


@contextmanager
def open_gang(
    env: RankEnv,
    layout: Layout,
    *,
    timeouts: Timeouts = _DEFAULTS,
    trace: bool = False,
    device: torch.device | None = None,
) -> Iterator[Gang]:
    """Join the other ranks.

    Args:
        env: this rank's.
        layout: of all ranks.
        timeouts: how long to wait for others.
        trace: remember what is done when.
        device: in place of the env's own.

    Yields:
        The gang.

    Raises:
        InputError: the layout does not fit the number of ranks.
        GangError: a rank has failed; one line says which, and at what. Who catches it shows it if its own rank is
            the failure's `reporter` and no launcher does, and then ends by `leave`; a process that was started by a
            launcher is ended soon in any case.
    """
    layout.check_world(env.world_size)
    mesh = Mesh(layout=layout, rank=env.rank)
    try:
        served = serve_store(env, timeouts.first)
        store, own = connect(env, timeouts.first), connect(env, timeouts.silent)
    except RuntimeError as error:
        raise InputError(f"the ranks cannot meet at {env.host}:{env.port}: {str(error).splitlines()[0]}") from None
    monitor = Monitor(own, mesh, timeouts, env)
    monitor.start()
    try:
        with open_groups(env, mesh, timeouts, device or pick_device(env)) as groups:
            place = {"stage": mesh.stage, "cp_rank": mesh.cp_rank}
            tracer = Tracer(env.rank, mesh.name(env.rank), wanted=trace, about=place)
            yield Gang(mesh, groups, store, monitor, tracer)
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
        monitor.fail("stopped", status=INTERRUPTED)
        return
    if isinstance(error, SystemExit | GeneratorExit):
        monitor.fail(f"{mesh.name(mesh.rank)} was told to stop", status=INTERRUPTED)
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
