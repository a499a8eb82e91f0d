"""The Ray actor of one rank, and the leader's loop in it, which handles the controller's commands and sends events.

A rank gets its environment as a process of torchrun does, and runs the same code. The work is one long call on the
actor's main thread, which runs the engine on the leader. Commands of the controller arrive meanwhile on a connection's
thread and are queued.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray
import torch

from engine.engine import ChunkResult, Engine, NotKept
from engine.executor import NotFinite
from engine.machine import settle_heap
from engine.progress import Progress
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from engine.schedule import Timetable
from engine.submission import Submission
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.config import RankTask
from parallel.cluster.connection import connect
from parallel.comm.sockets import Address, interface_of
from parallel.health.exit_codes import BAD_INPUT
from parallel.health.failure import Failure, GangError
from parallel.health.timeouts import LAST_MESSAGES_SECONDS, WATCHED_SECONDS
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.worker import StageModel

_MOST_WAITING = 8  # chunks that were handed out and are not stored yet, before no more are made


class RankActor:
    """One rank of a gang. Ray never restarts it alone: a lone rank cannot join the others again."""

    def __init__(self) -> None:
        self._gang: Gang | None = None

    def run(self, env: RankEnv, task: RankTask) -> Failure | None:
        """Work as one rank until the leader ends the session; a failure is returned, not raised."""
        os.environ.update(env.variables())
        settle_heap()
        torch.set_num_threads(task.threads)
        loop = CommandLoop()
        try:
            address = Address(host=env.host, port=env.port, secret=env.secret)
            connection = connect(address, env.rank, loop.handle, self._on_end)
        except OSError as error:
            where = f"the controller at {env.host}:{env.port}"
            text = f"rank {env.rank} cannot reach {where}: {error.strerror or error}"
            return Failure(message=text, reporter=env.rank)
        connection.send(messages.RankStarted(pid=os.getpid()))
        try:
            interface = task.interface or interface_of(ray.util.get_node_ip_address())
            with open_gang(env, task.layout, timeouts=task.timeouts, device=_own_device(), interface=interface) as gang:
                self._gang = gang
                _work(gang, task, loop, connection.send)
        except GangError as error:
            return error.failure
        except InputError as error:
            return Failure(message=str(error), status=BAD_INPUT, reporter=env.rank)
        except Exception as error:  # noqa: BLE001 - the controller shows it
            return Failure(message=f"rank {env.rank}: {type(error).__name__}: {error}", reporter=env.rank)
        finally:
            connection.close(flush=LAST_MESSAGES_SECONDS)
        return None

    def _on_end(self, error: Exception | None) -> None:
        """The connection has ended. Without a controller Ray ends this process; any other reason fails the gang."""
        if error is not None and self._gang is not None:
            self._gang.monitor.fail(f"messages of the controller: {type(error).__name__}: {error}")


def _work(gang: Gang, task: RankTask, loop: CommandLoop, send: Callable[[list[messages.SentByGang]], None]) -> None:
    # Objects that exist when the work begins, and they are many with Ray, stay: the garbage collector, which would go
    # through them over and over, takes 1% of a rank's time.
    load = task.source.lead if gang.mesh.leads else task.source.stage
    with gang.loading():
        loaded = load(gang.mesh, str(gang.device))
    gc.freeze()
    if isinstance(loaded, StageModel):
        gang.serve(loaded)
        return
    with gang.lead(loaded, task.reuse, task.kv, identity=task.source.identity) as (engine, _):
        loop.run(engine, gang.device, send)


def device_index(ids: list[str], visible: str | None) -> int | None:
    """The first of an actor's accelerators as torch counts them, within CUDA_VISIBLE_DEVICES of the node."""
    if not ids:
        return None
    shown = visible.split(",") if visible else []
    return shown.index(ids[0]) if ids[0] in shown else int(ids[0])


