"""Every rank but the leader: receive what comes, run it on this rank's layers, send it on.

`StageWorker` is one rank's part of the computation, and the leader has one too: its layers, its heads of the KV, the
flags it was sent, and what it counts. `serve` works off the stream of messages in order and decides nothing; there is
no other synchronisation.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.contents import RUN_FILE, Contents
from engine.checkpoint.files import Shard, write_async
from engine.executor import KVWatcher, Stage, TokenShard
from engine.request import Admission
from engine.video import WorkItem
from models.attention import Attention
from models.errors import InputError
from models.protocols import VideoModel
from parallel.comm.edges import Edges, RankServices
from parallel.comm.messages import Header, Kind, Message, unpack_admit, unpack_json, unpack_text
from parallel.comm.ulysses import TokenSplit, UlyssesShard, local_heads
from parallel.trace import DeviceTimer, OnMeasured, RankCounters, Tracer


@dataclass(frozen=True, kw_only=True, slots=True)
class StageModel:
    """The layers of a stage."""

    model: VideoModel
    attention: Attention  # what KV views attend with
    watcher: KVWatcher | None = None  # called with what compressions keep here


def describe(item: WorkItem) -> str:
    """A work item in words."""
    tick, chunk = item.place
    return f"request {item.request}, tick {tick}, chunk {chunk} ({item.what.name})"


class StageWorker:
    """Runs work items on this rank's layers, whose loading took `load_seconds`, and counts."""

    def __init__(self, stage: StageModel, services: RankServices, load_seconds: float) -> None:
        mesh, model = services.mesh, stage.model
        self._mesh, self._groups, self._store = mesh, services.groups, services.store
        self._monitor, self._tracer = services.monitor, services.tracer
        place = {"stage": mesh.stage, "cp_rank": mesh.cp_rank}
        self.stage = Stage(model, stage.attention, rank=mesh.rank, place=place, watcher=stage.watcher)
        self._splits: dict[int, TokenSplit] = {}
        self._saving: dict[int, str] = {}  # key of each video's last checkpoint in the store
        self._saving_lock = threading.Lock()
        self._timer = DeviceTimer(model.kv.device)
        layers = model.kv.layers.start, model.kv.layers.stop
        self.counters = RankCounters(rank=mesh.rank, stage=mesh.stage, cp_rank=mesh.cp_rank, layers=layers)
        self.counters.transfer, self.counters.load_seconds = services.groups.transfer, load_seconds
        self.counters.weight_bytes = model.weight_bytes
        self._monitor.waiting()

    def finish(self) -> RankCounters:
        """The counters, once all work is done."""
        self.counters.busy = self._timer.seconds()
        return self.counters

    def admit(self, admission: Admission) -> None:
        """Take a video in; an InputError if this layout cannot serve it."""
        ranks, tokens = self._mesh.layout.cp, admission.kv.chunk_tokens
        if tokens < ranks:
            raise InputError(f"a chunk has {tokens} tokens, too few for --cp {ranks}")
        split, groups = TokenSplit(tokens, ranks), self._groups
        shard: TokenShard | None = None
        if groups.cp is not None:
            shard = UlyssesShard(split, self._mesh.cp_rank, groups.cp, through_host=groups.transfer == "host")
        geometry = local_heads(self.stage.model.kv, ranks)
        self.stage.admit(admission, geometry=geometry, shard=shard)
        self._splits[admission.video] = split

    def release(self, header: Header) -> None:
        """Let go of a video; a FlagMismatch if its flags are not the leader's."""
        self._follow(header)
        self.counters.finished(header.request, self.stage.flags(header.request).digest)
        self.stage.release(header.request)
        self._splits.pop(header.request)
        with self._saving_lock:
            if (key := self._saving.pop(header.request, None)) is not None:
                self._store.delete_key(key)  # nobody has read it if the video was cancelled

    def run(self, header: Header, hidden: Tensor) -> Tensor:
        """Run an item on hidden states [1, s, D] of this rank's tokens; a FlagMismatch as in `release`."""
        item = header.item
        assert item is not None
        with self._working(describe(item)):
            self._follow(header)
            retires = any(op.kind == "retire" for op in item.before)
            with self._timer.measure(self._span("compress", item) if retires else None):
                self.stage.change(item)
            with self._timer.measure(self._span("compute", item)):
                hidden = self.stage.forward(item, hidden)
            self.counters.items += 1
        return hidden

    def mark(self, header: Header) -> Header:
        """A header with this rank in it, if something of the request was not finite here and at no rank before."""
        if header.not_finite >= 0 or self.stage.finite.found(header.request) is None:
            return header
        return replace(header, not_finite=self._mesh.rank)

    def _span(self, kind: str, item: WorkItem) -> OnMeasured:
        """Traces a span once the device has passed its end."""
        return lambda began, ended: self._tracer.add(kind, began, item, ended=ended)

    def embed(self, item: WorkItem, x: Tensor) -> list[Tensor]:
        """Patch embeddings [1, s, D] of a latent for each cp_rank of the stage; on the first stage only."""
        patches, slices = self.stage.embed(x), self._splits[item.request].slices
        return [patches] if len(slices) == 1 else [patches[:, part].contiguous() for part in slices]

    def save(
        self, header: Header, folder: Path, run: Contents | None = None, on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Take a snapshot of a video's KV and begin to write it; later items do not touch it.

        The writer's thread leaves the names of the files in the store, or why there are none, so a slow disk holds up
        no rank's loop; they go with the video. Flags that are not the leader's end the gang. The leader writes the
        `run` too. `on_done` is called in the thread once all is written, or cannot be.
        """
        video, key = header.request, saved_key(folder, self._mesh.rank)

        def ended(written: tuple[Shard, ...] | Exception) -> None:
            if isinstance(written, Exception) and not isinstance(written, InputError):
                self._monitor.fail(f"{self._mesh.name(self._mesh.rank)}: {type(written).__name__}: {written}")
                return
            result = str(written) if isinstance(written, InputError) else [asdict(shard) for shard in written]
            with self._saving_lock:
                if self._saving.get(video) == key:  # else it was cancelled
                    self._store.set(key, json.dumps(result))
            on_done()

        with self._working(f"request {video}, snapshot"):
            began = time.perf_counter()
            self._follow(header)
            self._saving[video] = key
            files = self.stage.snapshot(video) | ({} if run is None else {RUN_FILE: run})
            write_async(folder, files, ended)
            self.counters.checkpoints += 1
            self._tracer.add("snapshot", began)

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """While this rank does something; after an error the monitor still says at what."""
        self._monitor.working(what)
        yield
        self._monitor.waiting()

    def _follow(self, header: Header) -> None:
        flags = self.stage.flags(header.request)
        flags.add(header.flags)
        flags.check(header.item, header.digest)


def saved_key(folder: Path, rank: int) -> str:
    """Where a rank leaves the names of its files of a checkpoint, in the store."""
    return f"saved/{folder.name}/{rank}"


def serve(worker: StageWorker, edges: Edges, tracer: Tracer) -> None:
    """Work off the stream of messages until the leader says that nothing more will come.

    A GangError if another rank has failed; a FlagMismatch if the flags that this rank was sent do not add up.
    """
    counters = worker.counters
    while True:
        began = time.perf_counter()
        message = edges.receive()
        header = message.header
        counters.waiting += message.waited
        tracer.add("wait", began)
        if header.kind is Kind.ITEM:
            counters.item_bytes += message.nbytes
            _run(worker, edges, message)
        elif header.kind is Kind.ADMIT:
            assert message.payload is not None
            edges.announce(header, message.payload)
            worker.admit(unpack_admit(message.payload))
        elif header.kind is Kind.TEXT:
            edges.announce(header, message.payload)
            worker.stage.change_text(header.request, *unpack_text(message.payload))
        elif header.kind is Kind.RELEASE:
            edges.announce(header)
            worker.release(header)
        elif header.kind is Kind.CHECKPOINT:
            counters.checkpoint_bytes += message.nbytes
            edges.announce(header, message.payload)  # first, so that all ranks write at the same time
            worker.save(header, Path(unpack_json(message.payload)))
        elif header.kind is Kind.LEAVE:
            counters.sent_bytes = edges.leave()
            return


def _run(worker: StageWorker, edges: Edges, message: Message) -> None:
    header = message.header
    assert message.payload is not None and header.item is not None
    weighs = header.item.what.weight
    hidden = worker.run(header, message.payload)
    header = worker.mark(header)
    edges.send_on(header, hidden)
    if not weighs:
        return  # run for its KV alone: nobody waits for its velocity
    if edges.reads_velocity:
        header, velocity = read_velocity(worker, edges, header, hidden)
        edges.send_back(replace(header, kind=Kind.VELOCITY, flags=(), digest=bytes(8)), velocity)
    elif edges.is_tail:
        edges.send_back(header, hidden)


def read_velocity(worker: StageWorker, edges: Edges, header: Header, hidden: Tensor) -> tuple[Header, Tensor]:
    """The velocity [1, C, T, h, w] of an item, of this rank's hidden states and those of the other cp_ranks.

    With its header, marked by all of these ranks.
    """
    assert header.item is not None
    parts = edges.receive_parts(header)
    worker.counters.item_bytes += sum(part.nbytes for part in parts)
    hiddens = [hidden, *(part.payload for part in parts if part.payload is not None)]
    velocity = worker.stage.velocity(header.item, hidden if len(hiddens) == 1 else torch.cat(hiddens, dim=1))
    marked = [rank for rank in (header.not_finite, *(part.header.not_finite for part in parts)) if rank >= 0]
    return worker.mark(replace(header, not_finite=min(marked, default=-1))), velocity
