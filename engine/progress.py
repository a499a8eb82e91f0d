"""What is counted of one video while it is made: for whoever watches, for the record, and for checkpoints."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.kv.buffer import KVBuffer
from engine.order import TickProgress
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from engine.schedule import Timetable

OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a video is, after a tick."""

    tick: int  # ticks done
    ticks: int  # of the whole video
    chunks_done: int  # finished chunks
    chunks: int  # of the whole video
    step: int  # steps done of the oldest chunk
    num_steps: int  # steps of a chunk
    steps_done: int  # of all chunks together, of `chunks * num_steps`; ticks are no measure of time
    computed_fraction: float  # computed chunk-steps as a share of all so far
    kv_fill: float  # share of the KV buffer's rows in use
    kv_bytes: int  # size of the KV buffers; on ranks, of the leader's
    kv_host_bytes: int = 0  # what they have in host memory beside it


class ProgressReporter:
    """Counts, and passes on what happens in a video, span by span, by the numbers of the whole video."""

    def __init__(
        self,
        table: Timetable,  # of the video
        kv: Callable[[], KVBuffer],  # its buffers in this process
        on_progress: OnProgress | None,  # called after every tick; None for nobody
        recorder: Recorder | None,  # takes what happens, for a record; None for none
        counts: Mapping[str, int],  # of an earlier run that this one goes on from
    ) -> None:
        self._table, self._kv, self._on_progress, self._recorder = table, kv, on_progress, recorder
        self.counts = Counter({**dict.fromkeys(("items", "computed", "steps", "done", "chunks"), 0), **counts})
        """Passes (`items`), `computed` steps, all `steps`, chunks `done`; `chunks`, index of the next to hand out."""

    def begin_span(self, number: int) -> None:
        """What follows happens in a span."""
        self._schedule, self._place = self._table.spans[number], self._table.places[number]

    def decided(self, seen: Observation, decision: Decision) -> None:
        """A policy has decided about a chunk's step."""
        if self._recorder is not None:
            chunk, tick = self._place.chunk + seen.chunk, self._place.tick + seen.tick
            self._recorder.decided(replace(seen, chunk=chunk, tick=tick), decision)

    def retired(self, chunks: Sequence[int]) -> None:
        """Chunks have left the window for the clean region, which was cut down to its size."""
        if self._recorder is None or not chunks:
            return
        shares = self._kv().kept_shares(chunks[-1] + 1).numpy()
        before = self._place.chunk  # chunks of which nothing is held any more
        for chunk in chunks:
            if chunk >= self._schedule.first:
                self._recorder.retired(before + chunk, np.concatenate([np.zeros(before), shares[: chunk + 1]]))

    def ticked(self, done: TickProgress) -> None:
        """All chunks of a tick have taken their step."""
        finished = len(done.tick.finishing)
        self.counts.update(items=done.items, computed=done.computed, steps=len(done.tick.active), done=finished)
        if self._recorder is None and self._on_progress is None:
            return
        kv = self._kv()
        fill, tick = kv.layout.used_rows / kv.layout.capacity, self._place.tick + done.tick.index
        if self._recorder is not None:
            self._recorder.ticked(tick, seconds=done.seconds, items=done.items, fill=fill)
        if self._on_progress is not None:
            table, counts = self._table, self.counts
            progress = Progress(
                tick=tick + 1,
                ticks=table.ticks,
                chunks_done=counts["done"],
                chunks=table.chunks - table.first,
                step=done.tick.active[0][1] + 1,
                num_steps=table.num_steps,
                steps_done=counts["steps"],
                computed_fraction=counts["computed"] / max(1, counts["steps"]),
                kv_fill=fill,
                kv_bytes=kv.nbytes,
                kv_host_bytes=kv.host_nbytes,
            )
            self._on_progress(progress)
