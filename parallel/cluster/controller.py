"""Makes many videos on many gangs of a Ray cluster: tells the scheduler what happens, and carries out what it decides.

One thread, one loop. A gang that is lost is started again while the others go on; its videos go on from their last
checkpoint on whichever gang is free. Every chunk is handed to the caller once, in order, whatever happens to gangs.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray

from parallel.cluster.connection import Exchange
from parallel.cluster.gang import GangBroken, GangHandle, GangState
from parallel.cluster.messages import (
    Admitted,
    CancelVideo,
    ChunkMade,
    ChunkTaken,
    Event,
    Finish,
    GangDown,
    GangEvent,
    GangLost,
    GangReady,
    PermitQuantum,
    Progressed,
    QuantumDone,
    QuantumReady,
    Refused,
    Restarted,
    VideoDone,
    VideoFailed,
    VideoJob,
    log_entry,
)
from parallel.cluster.metrics import Metrics
from parallel.cluster.placement import alive_nodes, plan_strategies
from parallel.cluster.queue import Admit, Figures, Job, Permit, RequestState
from parallel.cluster.scheduler import Scheduler
from parallel.cluster.views import ClusterSettings, GangView, VideoOrder

_ROUND, _CALM_ROUND, _FIGURES_EVERY, _CLOSING = 0.2, 1.0, 1.0, 10.0
_STILLBORN = 4
"""Attempts in a row at starting a gang, none of which gets as far as work."""
_BLAMED = re.compile(r": request (\d+), tick \d+, chunk \d+ \(\w+\): (\w+: .*)$")
"""What a rank says of an error in the middle of an item: whose item, and the error."""


class Controller:
    """Makes videos on a cluster that this process has joined with `ray.init`. A context: gangs live as long.

    Args:
        settings: how to use the cluster.
        metrics: takes figures.
        log: told of everything that happens, as plain values; without frames.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        metrics: Metrics | None = None,
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._settings, self._metrics, self._log = settings, metrics, log
        self._scheduler = Scheduler(seed=settings.seed, gangs=[settings.size])
        self._exchange: Exchange | None = None
        self._gangs: dict[str, GangHandle] = {}
        self._orders: dict[str, VideoOrder] = {}
        """Videos that are not made yet."""
        self._delivered: dict[str, int] = {}
        self._numbers: dict[tuple[str, int], str] = {}
        """Videos by gang and what the gang calls them."""
        self._out: deque[tuple[Event, GangHandle | None]] = deque()
        self._restarts, self._began = 0, time.monotonic()
        self._counted = self._roomless = 0.0

    def __enter__(self) -> Self:
        """Ask for room, and begin to start the gangs.

        Raises:
            InputError: the cluster has not so much.
        """
        settings = self._settings
        strategies = plan_strategies(alive_nodes(), settings.shape, settings.gangs)
        self._exchange = Exchange(ray.util.get_node_ip_address())
        for number, strategy in enumerate(strategies):
            name = f"gang-{number}"
            self._gangs[name] = GangHandle(name, settings.shape, settings.task, strategy, self._exchange)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        up = [gang for gang in self._gangs.values() if gang.state is GangState.UP]
        if kind is None and self._scheduler.idle:
            for gang in up:
                gang.tell(Finish())
            deadline = time.monotonic() + _CLOSING
            while not all(gang.ended for gang in up) and time.monotonic() < deadline:
                time.sleep(0.05)
        for gang in self._gangs.values():
            gang.give_up()
        if self._exchange is not None:
            self._exchange.close()

    # ---- asked by the caller

    def submit(self, order: VideoOrder) -> None:
        """Queue a video.

        Raises:
            InputError: no gang can ever hold it, or there is one of that name.
        """
        now = time.monotonic()
        self._scheduler.submit(
            Job(request=order.video, quanta=order.size.quanta, kv_bytes=order.size.kv_bytes, priority=order.priority),
            now,
        )
        self._orders[order.video] = order
        self._delivered[order.video] = order.stored

    def cancel(self, video: str) -> None:
        """Make no more of a video; nothing more is said of it."""
        if self._orders.pop(video, None) is None:
            return
        holder = self._scheduler.view(video).gang
        if holder is not None:
            self._gangs[holder].tell(CancelVideo(video=video))
        self._scheduler.cancel(video, time.monotonic())

    def run(self) -> Iterator[Event]:
        """Make what was submitted; more may be submitted meanwhile.

        Yields:
            What happens. A chunk counts as taken when the next event is asked for: a checkpoint after it is only
            written then, so store it before.

        Raises:
            InputError: the ranks cannot start with what they were given.
        """
        while not self._scheduler.idle or self._out:
            self._round()
            while self._out:
                event, gang = self._out.popleft()
                yield event
                if isinstance(event, ChunkMade) and gang is not None:
                    gang.tell(ChunkTaken(video=event.video, index=event.index))

    def gangs(self) -> list[GangView]:
        """All gangs, with the processes of their ranks."""
        return [
            GangView(gang=gang.name, state=gang.state, attempt=gang.attempt, ranks=tuple(gang.ranks()))
            for gang in self._gangs.values()
        ]

    def figures(self) -> Figures:
        """The state of the queue and the gangs."""
        return self._scheduler.figures(time.monotonic())

    @property
    def restarts(self) -> int:
        """How often a gang was started again."""
        return self._restarts

    # ---- the loop

    def _round(self) -> None:
        """Take in what has happened, and carry out what follows from it."""
        self._assign()  # what was submitted since the last round does not wait for an event
        assert self._exchange is not None
        calm = all(gang.calm for gang in self._gangs.values())
        self._exchange.news.wait(_CALM_ROUND if calm else _ROUND)
        self._exchange.news.clear()
        for gang in self._gangs.values():
            if gang.state is GangState.DOWN:
                continue
            try:
                for event in gang.poll():
                    self._hear(gang, event)
            except GangBroken as error:
                self._lose(gang, str(error))
        self._give_up_if_roomless()
        self._assign()
        now = time.monotonic()
        if self._metrics is not None and now - self._counted >= _FIGURES_EVERY:
            self._counted = now
            self._metrics.figures(self._scheduler.figures(now))

    def _assign(self) -> None:
        for decision in self._scheduler.assignments(time.monotonic()):
            gang = self._gangs[decision.gang]
            if isinstance(decision, Permit):
                gang.tell(PermitQuantum(video=decision.request, quantum=decision.quantum))
            elif isinstance(decision, Admit):
                order = self._orders[decision.request]
                gang.tell(
                    VideoJob(
                        video=order.video,
                        request=order.request,
                        checkpoint=order.checkpoint,
                        stored=self._delivered[order.video],
                    )
                )

    def _hear(self, gang: GangHandle, event: GangEvent) -> None:
        """What a lead says, which may be about a video that is over."""
        now = time.monotonic()
        self._note(event, gang=gang.name)
        if isinstance(event, GangReady):
            self._scheduler.gang_up(gang.name, self._settings.size, now)
            self._out.append((replace(event, gang=gang.name), None))
        elif event.video not in self._orders:
            return
        elif isinstance(event, QuantumReady):
            self._scheduler.quantum_ready(event.video, gang.name, event.quantum, now)
        elif isinstance(event, QuantumDone):
            self._scheduler.quantum_done(event.video, gang.name, event.quantum, now)
        elif isinstance(event, ChunkMade):
            self._take(gang, event)
        elif isinstance(event, Refused):
            self._scheduler.cancel(event.video, now)
            self._fail(event.video, event.message)
        else:
            self._pass_on(gang, event)

    def _pass_on(self, gang: GangHandle, event: Admitted | Progressed | VideoDone) -> None:
        """What the caller is to know as it is."""
        if isinstance(event, Admitted):
            self._numbers[gang.name, event.number] = event.video
        elif isinstance(event, VideoDone):
            self._scheduler.request_done(event.video, gang.name, time.monotonic())
            self._forget(event.video)
            if self._metrics is not None:
                self._metrics.video(computed=event.computed)
        self._out.append((replace(event, gang=gang.name), None))

    def _take(self, gang: GangHandle, chunk: ChunkMade) -> None:
        """Hand a chunk out, unless it was before a gang was lost.

        Raises:
            GangBroken: chunks before it are missing.
        """
        expected = self._delivered[chunk.video]
        if self._metrics is not None:
            self._metrics.chunk(again=chunk.index < expected)
        if chunk.index < expected:
            gang.tell(ChunkTaken(video=chunk.video, index=chunk.index))
        elif chunk.index > expected:
            raise GangBroken(f"{gang.name} has left out chunk {expected} of {chunk.video}")
        else:
            self._delivered[chunk.video] += 1
            self._out.append((chunk, gang))

    def _lose(self, gang: GangHandle, message: str) -> None:
        """A gang has failed: its videos go back to the queue, and it is started again."""
        gang.stop()
        now, blamed = time.monotonic(), {}
        if found := _BLAMED.search(message):
            video = self._numbers.get((gang.name, int(found[1])))
            blamed = {} if video is None else {video: found[2]}
        videos = self._scheduler.gang_down(gang.name, now, blamed=blamed)
        self._numbers = {key: video for key, video in self._numbers.items() if key[0] != gang.name}
        self._say(GangLost(gang=gang.name, message=message, videos=tuple(videos)))
        for video in videos:
            view = self._scheduler.view(video)
            if view.standing is RequestState.QUARANTINED:
                self._fail(video, blamed.get(video, message))
        if self._restarts >= self._settings.max_restarts:
            self._drop(gang, f"{message} ({self._restarts} restarts, and no more are allowed)")
            return
        if gang.stillborn >= _STILLBORN:
            self._drop(gang, f"{message} (it has not once got ready in {gang.stillborn} attempts)")
            return
        self._restarts += 1
        gang.restart()
        self._say(Restarted(gang=gang.name, attempt=gang.attempt))
        if self._metrics is not None:
            self._metrics.restart(gang.name)

    def _give_up_if_roomless(self) -> None:
        """Wait for nodes for so long, and no longer."""
        left = [gang for gang in self._gangs.values() if gang.state is not GangState.DOWN]
        if any(gang.state is not GangState.WAITING for gang in left):
            self._roomless = 0.0
        elif not self._roomless:
            self._roomless = time.monotonic()
        elif time.monotonic() - self._roomless > self._settings.node_wait:
            for gang in left:
                self._drop(gang, "the cluster has no room for it any more")

    def _drop(self, gang: GangHandle, message: str) -> None:
        """Do without a gang; without any, nothing more can be made."""
        gang.give_up()
        self._say(GangDown(gang=gang.name, message=message))
        if any(other.state is not GangState.DOWN for other in self._gangs.values()):
            return
        for video in list(self._orders):
            self._scheduler.cancel(video, time.monotonic())
            self._fail(video, f"no gang is left: {message}")

    def _fail(self, video: str, message: str) -> None:
        self._forget(video)
        self._say(VideoFailed(video=video, message=message))

    def _forget(self, video: str) -> None:
        del self._orders[video], self._delivered[video]

    def _say(self, event: GangLost | GangDown | Restarted | VideoFailed) -> None:
        self._note(event)
        self._out.append((event, None))

    def _note(self, event: GangEvent | Event, *, gang: str = "") -> None:
        if self._log is not None:
            entry = log_entry(event, time.monotonic() - self._began)
            self._log({**entry, "gang": gang or entry.get("gang", "")})
