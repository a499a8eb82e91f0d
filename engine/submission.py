"""A request as an engine takes it in: encoded, and with the checkpoint that it goes on from.

Here is what takes long before a video can begin. It touches no video in flight, so any thread may do it.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from engine.checkpoint.contents import RUN_FILE, fingerprint, of_past, unpack_run
from engine.checkpoint.files import Checkpoint, CheckpointConfig, must_fit, newest, read_contents
from engine.files import Damaged
from engine.kv.layout import KVSettings
from engine.request import Encoded, Request, encode, open_quantum, sampling_of, timetable, variant_of
from engine.reuse.policy import ReuseSettings
from engine.video import VideoState
from models.protocols import Pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A request that was read: encoded, and with its last checkpoint found and verified."""

    request: Request
    encoded: Encoded
    checkpoint: CheckpointConfig | None = None
    fingerprint: Callable[[int], Mapping[str, object]] = lambda quantum: {}  # of what the state before a quantum is of
    found: Checkpoint | None = None  # the checkpoint to go on from
    state: VideoState | None = None  # what that holds of the run
    decoder: Mapping[str, Tensor] = field(default_factory=dict)  # and of its decoder, if that keeps something
    course: Mapping[str, Tensor] = field(default_factory=dict)  # and of its spans
    damage: tuple[str, ...] = ()  # a line for each damaged checkpoint that was deleted
    reuse: ReuseSettings | None = None  # which steps are reused; None for the engine's own settings
    kv: KVSettings | None = None  # how much of the past is held; likewise

    @property
    def first(self) -> int:
        """Index of the first chunk that is handed out: more than 0 if it goes on from a checkpoint."""
        return 0 if self.found is None else self.found.counts["chunks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads requests for an engine."""

    pipeline: Pipeline
    layout: Mapping[str, int]  # of the ranks; a checkpoint is of one
    identity: str  # as of `Engine`
    reuse: ReuseSettings  # of requests that have none of their own
    kv: KVSettings  # likewise

    def read(
        self,
        request: Request,
        checkpoint: CheckpointConfig | None = None,
        *,
        stored: int | None = None,
        reuse: ReuseSettings | None = None,
        kv: KVSettings | None = None,
    ) -> Submission:
        """Encode a request and look for its last checkpoint: what takes long before a video can begin.

        It touches no video in flight, and so may be called by another thread while this one steps. `stored` chunks are
        in safe hands, None for all; a checkpoint after them is of no use. A damaged one is deleted, and the one before
        it taken. Without `reuse` and `kv` the engine's own settings hold. An InputError says that the model cannot take
        the request, or that the checkpoint is of another one, or of another model, layout or setting.
        """
        encoded = encode(variant_of(self.pipeline, request), request)
        submission = Submission(request=request, encoded=encoded, checkpoint=checkpoint, reuse=reuse, kv=kv)
        if checkpoint is None:
            return submission
        own, damage = self.fingerprint(submission), list[str]()

        def on_damage(folder: Path, error: Damaged) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            damage.append(f"{error}; this checkpoint was deleted, and what comes after the one before it is made again")

        with suppress(OSError):  # else it is said when there is something to write
            checkpoint.folder.mkdir(exist_ok=True)
        found = newest(checkpoint.folder, stored=stored, on_damage=on_damage)
        submission = replace(submission, fingerprint=own, found=found, damage=tuple(damage))
        if found is None:
            return submission
        found.check_fits(own(found.quantum))
        with must_fit(found.folder):
            state, decoder, course = unpack_run(read_contents(found.folder, RUN_FILE))
        return replace(submission, state=state, decoder=decoder, course=course)

    def fingerprint(self, what: Submission) -> Callable[[int], Mapping[str, object]]:
        """What the state before a quantum is of; a checkpoint is taken up by the same only."""
        reuse, kv = what.reuse or self.reuse, what.kv or self.kv
        whole = fingerprint(what.request, self.pipeline, self.identity, self.layout, reuse, kv)
        sampling = sampling_of(self.pipeline, what.request, what.encoded, reuse)
        table = timetable(sampling, what.request.chunks, what.encoded.given)
        last = open_quantum(what.encoded, table)

        def own(quantum: int) -> Mapping[str, object]:
            return of_past(whole, begun=table.begun(quantum), ends=quantum > last)

        return own

    def read_prompt(self, prompt: str) -> Tensor:
        """Encode a prompt for `Engine.change_prompt`; as `read`, on any thread."""
        return self.pipeline.captions(prompt).text
