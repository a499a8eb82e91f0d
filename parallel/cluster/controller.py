"""Makes many videos on many gangs of a Ray cluster: tells the scheduler what happens, and carries out its decisions.

One thread, one loop. A gang that is lost is started again while the others go on; its videos go on from their last
checkpoint on whichever gang is free. Every chunk is handed to the caller once, in order, whatever happens to gangs.

    with Controller(settings) as controller:          # settings: parallel.cluster.config.ClusterSettings
        controller.submit(VideoOrder(video="a", request=request, size=size))
        for event in controller.run():                # parallel.cluster.messages.Event
            ...
"""

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Self

from ray.util.metrics import Counter, Gauge

from parallel.cluster import messages
from parallel.cluster.config import ClusterSettings
from parallel.cluster.gang import Gang, GangBroken, GangState, GangView
from parallel.cluster.placement import alive_nodes, head_answers, plan_strategies
from parallel.cluster.scheduler import Figures, Permit, RequestState, Scheduler
from parallel.health import timeouts

_FAILED_STARTS = 4  # attempts in a row to start a gang, none of which gets it ready, before it is given up
_MEMORY = re.compile(r"(out of|not enough|allocate) memory", re.IGNORECASE)  # in what Ray, torch or a rank says
_TOO_LARGE = "its ranks run out of memory: ask for a smaller --height and --width, or a --kv-budget"
_BLAMED = re.compile(r": request (\d+), tick \d+, chunk \d+ \(\w+\): (\w+: .*)$")
"""What a rank says of an error within an item: the number of the video, and the error."""


@dataclass(slots=True)
class _Video:
    """A video that is not made yet."""

    order: messages.VideoOrder
    delivered: int  # the next chunk
    stored: int  # chunks that the caller says are stored, if it does
    number: int = -1  # that its gang has given it, which failures name
    begun: int = 0  # quanta that may ever have begun, on any gang


class ClusterLost(Exception):  # noqa: N818 - reads as what it says
    """Nothing more can be made on this cluster; its text is one line that says why."""


