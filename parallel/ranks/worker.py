"""One rank's part of the computation: its layers, its heads of the KV, and the flags that it has been told.

It is given headers and hidden states and gives hidden states; it does not know whom they come from or go to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.files import AsyncSave, Contents, Shard, read_contents
from engine.checkpoint.snapshot import pack_share, rank_file, unpack_share
from engine.executor import Admission, Stage
from engine.kv.buffer import KVBuffer
from engine.reuse.flags import FlagLog, FlagState
from engine.schedule import Schedule
from engine.video import WorkItem
from models.attention import Attention
from models.errors import InputError
from models.protocols import VideoModel
from parallel.comm.edges import Edges
from parallel.comm.groups import Groups
from parallel.comm.messages import Admit, Header, Kind, Message, pack_values, unpack_admit, unpack_values
from parallel.comm.ulysses import TokenSplit, UlyssesShare, local_heads
from parallel.health.monitor import Monitor
from parallel.topology.mesh import Mesh
from parallel.trace.counters import DeviceTimer, OnMeasured, RankCounters
from parallel.trace.tracer import Tracer


@dataclass(frozen=True, kw_only=True, slots=True)
class StageModel:
    """The layers of a stage."""

    model: VideoModel
    attention: Attention  # what KV views attend with


def describe(item: WorkItem) -> str:
    """A work item in words."""
    return f"request {item.request}, tick {item.tick}, chunk {item.chunk} ({item.what.name})"


class StageWorker:
    """Runs work items on this rank's layers, and counts.

    Args:
        stage: the layers.
        mesh: this rank's place.
        groups: for the exchange with the other ranks of the stage.
        monitor: told what this rank does.
        tracer: told when.
        flag_log: makes the log of a request's flags.
    """

    def __init__(
        self,
        stage: StageModel,
        mesh: Mesh,
        groups: Groups,
        monitor: Monitor,
        tracer: Tracer,
        flag_log: Callable[[Schedule], FlagLog] = FlagLog,
    ) -> None:
        self._model, self._attention = stage.model, stage.attention
        self._mesh, self._groups, self._monitor, self._timeline = mesh, groups, monitor, tracer
        self._flag_log = flag_log
        self._stage = Stage(stage.model)
        self._flags: dict[int, FlagLog] = {}
        self._splits: dict[int, TokenSplit] = {}
        self._writings: dict[int, AsyncSave] = {}
        self._stopwatch = DeviceTimer(stage.model.kv.device)
        layers = stage.model.kv.layers
        self._report = RankCounters(
            rank=mesh.rank,
            stage=mesh.stage,
            cp_rank=mesh.cp_rank,
            layers=(layers.start, layers.stop),
            weight_bytes=stage.model.weight_bytes,
        )

    @property
    def report(self) -> RankCounters:
        """What was counted so far; `busy` is set by `finish`."""
        return self._report

    @property
    def model(self) -> VideoModel:
        """The weights."""
        return self._model

    def ready(self) -> None:
        """Loading is over; this rank waits for work."""
        self._monitor.waiting()

    def finish(self) -> RankCounters:
        """The report, once all work is done."""
        self._report.busy = self._stopwatch.seconds()
        return self._report

    def admit(self, admit: Admit) -> None:
        """Take a request in.

        Raises:
            InputError: this layout cannot serve it.
        """
        ranks, tokens = self._mesh.layout.cp, admit.kv.chunk_tokens
        if tokens < ranks:
            raise InputError(f"a chunk has {tokens} tokens, too few for --cp {ranks}")
        split = TokenSplit(tokens, ranks)
        share = None
        if self._groups.cp is not None:
            share = UlyssesShare(split, self._mesh.cp_rank, self._groups.cp, through_host=self._groups.through_host)
        geometry = local_heads(self._model.kv, ranks)
        kv, log = admit.kv.allocate(geometry, self._attention), self._flag_log(admit.schedule)
        if admit.checkpoint is not None:
            self._restore(Path(admit.checkpoint), kv, log)
        admission = Admission(
            kv=kv,
            captions=admit.captions.to(geometry.device),
            grid=admit.grid,
            share=share,
        )
        self._stage.admit(admit.request, admission)
        self._flags[admit.request] = log
        self._splits[admit.request] = split

    def release(self, header: Header) -> None:
        """Let go of a request; its flags must be the head's.

        Raises:
            FlagMismatch: they are not.
        """
        self._follow(header)
        self._stage.release(header.request)
        self._splits.pop(header.request)
        self._writings.pop(header.request, None)  # what is still being written comes to nothing
        self.report.digests[str(header.request)] = self._flags.pop(header.request).digest.hex()

    def run(self, header: Header, hidden: Tensor) -> Tensor:
        """Run an item on hidden states [1, s, D] of this rank's tokens.

        Raises:
            FlagMismatch: this rank's flags are not the head's.
        """
        item = header.item
        assert item is not None
        self._monitor.working(describe(item))
        self._follow(header)
        retires = any(op.kind == "retire" for op in item.before)
        with self._stopwatch.measure(self._span("compress", item) if retires else None):
            self._stage.change(item)
        with self._stopwatch.measure(self._span("compute", item)):
            hidden = self._stage.forward(item, hidden)
        self.report.items += 1
        self._monitor.waiting()
        return hidden

    def _span(self, kind: str, item: WorkItem) -> OnMeasured:
        """Traces a span once the device has passed its end."""
        return lambda began, ended: self._timeline.add(kind, began, item, ended=ended)

    def embed(self, item: WorkItem, x: Tensor) -> list[Tensor]:
        """Patch embeddings [1, s, D] of a latent for each cp_rank of the stage; on the head only."""
        with torch.no_grad():
            patches = self._model.patches(x)
        slices = self._splits[item.request].slices
        return [patches] if len(slices) == 1 else [patches[:, part].contiguous() for part in slices]

    def velocity(self, item: WorkItem, parts: list[Tensor]) -> Tensor:
        """Velocity [1, C, T, h, w] of the hidden states of all slots; on the tail only."""
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        with torch.no_grad():
            return self._model.velocity(hidden, self._stage.admitted(item.request).grid).contiguous()

    def kv(self, request: int) -> KVBuffer:
        """The KV buffers of a request."""
        return self._stage.admitted(request).kv

    def flags(self, request: int) -> FlagState:
        """How far the log of a request's flags is."""
        return self._flags[request].state()

    def save(
        self,
        header: Header,
        place: Path,
        others: Mapping[str, Contents] | None = None,
        on_done: Callable[[], None] = lambda: None,
    ) -> AsyncSave:
        """Take a snapshot of a request's KV and begin to write it; later items do not touch it.

        Args:
            header: of the message that asks for it.
            place: folder of the checkpoint.
            others: what else to write, by file name.
            on_done: called by another thread once all is written.

        Raises:
            FlagMismatch: this rank's flags are not the head's.
        """
        self._monitor.working(f"request {header.request}, snapshot")
        began = time.perf_counter()
        self._follow(header)
        share = pack_share(self.kv(header.request).state(), self.flags(header.request), self._about())
        writing = AsyncSave(place, {rank_file(self._mesh.rank): share, **(others or {})}, on_done)
        self._writings[header.request] = writing
        self.report.checkpoints += 1
        self._timeline.add("snapshot", began)
        self._monitor.waiting()
        return writing

    def saved(self, request: int) -> tuple[Shard, ...]:
        """The files of the last snapshot of a request, once they are on the disk.

        Raises:
            InputError: one cannot be written.
        """
        self._monitor.working(f"request {request}, writing a checkpoint")
        shards = self._writings.pop(request).shards()
        self._monitor.waiting()
        return shards

    def _restore(self, place: Path, kv: KVBuffer, log: FlagLog) -> None:
        path = place / rank_file(self._mesh.rank)
        contents = read_contents(path)
        if contents.values.get("about") != self._about():
            then, now = contents.values.get("about"), self._about()
            raise InputError(f"the checkpoint {path} is of another split: {then}, now {now}; delete it to start anew")
        try:
            state, flags = unpack_share(contents)
            kv.restore(state)
            log.restore(flags)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"the checkpoint {path} does not fit: {error}; delete it to start anew") from None

    def _about(self) -> dict[str, object]:
        """What tells this rank's share of a request from others."""
        mesh, layers = self._mesh, self._model.kv.layers
        return {"stage": mesh.stage, "cp_rank": mesh.cp_rank, "layers": [layers.start, layers.stop]}

    def _follow(self, header: Header) -> None:
        log = self._flags[header.request]
        log.add(header.flags)
        log.check(header.item, header.digest)


