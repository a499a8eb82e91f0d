"""What is counted of one video while it is made: for whoever watches, for the record, and for checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.kv.buffer import KVBuffer
from engine.order import TickProgress
from engine.record import Recorder
from engine.schedule import Schedule

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A video that is made in several runs."""

    chunks: int  # that are made
    ticks: int  # of all runs
    before: int  # ticks of the runs before this one


class ProgressReporter:
    """Counts, and passes on what happens to one video."""

    def __init__(
        self,
        schedule: Schedule,  # of the run
        kv: Callable[[], KVBuffer],  # its buffers in this process
        on_progress: OnProgress | None,  # called after every tick; None for nobody
        recorder: Recorder | None,  # takes what happens, for a record; None for none
        counts: Mapping[str, int],  # of an earlier run that this one goes on from
        *,
        whole: Whole | None = None,  # the video, if this run is a span of it
    ) -> None:
        self._whole = whole or Whole(chunks=schedule.chunks - schedule.first, ticks=schedule.ticks, before=0)
        self._schedule, self._kv, self._on_progress, self._recorder = schedule, kv, on_progress, recorder
        self.counts = Counter({**dict.fromkeys(("items", "computed", "steps", "done", "chunks"), 0), **counts})
        """Passes (`items`), `computed` steps, all `steps`, chunks `done`; `chunks`, index of the next to hand out."""
        if recorder is not None:
            recorder.begin(schedule)

    def retired(self, chunks: Sequence[int]) -> None:
        """Chunks have left the window for the clean region, which was cut down to its size."""
        if self._recorder is None or not chunks:
            return
        shares = self._kv().kept_shares(chunks[-1] + 1).numpy()
        for chunk in chunks:
            if chunk >= self._schedule.first:
                self._recorder.retired(chunk, shares[: chunk + 1])

    def ticked(self, done: TickProgress) -> None:
        """All chunks of a tick have taken their step."""
        finished = len(done.tick.finishing)
        self.counts.update(items=done.items, computed=done.computed, steps=len(done.tick.active), done=finished)
        if self._recorder is None and self._on_progress is None:
            return
        kv = self._kv()
        fill = kv.layout.used_rows / kv.layout.capacity
        if self._recorder is not None:
            self._recorder.ticked(done.tick.index, seconds=done.seconds, items=done.items, fill=fill)
        if self._on_progress is not None:
            schedule, counts = self._schedule, self.counts
            progress = Progress(
                tick=self._whole.before + done.tick.index + 1,
                ticks=self._whole.ticks,
                chunks_done=counts["done"],
                chunks=self._whole.chunks,
                step=done.tick.active[0][1] + 1,
                num_steps=schedule.num_steps,
                steps_done=counts["steps"],
                computed_fraction=counts["computed"] / max(1, counts["steps"]),
                kv_fill=fill,
                kv_bytes=kv.nbytes,
                kv_host_bytes=kv.host_nbytes,
            )
            self._on_progress(progress)