class Controller:
    """Makes videos on a cluster that this process has joined with `ray.init`. A context: gangs live as long.

    `log` is called with everything that happens, as plain values, without frames. `check` is called several times a
    second while videos are made, and may raise to end that.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        *,
        log: Callable[[dict[str, Any]], None] = lambda entry: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings, self._metrics, self._log, self._check = settings, _Metrics(), log, check
        self._scheduler = Scheduler(settings.size)
        self._news = threading.Event()
        self._gangs: dict[str, Gang] = {}
        self._videos: dict[str, _Video] = {}
        self._out: deque[messages.Event] = deque()
        self._stored: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self._began = time.monotonic()
        self.restarts = 0
        """How often a gang was started again."""
        self._counted = self._roomless = self._looked = 0.0
        self._answered: float | None = None  # when Ray's head has answered last, if this process reaches it at all

    def __enter__(self) -> Self:
        """Reserve resources, and begin to start the gangs; an InputError if the cluster has not so much."""
        settings = self._settings
        strategies = plan_strategies(alive_nodes(), settings.shape, settings.gangs)
        for number, strategy in enumerate(strategies):
            name = f"gang-{number}"
            self._gangs[name] = Gang(name, settings, strategy, self._news)
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        up = [gang for gang in self._gangs.values() if gang.state is GangState.UP]
        if kind is None and self._scheduler.idle:
            for gang in up:
                gang.send(messages.Finish())
            deadline = time.monotonic() + timeouts.GANGS_END_SECONDS
            while not all(gang.ended for gang in up) and time.monotonic() < deadline:
                time.sleep(timeouts.POLL_SECONDS)
        head = kind is not ClusterLost and head_answers()
        for gang in self._gangs.values():
            gang.give_up(head=head)

    # ---- for the caller

    def submit(self, order: messages.VideoOrder) -> None:
        """Queue a video; an InputError if no gang can ever hold it, or one of that name is not made yet."""
        self._scheduler.submit(order.video, order.size, priority=order.priority)
        self._videos[order.video] = _Video(order, order.stored, order.stored)

    def cancel(self, video: str) -> None:
        """Make no more of a video; no event of it follows."""
        if video not in self._videos:
            return
        holder = self._scheduler.entry(video).gang
        if holder is not None:
            self._gangs[holder].send(messages.CancelVideo(video=video))
        self._scheduler.cancel(video)
        del self._videos[video]
        self._out = deque(event for event in self._out if getattr(event, "video", None) != video)

    def next_entry(self, video: str, seen: int) -> int | None:
        """The first chunk of a video, counted as in a script, that cannot have entered; None if there is none.

        So many are `seen` to have entered before the video was submitted.
        """
        if (held := self._videos.get(video)) is None:
            return None
        schedule = held.order.size.schedule
        entered = max(seen, schedule.begun(held.begun))
        return entered if entered < schedule.chunks - schedule.first else None

    def change_prompt(self, video: str, first: int, prompt: str) -> None:
        """Make a video from a chunk on, which is not before that of `next_entry`, of another prompt."""
        held = self._videos[video]
        held.order = replace(held.order, request=held.order.request.with_prompt(first, prompt))
        if (holder := self._scheduler.entry(video).gang) is not None:
            self._gangs[holder].send(messages.ChangePrompt(video=video, first=first, prompt=prompt))

    def stored(self, video: str, count: int) -> None:
        """So many chunks of a video, from its first one on, are in safe hands. May be called by any thread."""
        self._stored.put((video, count))
        self._news.set()

    def wake(self) -> None:
        """Have `check` called at once. May be called by any thread."""
        self._news.set()

    def run(self, *, lasting: bool = False) -> Generator[messages.Event, None, None]:
        """Make the videos that were submitted; more may be submitted meanwhile, also by `check`.

        With `lasting` it does not end when all are made.

        Yields:
            What happens. A chunk counts as stored when the next event is asked for, or when `stored` says so if the
            order is `confirmed`: only then is a checkpoint that comes after it committed.

        Raises:
            ClusterLost: the head of the cluster is gone.
            InputError: with what they were given the ranks cannot start, or not go on: there is no room on a disk.
        """
        while lasting or not self._scheduler.idle or self._out:
            self._round()
            while self._out:
                event = self._out.popleft()
                yield event
                if isinstance(event, messages.ChunkMade):
                    video = self._videos.get(event.video)
                    if video is not None and not video.order.confirmed:
                        self._gangs[event.gang].send(messages.ChunkTaken(video=event.video, index=event.index))

    def gangs(self) -> list[GangView]:
        """All gangs, with the processes of their ranks."""
        return [gang.view() for gang in self._gangs.values()]

    def figures(self) -> Figures:
        """The state of the queue and the gangs."""
        return self._scheduler.figures()

    # ---- the loop

    def _round(self) -> None:
        """Wait for news, handle it, and carry out the decisions that follow."""
        self._carry_out()  # what was submitted since the last round does not wait for an event
        self._news.wait(timeouts.NEWS_SECONDS)
        self._news.clear()
        self._check()
        self._check_head()
        self._pass_on_stored()
        for gang in self._gangs.values():
            if gang.state is GangState.DOWN:
                continue
            try:
                for event in gang.poll():
                    self._handle(gang, event)
                gang.check()
            except GangBroken as error:
                self._lose(gang, str(error))
        self._give_up_if_roomless()
        self._carry_out()
        now = time.monotonic()
        if now - self._counted >= timeouts.METRICS_SECONDS:
            self._counted = now
            self._metrics.show(self._scheduler.figures())

    def _pass_on_stored(self) -> None:
        while not self._stored.empty():
            name, count = self._stored.get()
            if (video := self._videos.get(name)) is None:
                continue
            video.stored = max(video.stored, count)
            if (gang := self._scheduler.entry(name).gang) is not None:
                self._gangs[gang].send(messages.ChunkTaken(video=name, index=count - 1))

    def _carry_out(self) -> None:
        for decision in self._scheduler.decide():
            gang, video = self._gangs[decision.gang], decision.request
            if isinstance(decision, Permit):
                self._videos[video].begun = max(self._videos[video].begun, decision.quantum + 1)
                gang.send(messages.PermitQuantum(video=video, quantum=decision.quantum))
            else:
                begun = self._videos[video]
                gang.send(replace(begun.order, stored=begun.stored if begun.order.confirmed else begun.delivered))

    def _handle(self, gang: Gang, event: messages.SentByGang) -> None:
        """An event of a leader, which may be of a video that has ended."""
        event = replace(event, gang=gang.name)
        self._log(messages.log_entry(event, time.monotonic() - self._began))
        if isinstance(event, messages.GangReady):
            self._scheduler.gang_up(gang.name)
            self._out.append(event)
        elif event.video not in self._videos:
            return
        elif isinstance(event, messages.QuantumReady):
            self._scheduler.quantum_ready(event.video, gang.name, event.quantum)
        elif isinstance(event, messages.QuantumDone):
            self._scheduler.quantum_done(event.video, gang.name, event.quantum)
        elif isinstance(event, messages.ChunkMade):
            self._take(gang, event)
        else:
            self._forward(event)

    def _forward(self, event: messages.Forwarded) -> None:
        """An event that goes on to the caller as it is."""
        if isinstance(event, messages.Admitted):
            self._videos[event.video].number = event.number
        elif isinstance(event, messages.VideoDone):
            self._scheduler.request_done(event.video, event.gang)
            self._metrics.videos.inc(1)
            self._metrics.computed.set(event.computed)
            del self._videos[event.video]
        elif isinstance(event, messages.VideoFailed):
            self._scheduler.cancel(event.video)
            del self._videos[event.video]
        self._out.append(event)

    def _take(self, gang: Gang, chunk: messages.ChunkMade) -> None:
        """Hand a chunk out, unless it was before a gang was lost; a GangBroken if chunks before it are missing."""
        video = self._videos[chunk.video]
        self._metrics.chunks.inc(1, tags={"again": str(chunk.index < video.delivered).lower()})
        if chunk.index < video.delivered:
            taken = min(chunk.index, video.stored - 1) if video.order.confirmed else chunk.index
            gang.send(messages.ChunkTaken(video=chunk.video, index=taken))
        elif chunk.index > video.delivered:
            raise GangBroken(f"{gang.name} has left out chunk {video.delivered} of {chunk.video}")
        else:
            video.delivered += 1
            self._out.append(chunk)

    def _lose(self, gang: Gang, message: str) -> None:
        """A gang has failed: its videos go back to the queue, and it is started again."""
        gang.stop()
        blamed = self._blamed(gang, message)
        lost = self._scheduler.gang_down(gang.name, blamed=blamed)
        self._say(messages.GangLost(gang=gang.name, message=message, videos=tuple(entry.request for entry in lost)))
        for entry in lost:
            self._videos[entry.request].number = -1
            if entry.state is RequestState.QUARANTINED:
                self._fail(entry.request, blamed.get(entry.request, message))
        if self.restarts >= self._settings.max_restarts:
            return self._drop(gang, f"{message} ({self.restarts} restarts, and no more are allowed)")
        if gang.failed_starts >= _FAILED_STARTS:
            return self._drop(gang, f"{message} (it has not once got ready in {gang.failed_starts} attempts)")
        self.restarts += 1
        gang.restart()
        self._say(messages.Restarted(gang=gang.name, attempt=gang.attempt))
        self._metrics.restarts.inc(1, tags={"gang": gang.name})

    def _blamed(self, gang: Gang, message: str) -> dict[str, str]:
        """The video that a failure names, or the one that takes most where memory was short, and what it has done."""
        held = {name: video for name, video in self._videos.items() if self._scheduler.entry(name).gang == gang.name}
        if held and _MEMORY.search(message):
            return {max(held, key=lambda name: held[name].order.size.kv_bytes): _TOO_LARGE}
        found = _BLAMED.search(message)
        return {} if found is None else {name: found[2] for name in held if held[name].number == int(found[1])}

    def _check_head(self) -> None:
        """Before a call of Ray's hangs."""
        now = time.monotonic()
        if now - self._looked < timeouts.NODES_SECONDS:
            return
        self._looked = now
        if head_answers():
            self._answered = now
        elif self._answered is not None and now - self._answered > self._settings.head_wait:
            raise ClusterLost("the head of the Ray cluster (its GCS) is gone")

    def _give_up_if_roomless(self) -> None:
        """Wait for nodes for so long, and no longer."""
        left = [gang for gang in self._gangs.values() if gang.state is not GangState.DOWN]
        if any(gang.state is not GangState.WAITING for gang in left):
            self._roomless = 0.0
        elif not self._roomless:
            self._roomless = time.monotonic()
        elif time.monotonic() - self._roomless > timeouts.NODE_WAIT_SECONDS:
            for gang in left:
                self._drop(gang, "the cluster has no room for it any more")

    def _drop(self, gang: Gang, message: str) -> None:
        """Do without a gang; without any, nothing more can be made."""
        gang.give_up()
        self._say(messages.GangDown(gang=gang.name, message=message))
        if any(other.state is not GangState.DOWN for other in self._gangs.values()):
            return
        for video in list(self._videos):
            self._scheduler.cancel(video)
            self._fail(video, f"no gang is left: {message}")

    def _fail(self, video: str, message: str) -> None:
        del self._videos[video]
        self._say(messages.VideoFailed(video=video, message=message))

    def _say(self, event: messages.GangLost | messages.GangDown | messages.Restarted | messages.VideoFailed) -> None:
        self._log(messages.log_entry(event, time.monotonic() - self._began))
        self._out.append(event)


