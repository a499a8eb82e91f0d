"""The state of one video while it is made: latents of the window, and which work comes next.

A run is asked, in the order (tick, chunk), to `open` a chunk's step, which gives work items with their inputs, and to
`close` it with the velocities. It holds latents of the window only, and does not know where the work is done.

Shapes: latents are [1, C, T, h, w] fp32 with T the latent frames of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, device

from engine.noise import NoiseSource
from engine.schedule import Schedule, Tick
from engine.work import KVOp, WorkItem
from models.family import Pass, Sampling

__all__ = ["VideoRun", "VideoShape", "Work", "clean_capacity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoShape:
    """Size of a video in latents.

    Attributes:
        channels: of a latent.
        chunks: all chunks, those that the prefix fills counted.
        prefix_frames: latent frames that are given.
        height: latent cells.
        width: latent cells.
    """

    channels: int
    chunks: int
    prefix_frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A work item and the latent it is run on."""

    item: WorkItem
    x: Tensor


def clean_capacity(schedule: Schedule, sampling: Sampling) -> int:
    """Finished chunks that some chunk still attends to, at most; all of them where a limit is None.

    In a full window the chunk in step s stands window - 1 - s // stage_steps places behind the oldest. A prefix is
    seen further back, while its first successors are young.
    """
    limits = [sampling.key_limit(step) for step in range(schedule.num_steps)]
    clean = sampling.clean_limit(prefix=False)
    if any(limit is None for limit in limits) or clean is None:
        return schedule.chunks - 1
    bounded = [limit for limit in limits if limit is not None]
    within = [limit - schedule.window + step // schedule.stage_steps for step, limit in enumerate(bounded)]
    prefix = sampling.clean_limit(prefix=True) or schedule.first
    behind_prefix = min(schedule.first, max(max(bounded), prefix) - 1)
    return min(schedule.chunks - 1, max(0, clean - 1, behind_prefix, *within))


class VideoRun:
    """One video in the making.

    Args:
        request: number of the request, carried by its work items.
        shape: size of the video.
        sampling: how the family denoises.
        noise: where the chunks start.
        prefix: latents [1, C, P, h, w] to go on from, in the dtype that the prefix pass reads.
        device: where latents are kept.
    """

    def __init__(
        self,
        request: int,
        shape: VideoShape,
        sampling: Sampling,
        noise: NoiseSource,
        *,
        prefix: Tensor | None,
        device: device,
    ) -> None:
        self._request, self._shape, self._sampling, self._noise = request, shape, sampling, noise
        self._prefix, self._device = prefix, device
        width = sampling.chunk_width
        self.schedule = Schedule(
            first=shape.prefix_frames // width,
            chunks=shape.chunks,
            num_steps=sampling.num_steps,
            window=sampling.window,
        )
        self._latents: dict[int, Tensor] = {}
        self._ops: list[KVOp] = []

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent (T, h, w) of a chunk."""
        return self._sampling.chunk_width, self._shape.height, self._shape.width

    def prefix_work(self) -> list[Work]:
        """Passes that fill the KV of the chunks that are given whole (7.6)."""
        work = []
        for chunk in range(self.schedule.first):
            assert self._prefix is not None
            width = self._sampling.chunk_width
            x = self._prefix[:, :, chunk * width : (chunk + 1) * width].to(self._device)
            self._ops.append(KVOp(kind="enter", chunk=chunk))
            limit = self._sampling.clean_limit(prefix=True)
            for what in self._sampling.clean_passes(0, prefix=True, text_needed=False):
                work.append(self._work(-1, chunk, None, what, limit, x))
            self._after_clean(chunk)
            self._ops.append(KVOp(kind="retire", chunk=chunk))
        return work

    def begin(self, tick: Tick) -> list[Work]:
        """Start a tick: renew the KV of the chunk that has just finished, and let the next one in.

        Returns:
            The clean passes, if the sampling has them; they must be run before the tick's other work.
        """
        work = []
        chunk = tick.retiring
        if chunk is not None:
            limit = self._sampling.clean_limit(prefix=False)
            text_needed = self._text_needed(tick)
            passes = self._sampling.clean_passes(tick.step_in_stage, prefix=False, text_needed=text_needed)
            x = self._model_input(chunk)
            work = [self._work(tick.index, chunk, None, what, limit, x) for what in passes]
            self._ops.append(KVOp(kind="retire", chunk=chunk))
            del self._latents[chunk]
        if tick.entering is not None:
            self._ops.append(KVOp(kind="enter", chunk=tick.entering))
            shape = (1, self._shape.channels, *self.grid)
            self._latents[tick.entering] = self._noise.chunk(tick.entering, shape).to(self._device)
        return work

    def open(self, tick: Tick, chunk: int, step: int) -> list[Work]:
        """The passes of one chunk's step."""
        oldest = chunk == tick.active[0][0]
        passes = self._sampling.step_passes(step, oldest=oldest, text_needed=self._text_needed(tick))
        x = self._model_input(chunk)
        limit = self._sampling.key_limit(step)
        return [self._work(tick.index, chunk, step, what, limit, x) for what in passes]

    def close(self, chunk: int, step: int, passes: list[Pass], velocities: list[Tensor]) -> None:
        """Take a step with the weighted sum of its passes' velocities (7.4, step 6; 7.5)."""
        total = None
        for what, velocity in zip(passes, velocities, strict=True):
            if what.weight:
                part = velocity if what.weight == 1 else what.weight * velocity
                total = part if total is None else total + part
        if total is not None:
            self._latents[chunk] = self._model_input(chunk) + total * self._sampling.step_size(step)

    def end(self, tick: Tick) -> Tensor | None:
        """End a tick.

        Returns:
            The latents of the chunk that finished, without the frames that were given (an image's first frame stays).
        """
        if tick.retiring is not None and self._sampling.clean_forward:
            self._after_clean(tick.retiring)
        if tick.finishing is None:
            return None
        given = self._given_frames(tick.finishing)
        start = 0 if self._shape.prefix_frames == 1 else given
        return self._latents[tick.finishing][:, :, start:]

    def _after_clean(self, chunk: int) -> None:
        """Later ticks of the other branches read what the null branch wrote (6.5)."""
        if self._sampling.branches > 1:
            self._ops.append(KVOp(kind="publish", chunk=chunk))

    def _text_needed(self, tick: Tick) -> bool:
        return any(self._sampling.weighs_text(step) for _, step in tick.active)

    def _given_frames(self, chunk: int) -> int:
        """How many of a chunk's first latent frames are given."""
        width = self._sampling.chunk_width
        return min(width, max(0, self._shape.prefix_frames - chunk * width))

    def _model_input(self, chunk: int) -> Tensor:
        """The chunk's latents with the given frames written over them (7.4, step 4)."""
        x, given = self._latents[chunk], self._given_frames(chunk)
        if not given:
            return x
        assert self._prefix is not None
        start = chunk * self._sampling.chunk_width
        x = x.clone()
        x[:, :, :given] = self._prefix[:, :, start : start + given].to(x)
        return x

    def _work(self, tick: int, chunk: int, step: int | None, what: Pass, limit: int | None, x: Tensor) -> Work:
        before, self._ops = tuple(self._ops), []
        item = WorkItem(
            request=self._request,
            tick=tick,
            chunk=chunk,
            step=step,
            chunks_left=self._shape.chunks - 1 - chunk,
            what=what,
            keys_from=None if limit is None else max(0, chunk + 1 - limit),
            before=before,
        )
        return Work(item=item, x=x)
