"""The leader's loop under Ray: it handles the controller's commands, steps the engine and sends events.

The leader's main thread runs the engine; commands arrive on the connection's thread and are queued for it. It knows
nothing of Ray.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from engine.engine import ChunkResult, Engine, Submission
from engine.progress import Progress
from engine.schedule import Quantum
from models.errors import InputError
from parallel.cluster.messages import (
    Admitted,
    CancelVideo,
    ChunkMade,
    ChunkTaken,
    Command,
    Finish,
    GangEvent,
    GangReady,
    PermitQuantum,
    Progressed,
    QuantumDone,
    QuantumReady,
    VideoDone,
    VideoFailed,
    VideoOrder,
)

_MOST_WAITING = 8  # chunks that were handed out and are not stored yet, before no more are made


@dataclass(slots=True)
class _Video:
    """A video that the engine is making, or is about to. It is the engine's admission gate: the controller permits each
    quantum."""

    order: VideoOrder
    send: Callable[[GangEvent], None]
    stored: int  # chunks that the caller has, from the video's first on
    number: int = -1  # the engine's
    handed_out: int = 0  # chunks, from the video's first on
    progress: Progress | None = None  # the latest
    permitted: set[int] = field(default_factory=set)  # quanta

    def announce(self, quantum: Quantum) -> None:
        """Ask for a quantum."""
        self.send(QuantumReady(video=self.order.video, quantum=quantum.index))

    def open(self, quantum: Quantum) -> bool:
        """Whether a quantum is permitted."""
        return quantum.index in self.permitted


class CommandLoop:
    """Takes commands on any thread and works on the leader's main thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: deque[Callable[[Engine], None]] = deque()
        self._events: list[GangEvent] = []
        self._videos: dict[str, _Video] = {}
        self._finishing = False
        self._engine: Engine | None = None
        self._reader: ThreadPoolExecutor | None = None

    def handle(self, command: Command) -> None:
        """Take a command of the controller, on any thread.

        Raises:
            TypeError: it is no command.
        """
        with self._changed:
            video = self._videos.get(getattr(command, "video", ""))
            match command:
                case VideoOrder():
                    self._order(command)
                case CancelVideo():
                    self._commands.append(partial(self._cancel, command.video))
                case PermitQuantum():
                    if video is not None:
                        video.permitted.add(command.quantum)
                case ChunkTaken():
                    if video is not None:
                        video.stored = max(video.stored, command.index + 1)
                case Finish():
                    self._finishing = True
                case _:
                    raise TypeError(f"a {type(command).__name__} is no command")
            self._changed.notify_all()
        if isinstance(command, CancelVideo | PermitQuantum):
            self._wake()

    def _order(self, order: VideoOrder) -> None:
        assert self._engine is not None and self._reader is not None, "videos are ordered of a gang that is ready"
        video = _Video(order=order, send=self._post, stored=order.stored)
        self._videos[order.video] = video
        self._reader.submit(self._read, video, self._engine)

    # ---- the leader's main thread

    def run(self, engine: Engine, device: torch.device, send: Callable[[list[GangEvent]], None]) -> None:
        """Make the videos that come until there will be no more.

        Events go to the controller by `send`, which waits for nobody.

        Raises:
            GangError: a rank has failed.
        """
        self._engine, self._send = engine, send
        own_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read", initializer=own_device)
        self._post(GangReady())
        while not (self._finishing and not engine.in_flight):
            for command in self._next(idle=not engine.in_flight):
                command(engine)
            if not engine.in_flight:
                continue
            for made in engine.step():
                self._hand_out(made)
            for video in list(self._videos.values()):
                if video.number >= 0 and not engine.running(video.number):
                    self._done(video)

    def _next(self, *, idle: bool) -> list[Callable[[Engine], None]]:
        """Commands that have come; waits while there is nothing to do, or too much for the controller to take."""
        with self._changed:
            while not self._commands and not self._finishing:
                waiting = sum(max(0, video.handed_out - video.stored) for video in self._videos.values())
                if not idle and waiting < _MOST_WAITING:
                    break
                self._changed.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _read(self, video: _Video, engine: Engine) -> None:
        """Encode an order and verify its checkpoint, which takes long, while the main thread goes on."""
        order = video.order
        read: Submission | Exception
        try:
            read = engine.read(order.request, order.checkpoint, stored=order.stored)
        except Exception as error:  # noqa: BLE001 - the main thread raises it
            read = error
        self._queue(partial(self._admit, video, read))

    def _admit(self, video: _Video, read: Submission | Exception, engine: Engine) -> None:
        name = video.order.video
        if self._videos.get(name) is not video:
            return  # cancelled meanwhile
        try:
            if isinstance(read, Exception):
                raise read
            progressed = partial(self._progressed, video)
            video.number = engine.submit(read, on_progress=progressed, gate=video, stored=lambda: video.stored)
        except InputError as error:
            self._forget(name)
            self._post(VideoFailed(video=name, message=str(error)))
            return
        self._post(Admitted(video=name, number=video.number, first=engine.resumed(video.number)))

    def _cancel(self, name: str, engine: Engine) -> None:
        video = self._videos.get(name)
        if video is not None:
            self._forget(name)
            engine.cancel(video.number)

    def _hand_out(self, made: ChunkResult) -> None:
        chunk = made.chunk
        assert chunk.frames is not None
        for video in list(self._videos.values()):
            if video.number == made.video:
                video.handed_out = chunk.index + 1
                frames, latents = chunk.frames.numpy(), chunk.latents.numpy()
                self._post(ChunkMade(video=video.order.video, index=chunk.index, frames=frames, latents=latents))

    def _progressed(self, video: _Video, progress: Progress) -> None:
        name, ticks = video.order.video, video.order.size.schedule.quantum_ticks
        video.progress = progress
        if progress.tick % ticks:
            return
        self._post(
            QuantumDone(video=name, quantum=progress.tick // ticks - 1),
            Progressed(video=name, progress=progress),
            urgent=len(self._videos) > 1,  # else nobody waits for the quantum's slots
        )

    def _done(self, video: _Video) -> None:
        self._forget(video.order.video)
        computed, kv_bytes = 1.0, 0
        if video.progress is not None:
            computed, kv_bytes = video.progress.computed_fraction, video.progress.kv_bytes
        self._post(VideoDone(video=video.order.video, computed=computed, kv_bytes=kv_bytes))

    def _forget(self, name: str) -> None:
        with self._changed:
            self._videos.pop(name, None)

    def _queue(self, command: Callable[[Engine], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()
        self._wake()

    def _wake(self) -> None:
        if self._engine is not None:
            self._engine.wake()

    def _post(self, *events: GangEvent, urgent: bool = True) -> None:
        """Send events; those that nobody waits for go with the next ones, as every message has its cost."""
        self._events += events
        if urgent:
            sent, self._events = self._events, []
            self._send(sent)