class WorkerLoop:
    """Serves until the lead says that nothing more will come.

    Args:
        runner: this rank's layers.
        links: its messages.
        tracer: told how long it waited.
    """

    def __init__(self, runner: StageWorker, links: Edges, tracer: Tracer) -> None:
        self._runner, self._links, self._timeline = runner, links, tracer

    def run(self) -> None:
        """Work off the stream.

        Raises:
            GangError: another rank has failed.
            FlagMismatch: the flags that this rank was told do not add up.
        """
        report = self._runner.report
        self._runner.ready()
        while True:
            began = time.perf_counter()
            message = self._links.take()
            header = message.header
            report.waiting += message.waited
            self._timeline.add("wait", began)
            if header.kind is Kind.ITEM:
                report.item_bytes += message.nbytes
                self._run(message)
            elif header.kind is Kind.ADMIT:
                assert message.payload is not None
                self._links.announce(header, message.payload)
                self._runner.admit(unpack_admit(message.payload))
            elif header.kind is Kind.RELEASE:
                self._links.announce(header)
                self._runner.release(header)
            elif header.kind is Kind.CHECKPOINT:
                report.checkpoint_bytes += message.nbytes
                self._links.announce(header, message.payload)  # first, so that all ranks write at the same time
                self._runner.save(header, Path(unpack_values(message.payload)))
            elif header.kind is Kind.SAVED:
                report.checkpoint_bytes += message.nbytes
                self._saved(message)
            elif header.kind is Kind.LEAVE:
                self._links.leave()
                report.sent_bytes = self._links.sent_bytes
                return

    def _run(self, message: Message) -> None:
        header, links, runner = message.header, self._links, self._runner
        assert message.payload is not None and header.item is not None
        hidden = runner.run(header, message.payload)
        links.done(message)
        links.on(header, hidden)
        if not header.item.what.weight:
            return  # run for its KV alone: nobody waits for its velocity
        if links.reads_velocity:
            parts = links.parts(header)
            velocity = runner.velocity(
                header.item, [hidden, *(part.payload for _, part in parts if part.payload is not None)]
            )
            for inbox, part in parts:
                runner.report.item_bytes += part.nbytes
                inbox.done(part)
            links.result(Header(kind=Kind.VELOCITY, request=header.request, item=header.item), velocity)
        elif links.is_tail:
            links.part(header, hidden)

    def _saved(self, message: Message) -> None:
        """The ranks before this one have their files on the disk: wait for one's own, and say so."""
        header, links = message.header, self._links
        files = unpack_values(message.payload)
        files += [asdict(shard) for shard in self._runner.saved(header.request)]
        if links.reads_velocity:
            for inbox, part in links.parts(header):
                self._runner.report.checkpoint_bytes += part.nbytes
                files += unpack_values(part.payload)
                inbox.done(part)
            links.result(header, pack_values(files))
        elif links.is_tail:
            links.part(header, pack_values(files))
        else:
            links.on(header, pack_values(files))
