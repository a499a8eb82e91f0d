"""Runs work items on the layers that are held here: all of a model, or one stage of it.

A `Stage` holds KV, captions and the log of flags of the videos in flight; it does not know why an item is run or what
comes next. A `Runner` is what the engine has items run by: `LocalRunner` where one process has the whole model, the
leader of a gang where ranks share it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.checkpoint.contents import RUN_FILE, Contents, pack_shard, rank_file, unpack_shard
from engine.checkpoint.files import Shard, must_fit, read_contents, write_async
from engine.kv.buffer import KVBuffer
from engine.request import Admission
from engine.reuse.flags import FlagLog
from engine.video import Work, WorkItem
from models.attention import Attention
from models.errors import InputError
from models.protocols import CaptionKind, CaptionTable, KVGeometry, KVView, Modulation, Positions, TextKV, VideoModel

_MODULATIONS = 64  # that are kept, of a video's times


class TokenShard(Protocol):
    """Which of a chunk's tokens are computed here, where several processes hold the same layers."""

    @property
    def tokens(self) -> slice:
        """The tokens."""

    def view(self, inner: KVView) -> KVView:
        """What these tokens attend to, if `inner` holds the heads that are attended with here."""


class KVWatcher(Protocol):
    """Is called with what compressions see and keep, for comparison."""

    def admitted(self) -> None:
        """A video, or the next span of a long one, is taken in."""

    def kept(self, item: WorkItem, branch: int, layer: int, queries: Tensor, keys: Tensor, positions: Tensor) -> None:
        """Before or within an item `positions` [keep, G] of `keys` [n, G, d] are kept for `queries` [m, H, d]."""


class PassInputs:
    """What a model is given of one video's items besides hidden states, for the `tokens` of each chunk that are
    computed here. Each part is made once, and kept while items need it.

    Modulations are those of a step's time, the same for all chunks. Texts and positions are of the chunks of the
    window: chunks that see the same text share it.
    """

    def __init__(self, model: VideoModel, admission: Admission, tokens: slice) -> None:
        grid, self._model = admission.grid, model
        self._in_use = admission.kv.window + 1  # a finished chunk may have its clean pass beside

        @lru_cache(self._in_use)
        def positions(chunk: int) -> Positions:
            return model.positions(chunk * grid[0], grid, tokens)

        self._positions, self._modulation = positions, lru_cache(_MODULATIONS)(model.modulation)
        self._read(admission.captions)

    def _read(self, captions: CaptionTable) -> None:
        captions, model = captions.to(self._model.kv.device), self._model

        @lru_cache(self._in_use + 1)  # and there is the text of "no text"
        def text(kind: CaptionKind, chunk: int, chunks_left: int) -> TextKV:
            return model.text(captions.get(kind, chunk, chunks_left))

        self._captions, self._text = captions, text

    def change_text(self, chunk: int | None, text: Tensor) -> None:
        """As `CaptionTable.with_text`."""
        self._read(self._captions.with_text(chunk, text))

    def of(self, item: WorkItem) -> tuple[Modulation, TextKV, Positions]:
        """Modulation, text and positions of an item."""
        what = item.what
        seen = self._captions.first_like(what.caption, item.chunk, item.chunks_left)
        return self._modulation(what.condition), self._text(*seen), self._positions(item.chunk)


@dataclass(frozen=True, slots=True)
class _Held:
    kv: KVBuffer
    flags: FlagLog
    inputs: PassInputs
    shard: TokenShard | None
    grid: tuple[int, int, int]
    hidden: bool  # hidden states are results


class NotFinite(RuntimeError):
    """A video has come to NaN or infinity and cannot be made; the line names rank, tick and chunk. Others can go on."""

    def __init__(self, video: int, *, rank: int, place: tuple[int, int]) -> None:
        tick, chunk = place
        super().__init__(
            f"rank {rank} has computed NaN or infinity at tick {tick}, chunk {chunk}: "
            "check the weights, and the device of that rank"
        )
        self.video = video