def _own_device() -> torch.device:
    ids = [str(one) for one in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
    index = device_index(ids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return torch.device("cuda", index) if index is not None and torch.cuda.is_available() else torch.device("cpu")


# ---- the leader's loop


@dataclass(slots=True)
class _Video:
    """A video that the engine is making, or is about to. It is the engine's admission gate: the controller permits each
    quantum."""

    order: messages.VideoOrder
    send: Callable[[messages.SentByGang], None]
    stored: int  # chunks that the caller has, from the video's first on
    number: int = -1  # the engine's
    handed_out: int = 0  # chunks, from the video's first on
    progress: Progress | None = None  # the latest
    permitted: set[int] = field(default_factory=set)  # quanta
    changing: list[tuple[str, int]] = field(default_factory=list)  # videos with prompts to come, and from which chunk

    def announce(self, quantum: int) -> None:
        """Ask for a quantum."""
        self.send(messages.QuantumReady(video=self.order.video, quantum=quantum))

    def open(self, quantum: int) -> bool:
        """Whether a quantum is permitted, and the prompt of the chunk that it lets in is there."""
        name, entered = self.order.video, self.order.size.schedule.begun(quantum + 1)
        return quantum in self.permitted and not any(
            video == name and first < entered for video, first in tuple(self.changing)
        )


class _LiveRecorder(Recorder):
    """Posts a message for each tick, for somebody who watches; nothing is computed for it, and nothing kept."""

    observes = False

    def __init__(self, video: str, post: Callable[..., None]) -> None:
        super().__init__()
        self._video, self._post = video, post
        self._decisions: list[tuple[int, int, int]] = []
        self._kept: tuple[float, ...] | None = None
        self._sent = 0.0

    def begin(self, table: Timetable) -> None:
        pass

    def decided(self, seen: Observation, decision: Decision) -> None:
        self._decisions.append((seen.chunk, seen.step, decision.value))

    def retired(self, chunk: int, shares: np.ndarray) -> None:
        self._kept = tuple(round(float(share), 3) for share in shares)

    def ticked(self, tick: int, *, seconds: float, items: int, fill: float) -> None:
        now = time.monotonic()
        due = now - self._sent >= WATCHED_SECONDS  # else it goes with the next events
        self._sent = now if due else self._sent
        decisions, self._decisions = tuple(self._decisions), []
        kept, self._kept = self._kept, None
        ticked = messages.Ticked(video=self._video, tick=tick, decisions=decisions, kv_fill=fill, kept=kept)
        self._post(ticked, urgent=due)


_Read = tuple[_Video, Future[Submission]] | tuple[messages.ChangePrompt, Future[torch.Tensor]]


class CommandLoop:
    """Takes commands on any thread and carries them out on the leader's main thread, between steps of the engine."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[messages.Command | _Read] = SimpleQueue()
        self._changing: list[tuple[str, int]] = []  # as in `_Video`
        self._events: list[messages.SentByGang] = []
        self._videos: dict[str, _Video] = {}
        self._finishing = False
        self._engine: Engine | None = None

    def handle(self, command: messages.Command) -> None:
        """Take a command of the controller, on any thread; a TypeError if it is no command."""
        if not isinstance(command, messages.Command):
            raise TypeError(f"a {type(command).__name__} is no command")
        if isinstance(command, messages.PermitQuantum):  # at once: the engine may be waiting for it within a step
            if (video := self._videos.get(command.video)) is not None:
                video.permitted.add(command.quantum)
        else:
            if isinstance(command, messages.ChangePrompt):  # at once: a permit of that chunk may follow
                self._changing.append((command.video, command.first))
            self._inbox.put(command)
        self._wake()

    # ---- the leader's main thread

    def run(self, engine: Engine, device: torch.device, send: Callable[[list[messages.SentByGang]], None]) -> None:
        """Make the videos that come until there will be no more; a GangError if a rank has failed.

        Events go to the controller by `send`, which waits for nobody.
        """
        self._engine, self._send = engine, send
        own_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read", initializer=own_device)
        self._post(messages.GangReady())
        while not (self._finishing and not engine.in_flight):
            waiting = sum(max(0, video.handed_out - video.stored) for video in self._videos.values())
            stalled = not engine.in_flight or waiting >= _MOST_WAITING
            if (stalled and not self._finishing) or not self._inbox.empty():
                self._carry_out(self._inbox.get(), engine)
                continue
            try:
                results = engine.step()
            except (NotFinite, NotKept) as error:
                self._fail(error, engine)
                continue
            for made in results:
                self._hand_out(made)
            for video in list(self._videos.values()):
                if video.number >= 0 and not engine.running(video.number):
                    self._done(video)

    def _carry_out(self, command: messages.Command | _Read, engine: Engine) -> None:
        match command:
            case messages.VideoOrder():
                self._order(command, engine)
            case (messages.ChangePrompt() as change, text):
                self._change(change, text, engine)
            case (_Video() as video, read):
                self._admit(video, read, engine)
            case messages.ChangePrompt():
                self._read(command, partial(engine.reader.read_prompt, command.prompt))
            case messages.CancelVideo():
                if (cancelled := self._videos.pop(command.video, None)) is not None:
                    engine.cancel(cancelled.number)
            case messages.ChunkTaken():
                if (taken := self._videos.get(command.video)) is not None:
                    taken.stored = max(taken.stored, command.index + 1)
            case messages.Finish():
                self._finishing = True

    def _order(self, order: messages.VideoOrder, engine: Engine) -> None:
        """Encode an order and verify its checkpoint."""
        video = _Video(order=order, send=self._post, stored=order.stored, changing=self._changing)
        self._videos[order.video] = video
        own = partial(engine.reader.read, stored=order.stored, reuse=order.reuse, kv=order.kv)
        self._read(video, partial(own, order.request, order.checkpoint))

    def _read(self, what: Any, read: Callable[[], Any]) -> None:
        """Do what takes long on another thread, one after the other; `what` comes back to the inbox with the result."""

        def read_is_done(done: Future[Any]) -> None:
            self._inbox.put((what, done))
            self._wake()

        self._reader.submit(read).add_done_callback(read_is_done)

    def _change(self, change: messages.ChangePrompt, read: Future[torch.Tensor], engine: Engine) -> None:
        """A prompt was encoded. Its video was admitted before, as both are read in turn, or has it in a new order."""
        if (video := self._videos.get(change.video)) is not None:
            try:
                engine.change_prompt(video.number, change.first, change.prompt, read.result())
            except InputError as error:
                engine.cancel(video.number)
                self._refuse(change.video, error)
        self._changing.remove((change.video, change.first))

    def _refuse(self, name: str, error: Exception) -> None:
        del self._videos[name]
        self._post(messages.VideoFailed(video=name, message=str(error), disk=isinstance(error, NotKept)))

    def _admit(self, video: _Video, read: Future[Submission], engine: Engine) -> None:
        name = video.order.video
        if self._videos.get(name) is not video:
            return  # cancelled meanwhile
        try:
            progressed = partial(self._progressed, video)
            found = read.result()
            recorder = _LiveRecorder(name, self._post) if video.order.watched else None
            video.number = engine.submit(
                found, on_progress=progressed, recorder=recorder, gate=video, stored=lambda: video.stored
            )
        except InputError as error:
            return self._refuse(name, error)
        self._post(messages.Admitted(video=name, number=video.number, first=found.first, damage=found.damage))

    def _fail(self, error: NotFinite | NotKept, engine: Engine) -> None:
        engine.cancel(error.video)
        for name in [name for name, video in self._videos.items() if video.number == error.video]:
            self._refuse(name, error)

    def _hand_out(self, made: ChunkResult) -> None:
        chunk = made.chunk
        assert chunk.frames is not None
        for video in self._videos.values():
            if video.number == made.video:
                video.handed_out = chunk.index + 1
                name, frames, latents = video.order.video, chunk.frames.numpy(), chunk.latents.numpy()
                self._post(messages.ChunkMade(video=name, index=chunk.index, frames=frames, latents=latents))

    def _progressed(self, video: _Video, progress: Progress) -> None:
        name, video.progress = video.order.video, progress
        if (quantum := video.order.size.schedule.ended(progress.tick)) is None:
            return
        self._post(
            messages.QuantumDone(video=name, quantum=quantum),
            messages.Progressed(video=name, progress=progress),
            urgent=len(self._videos) > 1,  # else nobody waits for the quantum's slots
        )

    def _done(self, video: _Video) -> None:
        del self._videos[video.order.video]
        computed, kv_bytes, on_host = 1.0, 0, 0
        if (last := video.progress) is not None:
            computed, kv_bytes, on_host = last.computed_fraction, last.kv_bytes, last.kv_host_bytes
        name = video.order.video
        self._post(messages.VideoDone(video=name, computed=computed, kv_bytes=kv_bytes, kv_host_bytes=on_host))

    def _wake(self) -> None:
        if self._engine is not None:
            self._engine.wake()

    def _post(self, *events: messages.SentByGang, urgent: bool = True) -> None:
        """Send events; those that nobody waits for go with the next ones, as every message has its cost."""
        self._events += events
        if urgent:
            sent, self._events = self._events, []
            self._send(sent)
