"""The lead: orders the work of several videos, decides reuse, runs the first stage, and takes the results in.

Work of all videos in flight is begun in the order in which it became ready. There is no barrier: the lead runs whatever
is ready, and waits for results only when nothing is.

A checkpoint goes down the stream of items, so every rank takes its snapshot at the same point of it, and writes beside
its work. Once the lead's files are on the disk it says so down the stream; each rank waits there for its own, and what
comes back from the tail are the files of all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.checkpointer import Checkpointer, Keeping
from engine.checkpoint.files import AsyncSave, Shard
from engine.checkpoint.snapshot import RUN_FILE, pack_run
from engine.order import AdmissionGate, Quantum, WorkOrder
from engine.prepare import Prepared
from engine.progress import Listener
from engine.reuse.flags import FlagLog
from engine.reuse.policy import Decision, Observation
from engine.video import VideoRun, Work, WorkItem
from parallel.comm.edges import Edges
from parallel.comm.messages import Admit, Header, Kind, Message, pack_admit, pack_json, unpack_json
from parallel.health.monitor import Monitor
from parallel.ranks.worker import StageWorker
from parallel.trace.tracer import Tracer

_NAP, _GLANCE = 0.01, 0.002
"""Seconds to wait for a gate to open, and between two looks at the results while that is waited for too."""


@dataclass(slots=True)
class _Video:
    run: VideoRun
    order: WorkOrder
    listener: Listener
    log: FlagLog
    saving: Checkpointer | None
    flags: list[int] = field(default_factory=list)
    """Decided since the last header."""
    ready_since: float | None = None
    given_up: bool = False


class Leader:
    """Runs videos on a gang, from the lead.

    Args:
        runner: the first stage's layers.
        links: messages to the other ranks.
        monitor: asked while waiting.
        tracer: told how long it waited.
        barrier: wait for all chunks of a tick before the next; for comparison.
    """

    def __init__(
        self, runner: StageWorker, links: Edges, monitor: Monitor, tracer: Tracer, *, barrier: bool = False
    ) -> None:
        self._runner, self._links, self._monitor, self._timeline = runner, links, monitor, tracer
        self._barrier = barrier
        self._alone = links.reads_velocity  # one stage: results are there at once
        self._videos: dict[int, _Video] = {}
        self._outstanding = 0
        """Results that are still to come, those of checkpoints counted."""
        self._wake = threading.Event()
        runner.ready()
        monitor.watch(lambda: self._outstanding)

    @property
    def idle(self) -> bool:
        """No video is in flight."""
        return not self._videos

    def running(self, request: int) -> bool:
        """Whether a video is still in flight."""
        return request in self._videos

    def wake(self) -> None:
        """A gate has opened: `pump` need not wait any more. May be called by any thread."""
        self._wake.set()

    def admit(
        self,
        request: int,
        prepared: Prepared,
        listener: Listener,
        *,
        gate: AdmissionGate | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """Take a video in.

        Args:
            request: its number.
            prepared: its run; restored, if there is a checkpoint to go on from.
            listener: told what happens to it.
            gate: lets its quanta begin.
            keeping: checkpoints to make, and the one to go on from.

        Raises:
            InputError: this layout cannot serve it, or the checkpoint does not fit it.
        """
        run, found = prepared.run, None if keeping is None else keeping.found
        admit = Admit(
            request=request,
            schedule=run.schedule,
            kv=prepared.kv,
            captions=prepared.captions,
            grid=run.grid,
            checkpoint=None if found is None else str(found.place),
        )
        self._runner.admit(admit)
        self._links.announce(Header(kind=Kind.ADMIT, request=request), pack_admit(admit))
        log, start = FlagLog(run.schedule), 0
        if found is not None:
            log.restore(self._runner.flags(request))
            start = found.quantum
        saving = None if keeping is None else Checkpointer(keeping, start, partial(self._snapshot, request))
        order = WorkOrder(
            run,
            barrier=self._barrier,
            on_decision=self._noting(request),
            gate=gate,
            border=saving,
            start=start,
        )
        self._videos[request] = _Video(run=run, order=order, listener=listener, log=log, saving=saving)

    def give_up(self, request: int) -> None:
        """Make no more of a video; what is under way comes to nothing."""
        if (video := self._videos.get(request)) is not None:
            video.given_up = True
            self._release(request)

    def pump(self) -> None:
        """Do one thing: take results in, and begin the work that has been ready longest, or wait for a result.

        Raises:
            GangError: a rank has failed.
        """
        self._monitor.check()
        self._wake.clear()
        while not self._alone and (message := self._links.receive_result(wait=False)) is not None:
            self._take(message)
        self._pass_on_saved()
        request = self._first_ready()
        if request is not None:
            self._begin(request, self._videos[request].order.take())
        else:
            self._wait()

    def commit(self, request: int, handed_out: int) -> None:
        """Make a video's checkpoint whole, if all ranks have written and its chunks were handed out.

        Args:
            request: the video.
            handed_out: index of the next chunk to be handed out.

        Raises:
            InputError: it cannot be written.
        """
        video = self._videos.get(request)
        if video is not None and video.saving is not None:
            video.saving.commit(handed_out)

    def leave(self) -> None:
        """Tell all ranks that nothing more will come, and wait until they have worked off what is under way."""
        for request in list(self._videos):
            self.give_up(request)
        self._links.leave()
        self._runner.report.sent_bytes = self._links.sent_bytes

    def _noting(self, request: int) -> Callable[[Observation, Decision], None]:
        def note(seen: Observation, decision: Decision) -> None:
            video = self._videos[request]
            flag = decision.value
            video.flags.append(flag)
            video.log.add([flag])
            video.listener.decided(seen, decision)

        return note

    def _first_ready(self) -> int | None:
        """The video whose next work has been ready longest."""
        first, since = None, float("inf")
        for request, video in list(self._videos.items()):
            if not video.order.ready():
                self._tell(request, video)
                continue
            if video.ready_since is None:
                self._tell(request, video)
                video.ready_since = time.perf_counter()
            if video.ready_since < since:
                first, since = request, video.ready_since
        return first

    def _wait(self) -> None:
        """Wait for a result, and where a gate or a disk is waited for too, for that; not for long then."""
        videos = self._videos.values()
        also = any(video.order.held or (video.saving is not None and video.saving.writing) for video in videos)
        if not self._outstanding and not also:
            return
        began = time.perf_counter()
        message = self._glance(began + _NAP) if also else self._links.receive_result(wait=True)
        self._runner.report.waiting += time.perf_counter() - began
        self._timeline.add("wait", began)
        if message is not None:
            self._take(message)

    def _glance(self, until: float) -> Message | None:
        """A result, if one comes before a time, and before something else wakes this rank."""
        pause = _GLANCE if self._outstanding else _NAP
        with self._monitor.expecting() if self._outstanding else nullcontext():
            while not self._wake.wait(pause) and time.perf_counter() < until:
                if self._outstanding and (message := self._links.receive_result(wait=False)) is not None:
                    return message
        return None

    def _snapshot(self, request: int, quantum: Quantum, place: Path) -> tuple[AsyncSave, Mapping[str, int]]:
        """Have all ranks keep what a video has come to before a quantum, this one first."""
        video = self._videos[request]
        self._tell(request, video)  # so that the counts are those of all ticks before
        header = Header(kind=Kind.CHECKPOINT, request=request, flags=tuple(video.flags), digest=video.log.digest)
        video.flags.clear()
        self._links.announce(header, pack_json(str(place)))
        others = {RUN_FILE: pack_run(video.run.state())}
        return self._runner.save(header, place, others, self._wake.set), video.listener.counts()

    def _pass_on_saved(self) -> None:
        """Say down the stream of whose checkpoint the lead has its files on the disk."""
        for request, video in self._videos.items():
            if video.saving is None or not video.saving.written():
                continue
            header = Header(kind=Kind.SAVED, request=request)
            self._links.announce(header, pack_json([]))
            if not self._alone:
                self._outstanding += 1
                continue
            files: list[dict[str, Any]] = []
            for part in self._links.receive_parts(header):
                self._runner.report.checkpoint_bytes += part.nbytes
                files += unpack_json(part.payload)
            video.saving.acknowledged(Shard(**file) for file in files)

    def _begin(self, request: int, work: Work) -> None:
        """Run an item's first stage and send it on."""
        video, item = self._videos[request], work.item
        video.ready_since = None
        header = Header(kind=Kind.ITEM, request=request, item=item, flags=tuple(video.flags), digest=video.log.digest)
        video.flags.clear()
        own, *others = self._runner.embed(item, work.x)
        for cp_rank, part in enumerate(others, 1):
            self._links.to_cp_rank(cp_rank, header, part)
        hidden = self._runner.run(header, own)
        self._links.send_on(header, hidden)
        for op in item.before:
            if op.kind == "retire":
                video.listener.retired(op.chunk)
        if not item.what.weight:
            return
        if self._alone:
            self._take_velocity(item, self._read_out(header, hidden))
        else:
            self._outstanding += 1

    def _read_out(self, header: Header, hidden: Tensor) -> Tensor:
        """The velocity, where the first stage is the last."""
        assert header.item is not None
        parts = self._links.receive_parts(header)
        self._runner.report.item_bytes += sum(part.nbytes for part in parts)
        return self._runner.velocity(
            header.item, [hidden, *(part.payload for part in parts if part.payload is not None)]
        )

    def _take(self, message: Message) -> None:
        """Take a result in."""
        if message.header.kind is Kind.SAVED:
            self._outstanding -= 1
            self._runner.report.checkpoint_bytes += message.nbytes
            video = self._videos.get(message.header.request)
            if video is not None and video.saving is not None:
                video.saving.acknowledged(Shard(**file) for file in unpack_json(message.payload))
            return
        assert message.header.item is not None and message.payload is not None
        self._outstanding -= 1
        self._runner.report.velocity_bytes += message.nbytes
        self._take_velocity(message.header.item, message.payload)

    def _take_velocity(self, item: WorkItem, velocity: Tensor) -> None:
        video = self._videos.get(item.request)
        if video is None:  # given up
            return
        video.order.returned(item, velocity)

    def _tell(self, request: int, video: _Video) -> None:
        """Pass on what has happened to a video since it was looked at last."""
        for done in video.order.ticks_done():
            video.listener.ticked(done)
        for chunk, latents in video.order.finished():
            video.listener.finished(chunk, latents)
        # A video whose files are still being written is not over: its folder may be deleted after that.
        settled = video.saving is None or video.saving.settled
        if video.order.over and settled and not video.given_up:
            self._release(request)

    def _release(self, request: int) -> None:
        video = self._videos.pop(request)
        header = Header(kind=Kind.RELEASE, request=request, flags=tuple(video.flags), digest=video.log.digest)
        self._links.announce(header)
        self._runner.release(header)
