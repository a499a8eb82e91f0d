"""The engine's front on the lead of a gang: requests in, chunks out, several at a time.

It looks like `engine.engine.Engine`, so that whoever makes a video need not know where it is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

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

__all__ = ["Making", "ParallelEngine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """A chunk of one of several videos.

    Attributes:
        video: which, in the order in which they were asked for.
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

    Args:
        pipeline: the model, of which only the first stage's layers need to be there.
        head: runs them.
        new_decoder: makes the decoder when frames are wanted.
        cache: which steps are reused.
        kv: how much of the past is held.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        head: Head,
        runner_kv: Callable[[int], KVBuffer],
        new_decoder: Callable[[], Decoder],
        cache: CacheSettings,
        kv: KVSettings,
    ) -> None:
        self._pipeline, self._head, self._runner_kv = pipeline, head, runner_kv
        self._new_decoder, self._cache, self._kv = new_decoder, cache, kv
        self._decoder: Decoder | None = None
        self._requests = 0

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
    ) -> Iterator[Making]:
        """Make several videos, some of them at the same time.

        Args:
            requests: what to make; the next is read when there is room for it.
            concurrency: how many to make at a time.
            on_progress: called after every tick, by the video's number.
            traces: told what happens, by the video's number.

        Yields:
            Chunks as they are finished; those of one video in order.

        Raises:
            InputError: the model cannot make what is asked for.
        """
        if concurrency < 1:
            raise InputError(f"a concurrency of {concurrency} makes nothing: give 1 or more")
        if self._decoder is None:
            self._decoder = self._new_decoder()
        decoder, coming = self._decoder, enumerate(requests)
        active: dict[int, int] = {}
        """Numbers of videos, by request."""
        more = True
        try:
            while more or active:
                while more and len(active) < concurrency:
                    following = next(coming, None)
                    if following is None:
                        more = False
                        break
                    video, wanted = following
                    number = self._admit(
                        wanted,
                        encode(self._pipeline, wanted),
                        self._decoding(decoder),
                        (on_progress or {}).get(video),
                        (traces or {}).get(video),
                    )
                    active[number] = video
                yield from self._advance(decoder, active)
        except (GeneratorExit, InputError):  # the gang is well, and goes on without these videos
            for request in active:
                self._head.give_up(request)
                decoder.forget(request)
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
        number = self._admit(request, encoded, lambda _: made.append, on_progress, trace)
        try:
            while self._head.running(number) or made:
                while made:
                    yield made.popleft()
                self._head.pump()
        except GeneratorExit:
            self._head.give_up(number)
            raise

    def close(self) -> None:
        """Let the ranks go, after what is under way."""
        self._head.leave()
        if self._decoder is not None:
            self._decoder.close()

    def _advance(self, decoder: Decoder, active: dict[int, int]) -> Iterator[Making]:
        """Do one thing, and hand out what is decoded."""
        if any(self._head.running(request) for request in active):
            self._head.pump()
        for request, video in list(active.items()):
            over = not self._head.running(request)
            others = any(self._head.running(other) for other in active)
            while (chunk := decoder.get(request, wait=over and not others)) is not None:
                yield Making(video=video, chunk=chunk)
            if over and not decoder.pending(request):
                del active[request]

    def _decoding(self, decoder: Decoder) -> Callable[[int], Callable[[Tensor], None]]:
        def of(request: int) -> Callable[[Tensor], None]:
            count = 0

            def put(latents: Tensor) -> None:
                nonlocal count
                decoder.put(request, count, latents)
                count += 1

            return put

        return of

    def _admit(
        self,
        request: Request,
        encoded: Encoded,
        finished: Callable[[int], Callable[[Tensor], None]],
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
        reporter = _Reporter(
            prepared.run.schedule, lambda: self._runner_kv(number), finished(number), on_progress, trace
        )
        self._head.admit(number, prepared, reporter)
        return number
