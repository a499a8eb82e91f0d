"""The one loop that makes videos: requests in, chunks out, several at a time.

`WorkOrder` says what may begin next in each video; the engine begins what has been ready longest, takes results in, and
hands finished chunks out. A `Runner` runs the items. Nothing waits as long as any video has something to begin.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.contents import pack_run
from engine.checkpoint.files import Checkpointer, discard, must_fit
from engine.decoder import Chunk, Decoder
from engine.executor import LocalRunner, NotFinite, Runner
from engine.kv.layout import KVSettings
from engine.order import AdmissionGate, WorkOrder
from engine.progress import OnProgress, ProgressReporter
from engine.record import Recorder
from engine.request import Admission, Request, open_quantum, prepare, sampling_of, timetable, variant_of
from engine.reuse.policy import ReuseSettings
from engine.schedule import Timetable
from engine.spans import Course
from engine.submission import Reader, Submission
from engine.video import VideoRun, WorkItem
from models.errors import InputError
from models.protocols import Pipeline

_NO_REUSE, _OWN_RANGE = ReuseSettings(), KVSettings()
_GATE_SECONDS = 0.01  # to sleep at most while a gate is closed or a disk is waited for
_RESULTS_SECONDS = 0.002  # between two looks at results meanwhile


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """A chunk of one of several videos."""

    video: int
    chunk: Chunk


@dataclass(slots=True)
class _Video:
    asked: Submission
    course: Course
    reporter: ProgressReporter
    prepared: Callable[..., tuple[VideoRun, Admission]]  # a run of one of its spans
    ordered: Callable[..., WorkOrder]
    checkpointer: Checkpointer | None
    decodes: bool
    stored: Callable[[], int] | None
    handed_out: int  # index of the next chunk
    run: VideoRun = field(init=False)  # of the present span; so is the next
    order: WorkOrder = field(init=False)
    chunks: deque[Chunk] = field(default_factory=deque)  # of a video that is not decoded
    ready_since: float | None = None
    released: bool = False  # the runner has let go of it

    @property
    def writing(self) -> bool:
        """Files of a checkpoint are not on the disk yet, or are not whole and have to be."""
        return self.checkpointer is not None and self.checkpointer.waits


class NotKept(InputError):
    """A checkpoint of a video cannot be written. Others can go on once it is cancelled."""

    def __init__(self, video: int, message: str) -> None:
        super().__init__(message)
        self.video = video


class Engine:
    """Makes videos with one loaded model: one by `generate`, several at once by `submit` and `step`."""

    def __init__(
        self,
        pipeline: Pipeline,  # the model; on ranks only the first stage's layers need to be there
        runner: Runner | None = None,  # runs the items; None for this process
        *,
        reuse: ReuseSettings = _NO_REUSE,  # which steps are reused
        kv: KVSettings = _OWN_RANGE,  # how much of the past is held
        identity: str = "",  # names the model and its weights; a checkpoint is taken up by the same only
        barrier: bool = False,  # wait for all chunks of a tick before the next; for comparison
        on_decoded: Callable[[float], None] = lambda began: None,  # as of `Decoder`
    ) -> None:
        self._pipeline, self._reuse, self._kv = pipeline, reuse, kv
        self._runner: Runner = runner or LocalRunner(pipeline.model, pipeline.attention)
        self.reader = Reader(pipeline=pipeline, layout=self._runner.layout, identity=identity, reuse=reuse, kv=kv)
        self._barrier, self._wake = barrier, threading.Event()
        self._decoder = Decoder(pipeline.model.kv.device, on_decoded=on_decoded, check=self._runner.check)
        self._videos: dict[int, _Video] = {}
        self._not_finite: dict[int, NotFinite] = {}  # videos with a bad chunk, to be said with the next step
        self._numbers = 0

    @property
    def in_flight(self) -> int:
        """Videos that were submitted and are not handed out to their last chunk."""
        return len(self._videos)

    def running(self, video: int) -> bool:
        """Whether a video is in flight."""
        return video in self._videos

    def wake(self) -> None:
        """A gate has opened, so `step` need not wait any more. May be called by any thread."""
        self._wake.set()

    def change_prompt(self, video: int, first: int, prompt: str, text: Tensor) -> None:
        """Make the chunks of a video from `first` on of another prompt, which was encoded, until its script has one.

        `first` is counted as in a script. None of these chunks may have entered: a gate sees to that. Nothing happens
        if the video is not in flight.
        """
        held = self._videos.get(video)
        if held is None:
            return
        chunk = held.course.table.first + first if first else None
        held.course.change_text(chunk, text)
        self._runner.change_text(video, None if chunk is None else chunk - held.course.place.chunk, text)
        held.asked = replace(held.asked, request=held.asked.request.with_prompt(first, prompt))
        if held.checkpointer is not None:
            held.checkpointer.fingerprint = self.reader.fingerprint(held.asked)

    def submit(
        self,
        what: Request | Submission,  # to make; a request is read first, without a checkpoint
        *,
        on_progress: OnProgress | None = None,  # called after every tick
        recorder: Recorder | None = None,  # takes what happens, for a record
        stored: Callable[[], int] | None = None,  # the next chunk not in safe hands; None for the next one to hand out
        gate: AdmissionGate | None = None,  # lets its quanta begin, see `wake`; None lets all
        decode: bool = True,  # whether frames are wanted
    ) -> int:
        """Begin a video besides those in flight, or go on with it from the checkpoint that was found.

        Gives its number, which `step` hands its chunks out with. A record of a video that goes on from a checkpoint has
        the rest only. A checkpoint is only made whole when all chunks before it are in safe hands.

        Raises:
            InputError: the model cannot make what is asked for; the videos in flight are not touched.
            Damaged: a file of the checkpoint has come to harm since it was found.
        """
        what = self.reader.read(what) if isinstance(what, Request) else what
        number, self._numbers = self._numbers, self._numbers + 1
        pipeline, reuse = variant_of(self._pipeline, what.request), what.reuse or self._reuse
        sampling = sampling_of(pipeline, what.request, what.encoded, reuse)
        table = timetable(sampling, what.request.chunks, what.encoded.given)
        overlap, found = sampling.overlap * sampling.chunk_width, what.found
        start, counts, folder = (0, {}, None) if found is None else (found.quantum, found.counts, found.folder)
        kv, observe = what.kv or self._kv, recorder is not None and recorder.observes
        checkpointer = self._checkpointer(number, what, table, start)
        video = _Video(
            what,
            Course(table, what.encoded, overlap, quantum=start, state=what.course),
            ProgressReporter(table, partial(self._runner.kv, number), on_progress, recorder, counts),
            partial(prepare, pipeline, what.request, number=number, reuse=reuse, kv=kv, observe=observe, table=table),
            partial(WorkOrder, barrier=self._barrier, gate=gate, checkpointer=checkpointer),
            checkpointer,
            decode,
            stored,
            handed_out=what.first,
        )
        self._begin_span(video, folder)
        if decode:
            self._begin_decoding(number, what, pipeline)
        if recorder is not None:
            recorder.begin(table)
        self._videos[number] = video
        return number

    def _checkpointer(self, number: int, what: Submission, table: Timetable, start: int) -> Checkpointer | None:
        if what.checkpoint is None:
            return None
        save, saved = partial(self._save, number), partial(self._runner.saved, number)
        return Checkpointer(what.checkpoint, what.fingerprint, open_quantum(what.encoded, table), start, save, saved)

    def _begin_span(self, video: _Video, folder: Path | None = None) -> None:
        """Begin the present span of a video's course, at its start or at the checkpoint in a folder."""
        course = video.course
        video.run, admission = video.prepared(course.encoded, span=course.number, checkpoint=folder)
        if folder is not None and video.asked.state is not None:
            with must_fit(folder):
                video.run.restore(video.asked.state)
        self._runner.admit(admission)
        video.reporter.begin_span(course.number)
        start, before = course.quantum, course.place.quantum
        video.order = video.ordered(video.run, on_decision=video.reporter.decided, start=start, before=before)

    def _begin_decoding(self, number: int, what: Submission, pipeline: Pipeline) -> None:
        """Tell the decoder what it must know before a video's first chunk."""
        self._decoder.begin(number, pipeline.autoencoder)
        prefix = what.encoded.prefix
        if what.decoder:
            self._decoder.restore(number, what.decoder)
        elif prefix is not None and prefix.shape[2] > 1:  # an image is shown
            self._decoder.prime(number, prefix)

    def step(self) -> list[ChunkResult]:
        """Do one thing for the videos in flight, and hand out the chunks that are ready; those of a video in order.

        Unless `stored` says otherwise, the next call means that those chunks are in safe hands: only then is a
        checkpoint that is after them made whole.

        Raises:
            GangError: a rank has failed.
            NotFinite: one of the videos cannot be made, and is to be cancelled; the others go on.
            DecoderHung: the autoencoder does not come on.
            NotKept: a checkpoint cannot be written; likewise.
        """
        for number, video in self._videos.items():
            if number in self._not_finite:
                self._give_up(self._not_finite[number])
            if video.checkpointer is not None:
                try:
                    video.checkpointer.poll(video.handed_out if video.stored is None else video.stored())
                except InputError as error:
                    raise NotKept(number, str(error)) from None
        if not self._idle():
            self._advance()
        idle, results = self._idle(), []
        for number, video in list(self._videos.items()):
            while (chunk := self._next_chunk(number, video, wait=idle)) is not None:
                results.append(ChunkResult(video=number, chunk=chunk))
                video.handed_out += 1
            if video.released and not video.chunks and not self._decoder.pending(number):
                del self._videos[number]
                self._decoder.forget(number)
        return results

    def cancel(self, video: int) -> None:
        """Make no more of a video; results in flight are discarded."""
        held = self._videos.pop(video, None)
        if held is None:
            return
        self._not_finite.pop(video, None)
        self._decoder.forget(video)
        if not held.released:
            self._runner.release(video)

    def close(self) -> None:
        """Cancel what is in flight and let the ranks go."""
        for video in list(self._videos):
            self.cancel(video)
        self._runner.close()
        self._decoder.close()

    def generate(
        self,
        what: Request | Submission,
        on_progress: OnProgress | None = None,
        recorder: Recorder | None = None,
        *,
        decode: bool = True,
    ) -> Iterator[Chunk]:
        """Make a video while no other is in flight, and yield its chunks in order; raises as `submit` and `step`."""
        number = self.submit(what, on_progress=on_progress, recorder=recorder, decode=decode)
        try:
            while self.running(number):
                for result in self.step():
                    yield result.chunk
        except (GeneratorExit, InputError, RuntimeError):  # the runner is well, and goes on without this video
            self.cancel(number)
            raise

    def _advance(self) -> None:
        """Take results in, and begin the work that has been ready longest, or wait for a result."""
        self._runner.check()
        self._wake.clear()
        self._take(self._runner.results(wait=False))
        number = self._first_ready()
        if number is not None:
            video = self._videos[number]
            video.ready_since = None
            work = video.order.take()
            self._runner.begin(work)
            video.reporter.retired([op.chunk for op in work.item.before if op.kind == "retire"])
        elif not self._idle():
            self._wait()

    def _idle(self) -> bool:
        """All work of all videos is done, but for decoding."""
        return all(video.released for video in self._videos.values())

    def _first_ready(self) -> int | None:
        """The video whose next work has been ready longest."""
        first, since = None, float("inf")
        for number, video in list(self._videos.items()):
            if video.released:
                continue
            if not video.order.ready():
                self._collect(number, video)
                continue
            if video.ready_since is None:
                self._collect(number, video)
                video.ready_since = time.perf_counter()
            if video.ready_since < since:
                first, since = number, video.ready_since
        return first

    def _wait(self) -> None:
        """Wait for a result; where a gate or a disk is waited for too, not for long."""
        polls = any(video.order.held or video.writing for video in self._videos.values())
        if not self._runner.pending and not polls:
            return
        with self._runner.waiting():
            results = self._poll_results() if polls else self._runner.results(wait=True)
        self._take(results)

    def _poll_results(self) -> Iterable[tuple[WorkItem, Tensor]]:
        """Results, if some come before something wakes this thread."""
        until = time.perf_counter() + _GATE_SECONDS
        interval = _RESULTS_SECONDS if self._runner.pending else _GATE_SECONDS
        while not self._wake.wait(interval) and time.perf_counter() < until:
            if self._runner.pending and (results := list(self._runner.results(wait=False))):
                return results
        return []

    def _take(self, results: Iterable[tuple[WorkItem, Tensor]]) -> None:
        for item, velocity in results:
            video = self._videos.get(item.request)
            if video is not None:
                video.order.returned(item, velocity)
        for number in self._videos:
            if (error := self._runner.not_finite(number)) is not None:
                self._give_up(error)

    def _give_up(self, error: NotFinite) -> None:
        """Raise it. The video's checkpoints are deleted, as nobody knows since when it was wrong."""
        if (checkpointer := self._videos[error.video].checkpointer) is not None:
            discard(checkpointer.folder)
        raise error

    def _collect(self, number: int, video: _Video) -> None:
        """Report what has happened to a video since the last look, and let go of it if all of its work is done."""
        for done in video.order.ticks_done():
            video.reporter.ticked(done)
        for _, latents in video.order.finished():
            video.course.finished(latents)
            if latents.shape[2]:
                self._finished(number, video, latents)
        # A video whose files are still being written is not done: its folder may be deleted after that.
        if video.order.over and not video.writing:
            self._runner.release(number)
            video.released = video.course.last
            if not video.released:
                video.course.go_on(self._pipeline.model.kv.dtype)
                self._begin_span(video)

    def _finished(self, number: int, video: _Video, latents: Tensor) -> None:
        """Have a chunk decoded, or hand out its latents alone."""
        index = video.reporter.counts["chunks"]
        video.reporter.counts["chunks"] += 1
        if video.decodes:
            self._decoder.put(number, index, latents)
        else:
            video.chunks.append(Chunk(index=index, latents=latents, frames=None))

    def _next_chunk(self, number: int, video: _Video, *, wait: bool) -> Chunk | None:
        if number in self._not_finite:
            return None
        if video.chunks:
            return video.chunks.popleft()
        chunk = self._decoder.get(number, wait=wait)
        # The runner of a GPU may learn of what is not finite too late. These latents are on the host in any case.
        if chunk is not None and not torch.isfinite(chunk.latents.sum()):
            table = video.course.table
            index = table.first + chunk.index
            place = table.tick_of(index, table.num_steps - 1), index
            self._not_finite[number] = NotFinite(number, rank=0, place=place)
            return None
        return chunk

    def _save(self, number: int, folder: Path) -> Mapping[str, int]:
        """Have all ranks keep what a video has come to."""
        video = self._videos[number]
        self._collect(number, video)  # so that the counts are those of all ticks before
        contents = pack_run(video.run.state(), self._decoder.state(number), video.course.state())
        self._runner.save(number, folder, contents, self._wake.set)
        return dict(video.reporter.counts)
