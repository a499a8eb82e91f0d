"""The desk of a gang's lead: what the driver asks for comes in, events go out, the engine is stepped in between.

The gang's own thread runs the engine; the driver's calls arrive on other threads and only leave notes. It knows
nothing of Ray.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.engine import ChunkResult, Engine
from engine.progress import Progress
from engine.request import Request
from engine.schedule import Quantum
from models.errors import InputError
from parallel.cluster.messages import (
    Admitted,
    CancelVideo,
    ChunkMade,
    ChunksHeard,
    ChunkTaken,
    Command,
    Finish,
    GangEvent,
    GangReady,
    PermitQuantum,
    Progressed,
    QuantumDone,
    QuantumReady,
    Refused,
    VideoDone,
    VideoJob,
)

_MOST_WAITING = 8
"""Chunks that have not come to the driver before no more are made."""


@dataclass(slots=True)
class _Resident:
    """A video that the engine is making, or is about to."""

    job: VideoJob
    gate: _Gate
    quantum_ticks: int
    taken: int
    number: int = -1
    progress: Progress | None = None


class _Gate:
    """Lets a video's quanta begin when the driver has granted them."""

    def __init__(self, video: str, post: Callable[[GangEvent], None]) -> None:
        self._video, self._post = video, post
        self._granted: set[int] = set()

    def grant(self, quantum: int) -> None:
        self._granted.add(quantum)

    def announce(self, quantum: Quantum) -> None:
        self._post(QuantumReady(video=self._video, quantum=quantum.index, chunk=quantum.chunk, slots=quantum.slots))

    def open(self, quantum: Quantum) -> bool:
        return quantum.index in self._granted


class CommandLoop:
    """The desk.

    Args:
        tell: sends what has happened to the driver, and waits for nobody.
    """

    def __init__(self, tell: Callable[[list[GangEvent]], None]) -> None:
        self._tell = tell
        self._changed = threading.Condition()
        self._commands: deque[Callable[[Engine], None]] = deque()
        self._events: list[GangEvent] = []
        self._waiting = 0
        self._residents: dict[str, _Resident] = {}
        self._over = False
        self._engine: Engine | None = None

    def obey(self, command: Command) -> None:
        """Take a command of the driver, on a thread that does nothing else."""
        match command:
            case VideoJob():
                self._command(partial(self._admit, command))
            case CancelVideo():
                self._command(partial(self._cancel, command.video))
            case PermitQuantum():
                with self._changed:
                    resident = self._residents.get(command.video)
                if resident is not None:
                    resident.gate.grant(command.quantum)
                    self._wake()
            case ChunkTaken():
                with self._changed:
                    if (resident := self._residents.get(command.video)) is not None:
                        resident.taken = max(resident.taken, command.index + 1)
            case ChunksHeard():
                with self._changed:
                    self._waiting -= command.count
                    self._changed.notify_all()
            case Finish():
                with self._changed:
                    self._over = True
                    self._changed.notify_all()

    # ---- the gang's thread

    def run(self, engine: Engine, quantum_ticks: Callable[[Request], int]) -> None:
        """Make what comes until there will be no more.

        Args:
            engine: of the gang.
            quantum_ticks: how many ticks a quantum of a request has.

        Raises:
            GangError: a rank has failed.
        """
        self._quantum_ticks, self._engine = quantum_ticks, engine
        self._post(GangReady())
        while not (self._over and not engine.in_flight):
            for command in self._next(idle=not engine.in_flight):
                command(engine)
            if not engine.in_flight:
                continue
            for made in engine.step():
                self._hand_out(made)
            for resident in list(self._residents.values()):
                if not engine.running(resident.number):
                    self._done(resident)

    def _next(self, *, idle: bool) -> list[Callable[[Engine], None]]:
        """What is to be done; waits while there is nothing to do, or too much for the driver to take."""
        with self._changed:
            while not self._commands and not self._over:
                if not idle and self._waiting < _MOST_WAITING:
                    break
                self._changed.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _admit(self, job: VideoJob, engine: Engine) -> None:
        try:
            resident = _Resident(
                job=job,
                gate=_Gate(job.video, self._post),
                quantum_ticks=self._quantum_ticks(job.request),
                taken=job.stored,
            )
            with self._changed:
                self._residents[job.video] = resident
            resident.number = self._submit(resident, engine)
        except InputError as error:
            self._forget(job.video)
            self._post(Refused(video=job.video, message=str(error)))
            return
        self._post(Admitted(video=job.video, number=resident.number, first=engine.resumed(resident.number)))

    def _submit(self, resident: _Resident, engine: Engine) -> int:
        job = resident.job
        return engine.submit(
            job.request,
            on_progress=partial(self._progressed, resident),
            checkpoint=job.checkpoint,
            gate=resident.gate,
            stored=lambda: resident.taken,
        )

    def _cancel(self, video: str, engine: Engine) -> None:
        resident = self._residents.get(video)
        if resident is not None:
            self._forget(video)
            engine.cancel(resident.number)

    def _hand_out(self, made: ChunkResult) -> None:
        chunk = made.chunk
        assert chunk.frames is not None
        for resident in self._residents.values():
            if resident.number == made.video:
                with self._changed:
                    self._waiting += 1
                self._post(
                    ChunkMade(
                        video=resident.job.video,
                        index=chunk.index,
                        frames=chunk.frames.numpy(),
                        latents=chunk.latents.numpy(),
                    )
                )

    def _progressed(self, resident: _Resident, progress: Progress) -> None:
        video, resident.progress = resident.job.video, progress
        if progress.tick % resident.quantum_ticks:
            return
        self._post(
            QuantumDone(video=video, quantum=progress.tick // resident.quantum_ticks - 1),
            Progressed(
                video=video,
                done=progress.chunks_done,
                chunks=progress.chunks,
                share=progress.tick / progress.ticks,
                computed=progress.computed_fraction,
                kv_bytes=progress.kv_bytes,
                progress=progress,
            ),
            urgent=len(self._residents) > 1,  # else nobody waits for the quantum's slots
        )

    def _done(self, resident: _Resident) -> None:
        self._forget(resident.job.video)
        progress = resident.progress
        self._post(
            VideoDone(
                video=resident.job.video,
                computed=1.0 if progress is None else progress.computed_fraction,
                kv_bytes=0 if progress is None else progress.kv_bytes,
            )
        )

    def _forget(self, video: str) -> None:
        with self._changed:
            self._residents.pop(video, None)

    def _command(self, command: Callable[[Engine], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()
        self._wake()

    def _wake(self) -> None:
        if self._engine is not None:
            self._engine.wake()

    def _post(self, *events: GangEvent, urgent: bool = True) -> None:
        """Tell the driver; what is not urgent goes with what comes next, as every message has its cost."""
        self._events += events
        if urgent:
            told, self._events = self._events, []
            self._tell(told)
