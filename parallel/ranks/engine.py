"""The engine's front on the lead of a gang: requests in, chunks out, several at a time.

It looks like `engine.engine.Engine`, so that whoever makes a video need not know where it is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.checkpoint.checkpointer import Keeping
from engine.checkpoint.files import CheckpointConfig, newest, read_contents
from engine.checkpoint.snapshot import RUN_FILE, fingerprint, unpack_run
from engine.decoder import Decoder
from engine.engine import Chunk, OnProgress
from engine.kv.buffer import KVBuffer
from engine.kv.size import KVSettings
from engine.noise import NoiseSource
from engine.order import AdmissionGate
from engine.prepare import Encoded, encode, prepare
from engine.progress import OnFinished, Reporter
from engine.record import Recorder
from engine.request import Request
from engine.reuse.settings import ReuseSettings
from models.errors import InputError
from models.protocols import CaptionTable, Pipeline
from parallel.ranks.leader import Leader
from parallel.topology.mesh import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """A chunk of one of several videos."""

    video: int
    chunk: Chunk


class GangEngine:
    """Makes videos with a gang.

    Whoever makes one video or some calls `generate` or `generate_many`; whoever schedules calls `submit` and `step`.

    Args:
        pipeline: the model, of which only the first stage's layers need to be there.
        head: runs them.
        kv_of: the first stage's KV buffers of a request.
        new_decoder: makes the decoder when frames are wanted.
        cache: which steps are reused.
        kv: how much of the past is held.
        layout: of the ranks; a checkpoint is taken up by the same only.
        identity: names the model and its weights, for the same.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        head: Leader,
        kv_of: Callable[[int], KVBuffer],
        new_decoder: Callable[[], Decoder],
        cache: ReuseSettings,
        kv: KVSettings,
        *,
        layout: Layout,
        identity: str = "",
    ) -> None:
        self._pipeline, self._head, self._kv_of = pipeline, head, kv_of
        self._new_decoder, self._cache, self._kv = new_decoder, cache, kv
        self._layout, self._identity = layout, identity
        self._decoder: Decoder | None = None
        self._requests = 0
        self._in_flight: list[int] = []
        self._resumed: dict[int, int] = {}
        self._handed_out: dict[int, int] = {}
        """Index of the next chunk of each video in flight."""
        self._taken: dict[int, Callable[[], int]] = {}

    @property
    def in_flight(self) -> int:
        """Videos that were submitted and are not handed out to their last chunk."""
        return len(self._in_flight)

    def resumed(self, number: int) -> int:
        """Index of the first chunk of a video that is handed out: 0, or more if it goes on from a checkpoint."""
        return self._resumed.get(number, 0)

    def wake(self) -> None:
        """A gate has opened: `step` need not wait any more, as it does for some milliseconds while all are shut. May be
        called by any thread."""
        self._head.wake()

    def submit(
        self,
        request: Request,
        on_progress: OnProgress | None = None,
        trace: Recorder | None = None,
        *,
        checkpoint: CheckpointConfig | None = None,
        gate: AdmissionGate | None = None,
        taken: Callable[[], int] | None = None,
    ) -> int:
        """Begin a video besides those in flight, or go on with it if there is a checkpoint of it.

        A record of a video that goes on from a checkpoint has the rest only.

        Args:
            request: what to make.
            on_progress: called after every tick.
            trace: told what happens, for a record.
            checkpoint: where and how often to keep how far it is.
            gate: lets its quanta begin; None lets all. See `wake`.
            taken: index of the next chunk that is not in safe hands, where handing it out is not enough. A checkpoint
                is only made whole when all chunks before it are.

        Returns:
            The video's number, which `step` hands its chunks out with.

        Raises:
            InputError: the model cannot make what is asked for, or the checkpoint is of another request, model, layout
                or setting; the videos in flight are not touched.
        """
        if self._decoder is None:
            self._decoder = self._new_decoder()
        decoder = self._decoder
        keeping = None if checkpoint is None else self._keep(request, checkpoint)
        number = self._admit(
            request,
            encode(self._pipeline, request),
            lambda index, latents: decoder.put(number, index, latents),
            on_progress,
            trace,
            gate=gate,
            keeping=keeping,
        )
        if keeping is not None and keeping.found is not None:
            self._resumed[number] = keeping.found.counts["chunks"]
        self._handed_out[number] = self.resumed(number)
        if taken is not None:
            self._taken[number] = taken
        self._in_flight.append(number)
        return number

    def step(self) -> list[ChunkResult]:
        """Do one thing for the videos in flight, and hand out the chunks that are ready; those of a video in order.

        The next call says that those chunks are in safe hands: only then is a checkpoint that is after them made whole.

        Raises:
            GangError: a rank has failed.
            InputError: a checkpoint cannot be written, which ends the gang.
        """
        decoder = self._decoder
        if decoder is None:
            return []
        for number in self._in_flight:
            safe = self._taken[number]() if number in self._taken else self._handed_out[number]
            self._head.commit(number, safe)
        if not self._head.idle:
            self._head.pump()
        made = []
        for number in list(self._in_flight):
            while (chunk := decoder.get(number, wait=self._head.idle)) is not None:
                made.append(ChunkResult(video=number, chunk=chunk))
                self._handed_out[number] += 1
            if not self._head.running(number) and not decoder.pending(number):
                self._let_go(number)
        return made

    def running(self, number: int) -> bool:
        """Whether a video is still in flight."""
        return number in self._in_flight

    def cancel(self, number: int) -> None:
        """Make no more of a video."""
        self._head.give_up(number)
        if self._decoder is not None:
            self._decoder.forget(number)
        self._let_go(number)

    def generate(
        self, request: Request, on_progress: OnProgress | None = None, trace: Recorder | None = None
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
        traces: Mapping[int, Recorder] | None = None,
    ) -> Iterator[ChunkResult]:
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
                    yield ChunkResult(video=places[made.video], chunk=made.chunk)
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
        trace: Recorder | None = None,
    ) -> Iterator[Tensor]:
        """Make a video's latents; as `Engine.generate_latents`."""
        made: deque[Tensor] = deque()
        encoded = Encoded(captions=captions, prefix=prefix, noise=noise)
        number = self._admit(request, encoded, lambda _, latents: made.append(latents), on_progress, trace)
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

    def _let_go(self, number: int) -> None:
        if number in self._in_flight:
            self._in_flight.remove(number)
        self._handed_out.pop(number, None)
        self._taken.pop(number, None)

    def _keep(self, request: Request, plan: CheckpointConfig) -> Keeping:
        """Look for a checkpoint to go on from.

        Raises:
            InputError: there is one that does not fit.
        """
        own = fingerprint(
            request,
            self._pipeline,
            self._identity,
            {"pp": self._layout.pp, "cp": self._layout.cp},
            self._cache,
            self._kv,
        )
        found = newest(plan.folder)
        if found is not None:
            found.check_fits(own)
        return Keeping(plan=plan, fingerprint=own, found=found)

    def _admit(
        self,
        request: Request,
        encoded: Encoded,
        on_finished: OnFinished,
        on_progress: OnProgress | None,
        trace: Recorder | None,
        *,
        gate: AdmissionGate | None = None,
        keeping: Keeping | None = None,
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
        run, found = prepared.run, None if keeping is None else keeping.found
        counts = None
        if found is not None:
            run.restore(unpack_run(read_contents(found.place / RUN_FILE)))
            counts = found.counts
        reporter = Reporter(run.schedule, lambda: self._kv_of(number), on_finished, on_progress, trace, counts)
        self._head.admit(number, prepared, reporter, gate=gate, keeping=keeping)
        return number