class FiniteCheck:
    """Finds the first item of each video whose result is not finite, and never waits for the device.

    On a GPU, for which `new_event` makes an event, each answer is copied to the host behind its item and read once the
    device has passed it; so it is known some items late.
    """

    def __init__(self, new_event: Callable[[], torch.cuda.Event] | None) -> None:
        self._new_event = new_event
        self._open: deque[tuple[WorkItem, Tensor, torch.cuda.Event]] = deque()
        self._found: dict[int, WorkItem] = {}

    def look(self, item: WorkItem, result: Tensor) -> None:
        """Take the result of an item, of any shape."""
        # Finite if all of them are. A CPU is slow to widen bf16, which has the range of fp32 in any case.
        total = result.sum(dtype=torch.float32 if result.dtype == torch.float16 else None)
        if self._new_event is None:
            self._note(item, total)
            return
        host = torch.empty((), dtype=total.dtype, pin_memory=total.is_cuda).copy_(total, non_blocking=True)
        event = self._new_event()
        event.record()
        self._open.append((item, host, event))

    def found(self, video: int) -> WorkItem | None:
        """The first such item of a video, as far as is known."""
        while self._open and self._open[0][2].query():
            item, total, _ = self._open.popleft()
            self._note(item, total)
        return self._found.get(video)

    def forget(self, video: int) -> None:
        """The video is not held any more."""
        self._found.pop(video, None)
        self._open = deque(one for one in self._open if one[0].request != video)

    def _note(self, item: WorkItem, total: Tensor) -> None:
        if not math.isfinite(total):
            self._found.setdefault(item.request, item)


class Stage:
    """The layers that are held here and what is held for the videos in flight."""

    def __init__(
        self,
        model: VideoModel,  # the layers
        attention: Attention,  # what KV views attend with
        *,
        rank: int = 0,  # number of this process, for the name of its file in a checkpoint
        place: Mapping[str, int] | None = None,  # tells this process's shard of a checkpoint from those of others
        watcher: KVWatcher | None = None,  # called with what compressions keep
    ) -> None:
        self.model, self._attention, self._file, self._watcher = model, attention, rank_file(rank), watcher
        self._item: WorkItem | None = None  # that is run
        self._place = {"layers": [model.kv.layers.start, model.kv.layers.stop], **(place or {})}
        self._videos: dict[int, _Held] = {}
        self.finite = FiniteCheck(torch.cuda.Event if model.kv.device.type == "cuda" else None)

    def admit(
        self, admission: Admission, *, geometry: KVGeometry | None = None, shard: TokenShard | None = None
    ) -> None:
        """Take a video in: allocate for it, and read its shard of a checkpoint.

        An InputError if that does not fit, a Damaged if it has come to harm since the checkpoint was found.
        `geometry` is of the KV that is held here, if not the model's; `shard` the tokens computed here, if not all.
        """
        if self._watcher is not None:
            self._watcher.admitted()
        on_kept = None if self._watcher is None else self._kept
        kv = KVBuffer(admission.kv, geometry or self.model.kv, self._attention, on_kept)
        flags = FlagLog(admission.schedule)
        if admission.checkpoint is not None:
            self._restore(Path(admission.checkpoint), kv, flags)
        inputs = PassInputs(self.model, admission, slice(None) if shard is None else shard.tokens)
        self._videos[admission.video] = _Held(kv, flags, inputs, shard, admission.grid, admission.hidden)

    def change_text(self, video: int, chunk: int | None, text: Tensor) -> None:
        """Have the chunks of a video from one on, or all, see another text [N, channels]; none of them has begun."""
        self._videos[video].inputs.change_text(chunk, text)

    def release(self, video: int) -> None:
        """Let go of a video's buffers."""
        self._videos.pop(video, None)
        self.finite.forget(video)

    def kv(self, video: int) -> KVBuffer:
        """The KV buffers of a video."""
        return self._videos[video].kv

    def flags(self, video: int) -> FlagLog:
        """The reuse flags of a video so far."""
        return self._videos[video].flags

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """Patch embeddings [1, S, D] of a latent; where the first layer is held."""
        return self.model.patches(x)

    @torch.no_grad()
    def change(self, item: WorkItem) -> None:
        """Make the changes to the KV that come before an item."""
        self._item = item
        for op in item.before:
            self._videos[item.request].kv.apply(op)

    @torch.no_grad()
    def forward(self, item: WorkItem, hidden: Tensor) -> Tensor:
        """Run the layers over hidden states [1, S, D] of an item's tokens, after `change`."""
        held, what = self._videos[item.request], item.what
        asks = item.step is not None  # the next compression asks with the queries of what was denoised last
        view = held.kv.view(None if what.isolated else what.branch, item.chunk, item.keys_from, asks=asks)
        if held.shard is not None:
            view = held.shard.view(view)
        hidden = self.model.layers(hidden, *held.inputs.of(item), view)
        self.finite.look(item, hidden)
        return hidden

    @torch.no_grad()
    def velocity(self, item: WorkItem, hidden: Tensor) -> Tensor:
        """Velocity [1, C, T, h, w] fp32 of an item's last hidden states; where the last layer is held. Hidden states
        themselves for a video that is made of them."""
        held = self._videos[item.request]
        if held.hidden:
            return hidden
        velocity = self.model.velocity(hidden, held.grid, item.what.condition).contiguous()
        self.finite.look(item, velocity)
        return velocity

    def snapshot(self, video: int) -> dict[str, Contents]:
        """This process's file of a checkpoint: copies, which later items do not touch."""
        held = self._videos[video]
        return {self._file: pack_shard(held.kv.state(), held.flags.state(), self._place)}

    def _kept(self, *seen: Any) -> None:
        assert self._watcher is not None and self._item is not None
        self._watcher.kept(self._item, *seen)

    def _restore(self, folder: Path, kv: KVBuffer, flags: FlagLog) -> None:
        path, contents = folder / self._file, read_contents(folder, self._file)
        then = contents.values.get("about")
        if then != self._place:
            raise InputError(
                f"the checkpoint {path} is of another split: {then}, now {self._place}; delete it to start anew"
            )
        with must_fit(path):
            state, log = unpack_shard(contents)
            kv.restore(state)
            flags.restore(log)