class _Metrics:
    """Metrics for Prometheus. Ray exports them where `ray[default]` is installed; else they go nowhere, at no cost."""

    def __init__(self) -> None:
        self.chunks = Counter("flowcache_chunks_total", "Chunks made", tag_keys=("again",))
        self.videos = Counter("flowcache_videos_total", "Videos done")
        self.computed = Gauge("flowcache_computed_fraction", "Chunk-steps computed, as a share, of the last video")
        self.restarts = Counter("flowcache_gang_restarts_total", "Gangs started again", tag_keys=("gang",))
        self._queued = Gauge("flowcache_queue_length", "Videos that no gang has taken in")
        self._states = Gauge("flowcache_videos", "Videos by state", tag_keys=("standing",))
        self._used = Gauge("flowcache_gang_utilisation", "Window slots in use, as a share", tag_keys=("gang",))
        self._up = Gauge("flowcache_gang_up", "1 while a gang can be given work", tag_keys=("gang",))

    def show(self, figures: Figures) -> None:
        """The state of the queue and the gangs."""
        self._queued.set(figures.states[RequestState.QUEUED])
        for state, count in figures.states.items():
            self._states.set(count, tags={"standing": state.value})
        for gang, used in figures.utilisation.items():
            self._used.set(used or 0.0, tags={"gang": gang})
            self._up.set(float(used is not None), tags={"gang": gang})
