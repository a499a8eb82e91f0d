"""Every rank but the leader: receive what comes, run it on this rank's layers, send it on.

`StageWorker` is one rank's part of the computation, and the leader has one too: its layers, its heads of the KV, the
flags it was sent, and what it counts. `WorkerLoop` works off the stream of messages in order and decides nothing; there
is no other synchronisation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import Store

from engine.checkpoint.files import Contents, Shard, write_async
from engine.executor import Admission, Stage, TokenShard
from engine.kv.buffer import KVBuffer
from engine.reuse.flags import FlagLog
from engine.schedule import Schedule
from engine.video import WorkItem
from models.attention import Attention
from models.errors import InputError
from models.protocols import VideoModel
from parallel.comm.edges import Edges
from parallel.comm.groups import Groups
from parallel.comm.messages import Header, Kind, Message, unpack_admit, unpack_json
from parallel.comm.ulysses import TokenSplit, UlyssesShard, local_heads
from parallel.health.errors import BAD_INPUT
from parallel.health.monitor import Monitor
from parallel.topology.mesh import Mesh
from parallel.trace.counters import DeviceTimer, OnMeasured, RankCounters
from parallel.trace.tracer import Tracer


@dataclass(frozen=True, kw_only=True, slots=True)
class StageModel:
    """The layers of a stage."""

    model: VideoModel
    attention: Attention  # what KV views attend with


@dataclass(frozen=True, kw_only=True, slots=True)
class RankServices:
    """What a rank has besides its layers."""

    mesh: Mesh
    groups: Groups  # for the exchange with the other ranks of the stage
    store: Store  # where ranks leave small things for the leader
    monitor: Monitor  # notified of what this rank does
    tracer: Tracer


def describe(item: WorkItem) -> str:
    """A work item in words."""
    return f"request {item.request}, tick {item.tick}, chunk {item.chunk} ({item.what.name})"


class StageWorker:
    """Runs work items on this rank's layers, and counts.

    Args:
        stage: the layers.
        services: of this rank.
        new_log: makes the log of a video's flags.
    """

    def __init__(
        self, stage: StageModel, services: RankServices, new_log: Callable[[Schedule], FlagLog] = FlagLog
    ) -> None:
        mesh, model = services.mesh, stage.model
        self._mesh, self._groups, self._store = mesh, services.groups, services.store
        self._monitor, self._tracer = services.monitor, services.tracer
        place = {"stage": mesh.stage, "cp_rank": mesh.cp_rank}
        self._stage = Stage(model, stage.attention, rank=mesh.rank, place=place, new_log=new_log)
        self._splits: dict[int, TokenSplit] = {}
        self._timer = DeviceTimer(model.kv.device)
        layers = model.kv.layers
        self.counters = RankCounters(
            rank=mesh.rank,
            stage=mesh.stage,
            cp_rank=mesh.cp_rank,
            layers=(layers.start, layers.stop),
            transfer=services.groups.transfer,
            weight_bytes=model.weight_bytes,
        )

    def ready(self) -> None:
        """Loading is over; this rank waits for work."""
        self._monitor.waiting()

    def finish(self) -> RankCounters:
        """The counters, once all work is done."""
        self.counters.busy = self._timer.seconds()
        return self.counters

    def admit(self, admission: Admission) -> None:
        """Take a video in.

        Raises:
            InputError: this layout cannot serve it.
        """
        ranks, tokens = self._mesh.layout.cp, admission.kv.chunk_tokens
        if tokens < ranks:
            raise InputError(f"a chunk has {tokens} tokens, too few for --cp {ranks}")
        split, groups = TokenSplit(tokens, ranks), self._groups
        shard: TokenShard | None = None
        if groups.cp is not None:
            shard = UlyssesShard(split, self._mesh.cp_rank, groups.cp, through_host=groups.transfer == "host")
        geometry = local_heads(self._stage.model.kv, ranks)
        self._stage.admit(admission, geometry=geometry, shard=shard)
        self._splits[admission.video] = split

    def release(self, header: Header) -> None:
        """Let go of a video; its flags must be the leader's.

        Raises:
            FlagMismatch: they are not.
        """
        self._follow(header)
        self.counters.digests[str(header.request)] = self._stage.flags(header.request).digest.hex()
        self._stage.release(header.request)
        self._splits.pop(header.request)

    def run(self, header: Header, hidden: Tensor) -> Tensor:
        """Run an item on hidden states [1, s, D] of this rank's tokens.

        Raises:
            FlagMismatch: this rank's flags are not the leader's.
        """
        item = header.item
        assert item is not None
        with self._working(describe(item)):
            self._follow(header)
            retires = any(op.kind == "retire" for op in item.before)
            with self._timer.measure(self._span("compress", item) if retires else None):
                self._stage.change(item)
            with self._timer.measure(self._span("compute", item)):
                hidden = self._stage.forward(item, hidden)
            self.counters.items += 1
        return hidden

    def _span(self, kind: str, item: WorkItem) -> OnMeasured:
        """Traces a span once the device has passed its end."""
        return lambda began, ended: self._tracer.add(kind, began, item, ended=ended)

    def embed(self, item: WorkItem, x: Tensor) -> list[Tensor]:
        """Patch embeddings [1, s, D] of a latent for each cp_rank of the stage; on the first stage only."""
        patches, slices = self._stage.embed(x), self._splits[item.request].slices
        return [patches] if len(slices) == 1 else [patches[:, part].contiguous() for part in slices]

    def velocity(self, item: WorkItem, parts: list[Tensor]) -> Tensor:
        """Velocity [1, C, T, h, w] of the hidden states of all cp_ranks; on the last stage only."""
        return self._stage.velocity(item, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def kv(self, video: int) -> KVBuffer:
        """The KV buffers of a video."""
        return self._stage.kv(video)

    def flags(self, video: int) -> FlagLog:
        """The log of a video's flags."""
        return self._stage.flags(video)

    def save(
        self,
        header: Header,
        folder: Path,
        others: Mapping[str, Contents] | None = None,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Take a snapshot of a video's KV and begin to write it; later items do not touch it.

        The writer's thread leaves the names of the files in the store, so a slow disk holds up no rank's loop. A file
        that cannot be written ends the gang.

        Args:
            header: of the message that asks for it.
            folder: of the checkpoint.
            others: what else to write, by file name.
            on_done: called in the thread once all is written.

        Raises:
            FlagMismatch: this rank's flags are not the leader's.
        """

        def written(shards: tuple[Shard, ...]) -> None:
            self._store.set(saved_key(folder, self._mesh.rank), json.dumps([asdict(shard) for shard in shards]))
            on_done()

        with self._working(f"request {header.request}, snapshot"):
            began = time.perf_counter()
            self._follow(header)
            write_async(folder, {**self._stage.snapshot(header.request), **(others or {})}, written, self._not_written)
            self.counters.checkpoints += 1
            self._tracer.add("snapshot", began)

    def _not_written(self, error: Exception) -> None:
        if isinstance(error, InputError):
            self._monitor.fail(str(error), status=BAD_INPUT)
        else:
            self._monitor.fail(f"{self._mesh.name(self._mesh.rank)}: {type(error).__name__}: {error}")

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """While this rank does something; after an error the monitor still says at what."""
        self._monitor.working(what)
        yield
        self._monitor.waiting()

    def _follow(self, header: Header) -> None:
        flags = self._stage.flags(header.request)
        flags.add(header.flags)
        flags.check(header.item, header.digest)


def saved_key(folder: Path, rank: int) -> str:
    """Where a rank leaves the names of its files of a checkpoint, in the store."""
    return f"saved/{folder.name}/{rank}"


class WorkerLoop:
    """Serves until the leader says that nothing more will come.

    Args:
        worker: this rank's layers.
        edges: its messages.
        tracer: takes how long it waited.
    """

    def __init__(self, worker: StageWorker, edges: Edges, tracer: Tracer) -> None:
        self._worker, self._edges, self._tracer = worker, edges, tracer

    def run(self) -> None:
        """Work off the stream.

        Raises:
            GangError: another rank has failed.
            FlagMismatch: the flags that this rank was sent do not add up.
        """
        worker, edges, counters = self._worker, self._edges, self._worker.counters
        worker.ready()
        while True:
            began = time.perf_counter()
            message = edges.receive()
            header = message.header
            counters.waiting += message.waited
            self._tracer.add("wait", began)
            if header.kind is Kind.ITEM:
                counters.item_bytes += message.nbytes
                self._run(message)
            elif header.kind is Kind.ADMIT:
                assert message.payload is not None
                edges.announce(header, message.payload)
                worker.admit(unpack_admit(message.payload))
            elif header.kind is Kind.RELEASE:
                edges.announce(header)
                worker.release(header)
            elif header.kind is Kind.CHECKPOINT:
                counters.checkpoint_bytes += message.nbytes
                edges.announce(header, message.payload)  # first, so that all ranks write at the same time
                worker.save(header, Path(unpack_json(message.payload)))
            elif header.kind is Kind.LEAVE:
                edges.leave()
                counters.sent_bytes = edges.sent_bytes
                return

    def _run(self, message: Message) -> None:
        header, edges, worker = message.header, self._edges, self._worker
        assert message.payload is not None and header.item is not None
        hidden = worker.run(header, message.payload)
        edges.send_on(header, hidden)
        if not header.item.what.weight:
            return  # run for its KV alone: nobody waits for its velocity
        if edges.reads_velocity:
            velocity = read_velocity(worker, edges, header, hidden)
            edges.send_result(Header(kind=Kind.VELOCITY, request=header.request, item=header.item), velocity)
        elif edges.is_tail:
            edges.send_part(header, hidden)


def read_velocity(worker: StageWorker, edges: Edges, header: Header, hidden: Tensor) -> Tensor:
    """The velocity [1, C, T, h, w] of an item, of this rank's hidden states and those of the other cp_ranks."""
    assert header.item is not None
    parts = edges.receive_parts(header)
    worker.counters.item_bytes += sum(part.nbytes for part in parts)
    others = [part.payload for part in parts if part.payload is not None]
    return worker.velocity(header.item, [hidden, *others])
