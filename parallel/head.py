"""The lead: orders the work of several videos, decides reuse, runs the first stage, and takes the results in.

Work of all videos in flight is begun in the order in which it became ready. There is no barrier: the lead runs whatever
is ready, and waits for results only when nothing is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from engine.cache import Decision, Observation
from engine.prepare import Prepared
from engine.run import Work
from engine.work import WorkItem
from parallel.flags import FlagLog
from parallel.links import Links
from parallel.message import Admit, Header, Kind, Message, pack_admit
from parallel.monitor import Monitor
from parallel.order import TickDone, WorkOrder
from parallel.stage import StageRunner
from parallel.timeline import Timeline

__all__ = ["Head", "Listener"]


class Listener:
    """Is told what happens to a video; does nothing by default."""

    def decided(self, seen: Observation, decision: Decision) -> None:
        """A chunk's step was decided."""

    def retired(self, chunk: int) -> None:
        """A chunk has left the window for the clean region, which was cut down to its size."""

    def ticked(self, done: TickDone) -> None:
        """All chunks of a tick have taken their step."""

    def finished(self, chunk: int, latents: Tensor) -> None:
        """A chunk [1, C, t, h, w] has finished."""


@dataclass(slots=True)
class _Video:
    order: WorkOrder
    listener: Listener
    log: FlagLog
    flags: list[int] = field(default_factory=list)
    """Decided since the last header."""
    ready_since: float | None = None
    given_up: bool = False


class Head:
    """Runs videos on a gang, from the lead.

    Args:
        runner: the first stage's layers.
        links: messages to the other ranks.
        monitor: asked while waiting.
        timeline: told how long it waited.
        barrier: wait for all chunks of a tick before the next; for comparison.
    """

    def __init__(
        self, runner: StageRunner, links: Links, monitor: Monitor, timeline: Timeline, *, barrier: bool = False
    ) -> None:
        self._runner, self._links, self._monitor, self._timeline = runner, links, monitor, timeline
        self._barrier = barrier
        self._alone = links.last_slot  # one stage: results are there at once
        self._videos: dict[int, _Video] = {}
        self._outstanding = 0
        runner.ready()
        monitor.watch(lambda: self._outstanding)

    @property
    def idle(self) -> bool:
        """No video is in flight."""
        return not self._videos

    def running(self, request: int) -> bool:
        """Whether a video is still in flight."""
        return request in self._videos

    def admit(self, request: int, prepared: Prepared, listener: Listener) -> None:
        """Take a video in.

        Raises:
            InputError: this layout cannot serve it.
        """
        run = prepared.run
        admit = Admit(request=request, schedule=run.schedule, kv=prepared.kv, captions=prepared.captions, grid=run.grid)
        self._runner.admit(admit)
        self._links.announce(Header(kind=Kind.ADMIT, request=request), pack_admit(admit))
        video = _Video(
            order=WorkOrder(run, barrier=self._barrier, on_decision=self._noting(request)),
            listener=listener,
            log=FlagLog(run.schedule),
        )
        self._videos[request] = video

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
        while not self._alone and (message := self._links.returned(wait=False)) is not None:
            self._take(message)
        request = self._first_ready()
        if request is not None:
            self._begin(request, self._videos[request].order.take())
        elif self._outstanding:
            began = time.perf_counter()
            message = self._links.returned(wait=True)
            assert message is not None
            self._runner.report.waiting += message.waited
            self._timeline.add("wait", began)
            self._take(message)

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

    def _begin(self, request: int, work: Work) -> None:
        """Run an item's first stage and send it on."""
        video, item = self._videos[request], work.item
        video.ready_since = None
        header = Header(kind=Kind.ITEM, request=request, item=item, flags=tuple(video.flags), digest=video.log.digest)
        video.flags.clear()
        own, *others = self._runner.embed(item, work.x)
        for slot, part in enumerate(others, 1):
            self._links.to_slot(slot, header, part)
        hidden = self._runner.run(header, own)
        self._links.on(header, hidden)
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
        parts = self._links.parts(header)
        velocity = self._runner.velocity(
            header.item, [hidden, *(part.payload for _, part in parts if part.payload is not None)]
        )
        for inbox, part in parts:
            self._runner.report.item_bytes += part.nbytes
            inbox.done(part)
        return velocity

    def _take(self, message: Message) -> None:
        """Take a result in."""
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
        if video.order.over and not video.given_up:
            self._release(request)

    def _release(self, request: int) -> None:
        video = self._videos.pop(request)
        header = Header(kind=Kind.RELEASE, request=request, flags=tuple(video.flags), digest=video.log.digest)
        self._links.announce(header)
        self._runner.release(header)
