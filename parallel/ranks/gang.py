"""A gang: the pp x cp ranks that hold one copy of a model, from this rank's point of view.

It opens the process groups, watches the other ranks, and serves models one after another: on the leader as an engine,
on workers as a loop. An error on any rank ends all of them with one message.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from engine.engine import Engine
from engine.executor import KVWatcher
from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from models.protocols import Pipeline
from parallel.comm.edges import Edges, RankServices
from parallel.comm.groups import open_groups, pick_device
from parallel.comm.sockets import interface_of
from parallel.comm.store import connect, meet
from parallel.health.exit_codes import BAD_INPUT, INTERRUPTED
from parallel.health.failure import GangError
from parallel.health.monitor import Monitor, is_connection_error
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh
from parallel.ranks.environment import RankEnv, listening_at
from parallel.ranks.leader import Leader
from parallel.ranks.worker import StageModel, StageWorker, serve
from parallel.trace import RankCounters, Tracer, collect_counters, merge_traces, publish_counters, shipped_events

_DEFAULTS, _NO_REUSE, _OWN_RANGE = Timeouts(), ReuseSettings(), KVSettings()


class Gang:
    """The gang that this rank belongs to. Opened by `open_gang`."""

    def __init__(self, services: RankServices) -> None:
        self._services, self._store = services, services.store
        self.mesh, self.tracer, self.monitor = services.mesh, services.tracer, services.monitor
        self.device, self.transfer = services.groups.device, services.groups.transfer
        self._sessions, self._load_seconds = 0, 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the loading of weights, which is measured and may take long."""
        self.monitor.working("loading")
        began = time.perf_counter()
        yield
        self._load_seconds = time.perf_counter() - began

    def serve(self, stage: StageModel) -> RankCounters:
        """Serve with these layers until the leader lets go, on every rank but the leader; gives this rank's counters.

        A GangError if another rank has failed.
        """
        worker = StageWorker(stage, self._services, self._load_seconds)
        serve(worker, Edges(self._services), self.tracer)
        self.tracer.ship(self._store, self._sessions)
        publish_counters(self._store, self._sessions, worker.finish())
        self._sessions += 1
        return worker.counters

    @contextmanager
    def lead(
        self,
        pipeline: Pipeline,
        reuse: ReuseSettings = _NO_REUSE,
        kv: KVSettings = _OWN_RANGE,
        *,
        barrier: bool = False,
        identity: str = "",
        watcher: KVWatcher | None = None,
    ) -> Iterator[tuple[Engine, list[RankCounters]]]:
        """An engine whose work the gang does; on the leader. Arguments are those of `Engine` and of `StageModel`.

        With it comes a list that takes the counters of all ranks at the end. A GangError if a rank has failed.
        """
        stage = StageModel(model=pipeline.model, attention=pipeline.attention, watcher=watcher)
        leader = Leader(StageWorker(stage, self._services, self._load_seconds), self._services)
        decoded, counters = partial(self.tracer.add, "decode", track=1), list[RankCounters]()
        engine = Engine(pipeline, leader, reuse=reuse, kv=kv, barrier=barrier, identity=identity, on_decoded=decoded)
        yield engine, counters
        engine.close()
        publish_counters(self._store, self._sessions, leader.worker.finish())
        counters += collect_counters(self._store, self._sessions, self.mesh.layout.world_size)
        self._sessions += 1

    def collect(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Small tensors of all ranks, by rank; on the leader, nothing elsewhere. Every rank calls it, after a model."""
        own = {name: part.contiguous() for name, part in tensors.items()}
        self._store.set(f"collected/{self._sessions}/{self.mesh.rank}", save(own))
        if not self.mesh.leads:
            return []
        keys = [f"collected/{self._sessions}/{rank}" for rank in range(self.mesh.layout.world_size)]
        return [load(raw) for raw in self._store.multi_get(keys)]

    def write_trace(self, path: Path) -> None:
        """Write the traces of all ranks in Chrome's and Perfetto's format; on the leader, once an engine is closed."""
        others = range(1, self.mesh.layout.world_size)
        shipped = [shipped_events(self._store, session, rank) for session in range(self._sessions) for rank in others]
        merge_traces([self.tracer.lines(), *shipped], path)


@contextmanager
def open_gang(
    env: RankEnv,  # this rank's
    layout: Layout,  # of all ranks
    *,
    timeouts: Timeouts = _DEFAULTS,  # how long to wait for others
    trace: bool = False,  # remember what is done when
    device: torch.device | None = None,  # in place of the env's own
    interface: str | None = None,  # network interface to listen at, of ranks on several machines
) -> Iterator[Gang]:
    """Join the other ranks.

    Raises:
        InputError: the layout does not fit the number of ranks, or they cannot meet.
        GangError: a rank has failed; one line says which, and at what. Who catches it shows it if its own rank is
            the failure's `reporter` and no launcher does, and then ends by `leave`; a process that was started by a
            launcher is ended soon in any case.
    """
    layout.check_world(env.world_size)
    mesh = Mesh(layout=layout, rank=env.rank)
    try:
        server, address = meet(env, interface, timeouts.first)
        store, groups_store = connect(env, address, timeouts.first), connect(env, address, timeouts.first)
        own = connect(env, address, timeouts.silent)
    except (RuntimeError, OSError) as error:
        raise InputError(f"the ranks cannot meet at {env.host}:{env.port}: {str(error).splitlines()[0]}") from None
    monitor = Monitor(own, mesh, timeouts, env)
    monitor.start()
    try:
        at = interface_of("127.0.0.1") if env.one_machine else interface
        with (
            listening_at(at),
            open_groups(env, mesh, groups_store, timeouts.first, device or pick_device(env)) as groups,
        ):
            tracer = Tracer(mesh, wanted=trace)
            yield Gang(RankServices(mesh=mesh, groups=groups, store=store, monitor=monitor, tracer=tracer))
    except BaseException as error:
        try:
            _fail(monitor, mesh, error)
        finally:
            monitor.hand_over()
        raise
    else:
        monitor.stop()
    finally:
        if server is not None:
            server.close()


def _fail(monitor: Monitor, mesh: Mesh, error: BaseException) -> None:
    """Report what has ended this rank, and raise what was reported first."""
    if isinstance(error, GangError):
        return
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        text = "stopped" if isinstance(error, KeyboardInterrupt) else f"{mesh.name(mesh.rank)} was told to stop"
        monitor.fail(text, status=INTERRUPTED)
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
