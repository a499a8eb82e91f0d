"""What is told of one video while it is made: finished latents, progress, and the record in the making."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from engine.engine import OnProgress, Progress, Totals
from engine.kv.buffer import KVBuffer
from engine.order import TickDone
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from engine.schedule import Schedule

OnFinished = Callable[[int, Tensor], None]
"""Is given the index of a chunk, 0 for the video's first that is handed out, and its latents."""


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

    def counts(self) -> Mapping[str, int]:
        """What a checkpoint is to keep of what was told so far; `chunks` is how many were handed on."""
        return {"chunks": 0}


class Reporter(Listener):
    """Passes on what happens to one video.

    Args:
        schedule: of the video.
        kv: its buffers on this rank.
        on_finished: given every chunk.
        on_progress: called after every tick.
        trace: told what happens, for a record.
        counts: of an earlier run that this one goes on from, as `counts` gave them.
    """

    def __init__(
        self,
        schedule: Schedule,
        kv: Callable[[], KVBuffer],
        on_finished: OnFinished,
        on_progress: OnProgress | None,
        trace: Recorder | None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._schedule, self._kv = schedule, kv
        self._on_finished, self._on_progress, self._trace = on_finished, on_progress, trace
        before = counts or {}
        self._totals = Totals(
            items=before.get("items", 0), computed=before.get("computed", 0), steps=before.get("steps", 0)
        )
        self._done, self._chunks = before.get("done", 0), before.get("chunks", 0)
        if trace is not None:
            trace.begin(schedule)

    def counts(self) -> Mapping[str, int]:
        """Totals so far; `chunks` is the index of the next chunk."""
        totals = self._totals
        return {
            "items": totals.items,
            "computed": totals.computed,
            "steps": totals.steps,
            "done": self._done,
            "chunks": self._chunks,
        }

    def decided(self, seen: Observation, decision: Decision) -> None:
        """For the record."""
        if self._trace is not None:
            self._trace.decided(seen, decision)

    def retired(self, chunk: int) -> None:
        """For the record."""
        if self._trace is not None and chunk >= self._schedule.first:
            shares = self._kv().kept_shares(self._schedule.chunks)
            self._trace.retired(chunk, shares[: chunk + 1].numpy())

    def ticked(self, done: TickDone) -> None:
        """For the record, and for whoever watches."""
        self._totals = Totals(
            items=self._totals.items + done.items,
            computed=self._totals.computed + done.computed,
            steps=self._totals.steps + len(done.tick.active),
        )
        self._done += done.tick.finishing is not None
        kv = self._kv()
        fill = kv.layout.used_rows / kv.layout.capacity
        if self._trace is not None:
            self._trace.ticked(done.tick.index, seconds=done.seconds, items=done.items, fill=fill)
        if self._on_progress is not None:
            progress = Progress.of(
                self._schedule, done.tick, self._done, self._totals, kv_fill=fill, kv_bytes=kv.nbytes
            )
            self._on_progress(progress)

    def finished(self, chunk: int, latents: Tensor) -> None:
        """Hand it on."""
        if latents.shape[2]:
            self._on_finished(self._chunks, latents)
            self._chunks += 1
