"""The engine's front on the lead of a gang: requests in, chunks out, several at a time.

It looks like `engine.engine.Engine`, so that whoever makes a video need not know where it is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from engine.cache import CacheSettings, Decision, Observation
from engine.engine import Chunk, OnProgress, Progress, Totals
from engine.kv import KVBuffer, KVSettings
from engine.noise import NoiseSource
from engine.prepare import Encoded, Pipeline, encode, prepare
from engine.record import RunTrace
from engine.request import Request
from engine.schedule import Schedule
from models.errors import InputError
from models.family import CaptionTable
from parallel.decoder import Decoder
from parallel.head import Head, Listener
from parallel.order import TickDone

__all__ = ["Made", "ParallelEngine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A chunk of one of several videos.

    Attributes:
        video: which.
        chunk: the chunk.
    """

    video: int
    chunk: Chunk


class _Reporter(Listener):
    """Passes on what happens to one video: finished latents, progress, and the record in the making."""

    def __init__(
        self,
        schedule: Schedule,
        kv: Callable[[], KVBuffer],
        on_finished: Callable[[Tensor], None],
        on_progress: OnProgress | None,
        trace: RunTrace | None,
    ) -> None:
        self._schedule, self._kv = schedule, kv
        self._on_finished, self._on_progress, self._trace = on_finished, on_progress, trace
        self._totals, self._done = Totals(), 0
        if trace is not None:
            trace.begin(schedule)

    def decided(self, seen: Observation, decision: Decision) -> None:
        if self._trace is not None:
            self._trace.decided(seen, decision)

    def retired(self, chunk: int) -> None:
        if self._trace is not None and chunk >= self._schedule.first:
            shares = self._kv().kept_shares(self._schedule.chunks)
            self._trace.retired(chunk, shares[: chunk + 1].numpy())

    def ticked(self, done: TickDone) -> None:
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
        if latents.shape[2]:
            self._on_finished(latents)


class ParallelEngine:
    """Makes videos with a gang.

    Whoever makes one video or some calls `generate` or `generate_many`; whoever schedules calls `submit` and `step`.

    Args:
        pipeline: the model, of which only the first stage's layers need to be there.
        head: runs them.
        kv_of: the first stage's KV buffers of a request.
        new_decoder: makes the decoder when frames are wanted.
        cache: which steps are reused.
        kv: how much of the past is held.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        head: Head,
        kv_of: Callable[[int], KVBuffer],
        new_decoder: Callable[[], Decoder],
        cache: CacheSettings,
        kv: KVSettings,
    ) -> None:
        self._pipeline, self._head, self._kv_of = pipeline, head, kv_of
        self._new_decoder, self._cache, self._kv = new_decoder, cache, kv
        self._decoder: Decoder | None = None
        self._requests = 0
        self._in_flight: list[int] = []

    @property
    def in_flight(self) -> int:
        """Videos that were submitted and are not handed out to their last chunk."""
        return len(self._in_flight)

    def submit(self, request: Request, on_progress: OnProgress | None = None, trace: RunTrace | None = None) -> int:
        """Begin a video besides those in flight.

        Args:
            request: what to make.
            on_progress: called after every tick.
            trace: told what happens, for a record.

        Returns:
            The video's number, which `step` hands its chunks out with.

        Raises:
            InputError: the model cannot make what is asked for; the videos in flight are not touched.
        """
        if self._decoder is None:
            self._decoder = self._new_decoder()
        decoder, index = self._decoder, count()
        number = self._admit(
            request,
            encode(self._pipeline, request),
            lambda latents: decoder.put(number, next(index), latents),
            on_progress,
            trace,
        )
        self._in_flight.append(number)
        return number

    def step(self) -> list[Made]:
        """Do one thing for the videos in flight, and hand out the chunks that are ready; those of a video in order.

        Raises:
            GangError: a rank has failed.
        """
        decoder = self._decoder
        if decoder is None:
            return []
        if not self._head.idle:
            self._head.pump()
        made = []
        for number in list(self._in_flight):
            while (chunk := decoder.get(number, wait=self._head.idle)) is not None:
                made.append(Made(video=number, chunk=chunk))
            if not self._head.running(number) and not decoder.pending(number):
                self._in_flight.remove(number)
        return made

    def cancel(self, number: int) -> None:
        """Make no more of a video."""
        self._head.give_up(number)
        if self._decoder is not None:
            self._decoder.forget(number)
        if number in self._in_flight:
            self._in_flight.remove(number)

    def generate(
        self, request: Request, on_progress: OnProgress | None = None, trace: RunTrace | None = None
    ) -> Iterator[Chunk]:
        """Make a video, chunk by chunk; as `Engine.generate`."""
        watchers = {} if on_progress is None else {0: on_progress}
        for made in self.generate_many([request], 1, watchers, {} if trace is None else {0: trace}):
            yield made.chunk

    def generate_many(
        self,
        requests: Iterable[Request],
        concurrency: int,
        on_progress: Mapping[int, OnProgress] | None = None,
        traces: Mapping[int, RunTrace] | None = None,
    ) -> Iterator[Made]:
        """Make several videos, some of them at the same time.

        Args:
            requests: what to make; the next is read when there is room for it.
            concurrency: how many to make at a time.
            on_progress: called after every tick, by the place of the video among the requests.
            traces: told what happens, by the same.

        Yields:
            Chunks as they are finished, with the place of their video; those of one video in order.

        Raises:
            InputError: the model cannot make what is asked for.
        """
        if concurrency < 1:
            raise InputError(f"a concurrency of {concurrency} makes nothing: give 1 or more")
        places: dict[int, int] = {}
        coming = enumerate(requests)
        try:
            more = True
            while more or self.in_flight:
                while more and self.in_flight < concurrency:
                    place, request = next(coming, (-1, None))
                    if request is None:
                        more = False
                    else:
                        watcher, trace = (on_progress or {}).get(place), (traces or {}).get(place)
                        places[self.submit(request, watcher, trace)] = place
                for made in self.step():
                    yield Made(video=places[made.video], chunk=made.chunk)
        except (GeneratorExit, InputError):  # the gang is well, and goes on without these videos
            for number in places:
                self.cancel(number)
            raise

    def generate_latents(
        self,
        request: Request,
        captions: CaptionTable,
        prefix: Tensor | None,
        noise: NoiseSource,
        on_progress: OnProgress | None = None,
        trace: RunTrace | None = None,
    ) -> Iterator[Tensor]:
        """Make a video's latents; as `Engine.generate_latents`."""
        made: deque[Tensor] = deque()
        encoded = Encoded(captions=captions, prefix=prefix, noise=noise)
        number = self._admit(request, encoded, made.append, on_progress, trace)
        try:
            while self._head.running(number) or made:
                while made:
                    yield made.popleft()
                if self._head.running(number):
                    self._head.pump()
        except GeneratorExit:
            self._head.give_up(number)
            raise

    def close(self) -> None:
        """Let the ranks go, after what is under way."""
        self._head.leave()
        if self._decoder is not None:
            self._decoder.close()

    def _admit(
        self,
        request: Request,
        encoded: Encoded,
        on_finished: Callable[[Tensor], None],
        on_progress: OnProgress | None,
        trace: RunTrace | None,
    ) -> int:
        number = self._requests
        self._requests += 1
        prepared = prepare(
            self._pipeline,
            request,
            encoded,
            number=number,
            cache=self._cache,
            kv=self._kv,
            observe=trace is not None,
        )
        reporter = _Reporter(prepared.run.schedule, lambda: self._kv_of(number), on_finished, on_progress, trace)
        self._head.admit(number, prepared, reporter)
        return number