class Runner(Protocol):
    """Runs the items of videos, in the order in which they are begun."""

    layout: Mapping[str, int]
    """Ranks: `pp` stages of `cp` each. A checkpoint is taken up by the same layout only."""

    @property
    def pending(self) -> int:
        """Velocities that are still to come."""

    def admit(self, admission: Admission) -> None:
        """Take a video in; an InputError if it cannot be held, or its checkpoint does not fit."""

    def change_text(self, video: int, chunk: int | None, text: Tensor) -> None:
        """As `Stage.change_text`, for what is begun after it."""

    def begin(self, work: Work) -> None:
        """Begin an item. Its velocity comes from `results`, if the item has a weight."""

    def results(self, *, wait: bool) -> Iterable[tuple[WorkItem, Tensor]]:
        """Velocities that have come back; with `wait`, at least one message is waited for."""

    def not_finite(self, video: int) -> NotFinite | None:
        """What says that a video cannot be made, if that is known by now; it is not waited for."""

    def kv(self, video: int) -> KVBuffer:
        """The KV buffers of a video, those of the first stage."""

    def save(self, video: int, folder: Path, run: Contents, on_done: Callable[[], None]) -> None:
        """Begin to write a checkpoint: every rank its shard, this one the run as well. `on_done` may come from any
        thread."""

    def saved(self, video: int) -> tuple[Shard, ...] | None:
        """The files of the checkpoint that was begun last, once all ranks have written; None before.

        An InputError says which cannot be written.
        """

    def release(self, video: int) -> None:
        """Let go of a video; results that are still to come are dropped."""

    def check(self) -> None:
        """Raise if something has failed elsewhere."""
        return None

    def waiting(self) -> AbstractContextManager[None]:
        """Around a wait for results, permits or disks."""
        return nullcontext()

    def close(self) -> None:
        """Let all ranks go, after what is under way."""
        return None


class LocalRunner(Runner):
    """Runs items on a whole model in this process, at once."""

    layout = {"pp": 1, "cp": 1}

    def __init__(self, model: VideoModel, attention: Attention, *, watcher: KVWatcher | None = None) -> None:
        self._stage = Stage(model, attention, watcher=watcher)
        self._results: list[tuple[WorkItem, Tensor]] = []
        self._written: dict[int, tuple[Shard, ...] | Exception] = {}

    @property
    def pending(self) -> int:
        return len(self._results)

    def admit(self, admission: Admission) -> None:
        self._stage.admit(admission)

    def change_text(self, video: int, chunk: int | None, text: Tensor) -> None:
        self._stage.change_text(video, chunk, text)

    def begin(self, work: Work) -> None:
        item, stage = work.item, self._stage
        stage.flags(item.request).add(work.flags)
        stage.change(item)
        hidden = stage.forward(item, stage.embed(work.x))
        if item.what.weight:
            self._results.append((item, stage.velocity(item, hidden)))

    def results(self, *, wait: bool) -> Iterable[tuple[WorkItem, Tensor]]:
        taken, self._results = self._results, []
        return taken

    def not_finite(self, video: int) -> NotFinite | None:
        item = self._stage.finite.found(video)
        return None if item is None else NotFinite(video, rank=0, place=item.place)

    def kv(self, video: int) -> KVBuffer:
        return self._stage.kv(video)

    def save(self, video: int, folder: Path, run: Contents, on_done: Callable[[], None]) -> None:

        def ended(written: tuple[Shard, ...] | Exception) -> None:
            self._written[video] = written
            on_done()

        write_async(folder, {**self._stage.snapshot(video), RUN_FILE: run}, ended)

    def saved(self, video: int) -> tuple[Shard, ...] | None:
        written = self._written.pop(video, None)
        if isinstance(written, Exception):
            raise written
        return written

    def release(self, video: int) -> None:
        self._stage.release(video)
        self._results = [result for result in self._results if result[0].request != video]
