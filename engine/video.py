"""One video in the making: its latents, and the work items that a stage needs to run one pass of one chunk.

The list of items in the order (tick, chunk, pass) is the meaning of the program: a chunk reads the KV that the chunk
before it wrote at the same tick. Items are plain data, so they can be printed, compared and sent.

Noise is drawn when a chunk enters, from the seed and the chunk's number alone, so it does not depend on the length of
the video, on other chunks or on the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from engine.reuse.flags import FlagLog, FlagState
from engine.reuse.memory import ComputedStep, ReuseMemory
from engine.reuse.policy import Decision, Observation, Policy, change_norms
from engine.schedule import Schedule, Tick
from models.protocols import Pass, PassCondition, Sampling, Solver

Noise = Callable[[int, tuple[int, ...], int], Tensor]
"""Standard normal noise of a chunk, given its number, the shape [1, C, T, h, w] and the number of the draw: 0 is where
the chunk starts, others are what its solver takes on the way. fp32 on the CPU."""


def seeded_noise(seed: int, span: int = 0) -> Noise:
    """Noise of a seed, for a span of a long video. The numbers are hashed into one, so that seed 0 chunk 1 and seed 1
    chunk 0 differ."""

    def noise(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
        mixed = seed * 0x9E3779B97F4A7C15 + (chunk + 1) * 0xC2B2AE3D27D4EB4F + draw * 0x165667B19E3779F9
        mixed += span * 0x27D4EB2F165667C5
        mixed &= 2**63 - 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))

    return noise


def given_noise(whole: Tensor) -> Noise:
    """Noise that is given for the whole video, [1, C, T, h, w]: for comparison with published figures."""

    def noise(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
        if draw:
            raise ValueError(f"no noise is given for draw {draw} of chunk {chunk}")
        part = whole[:, :, chunk * shape[2] : (chunk + 1) * shape[2]]
        if part.shape != shape:
            raise ValueError(f"the given noise has shape {tuple(part.shape)} at chunk {chunk}, {shape} is needed")
        return part.float().clone()

    return noise


@dataclass(frozen=True, kw_only=True, slots=True)
class KVOp:
    """A change of the KV buffers that happens before an item is run.

    `enter` gives a chunk a slot at the end of the window; `retire` moves the oldest chunk of the window to the clean
    region, which is then cut down to its size; `publish` copies a finished chunk's KV from branch 0 to the others.
    """

    kind: Literal["enter", "retire", "publish"]
    chunk: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """One pass of one chunk at one tick."""

    request: int  # number of the request
    tick: int  # of the schedule; -1 for a prefix chunk
    chunk: int  # absolute number of the chunk
    step: int | None  # the chunk's own step; None for a pass over a finished chunk
    chunks_left: int  # chunks of the video still to come after this one, which captions may depend on
    what: Pass
    keys_from: int | None  # first chunk that is attended to; None for everything that is held
    before: tuple[KVOp, ...]  # changes of the KV buffers to make first
    span: tuple[int, int] = (0, 0)  # tick and chunk of the whole video at which the span begins that counts these

    @property
    def place(self) -> tuple[int, int]:
        """Tick and chunk in the whole video, for people."""
        return self.span[0] + self.tick, self.span[1] + self.chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoState:
    """The state of a `VideoRun`. Tensors are not copied: a run replaces them and never writes into them."""

    latents: Mapping[int, Tensor]  # of the chunks of the window [1, C, T, h, w] fp32
    before: Mapping[int, Tensor]  # inputs of the tick before, which distances are taken from; the same shape
    ops: tuple[KVOp, ...]  # changes of the KV that no work item has carried yet
    leaving: frozenset[int]  # chunks that were either retired or finished, and still have to be the other
    policy: Mapping[str, float]
    memory: Mapping[int, Sequence[ComputedStep]]  # of reuse: the last computed steps of each chunk
    solvers: Mapping[int, Mapping[str, Tensor]]  # of each chunk of the window
    flags: FlagState  # of all steps that were decided
    unsent: tuple[int, ...]  # the last of them, which no work has carried yet


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoShape:
    """Size of a video in latents."""

    channels: int  # of a latent
    prefix_frames: int  # latent frames that are given
    height: int  # latent cells
    width: int  # latent cells


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A work item, the latent it is run on, and the reuse flags that every rank must have seen by then."""

    item: WorkItem
    x: Tensor
    flags: tuple[int, ...] = ()  # decided since the work before, in the order (tick, chunk): the values of `Decision`
    digest: bytes = bytes(8)  # of all flags so far


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """How one request reuses steps."""

    policy: Policy  # who decides
    memory: ReuseMemory  # what stands in for a step
    patches: Callable[[Tensor], Tensor]  # patch embedding of a latent, which distances are taken between
    observe: bool  # take distances even if the policy does not look at them, for a record
    dtype: torch.dtype = torch.float32  # of the distances' arithmetic
    changes: Sequence[float] | None = None  # distances by step, in place of those between patch embeddings
    read_out: Callable[[Tensor, PassCondition], Tensor] | None = None
    """Velocity of a pass's last hidden states, which then come back in its place: what the layers added is reused."""


class VideoRun:
    """One video in the making."""

    def __init__(
        self,
        request: int,  # number of the request, carried by its work items
        schedule: Schedule,  # when its chunks take their steps
        shape: VideoShape,  # size of the video
        sampling: Sampling,  # how the family denoises
        noise: Noise,  # where the chunks start
        reuse: Reuse,  # which steps are not computed
        *,
        prefix: Tensor | None,  # latents [1, C, P, h, w] to go on from, in the dtype that the prefix pass reads
        beside: Tensor | None = None,  # [1, c, T, h, w], what the model is given behind the latents' channels
        compressed: bool,  # the past is compressed, so a chunk attends to all of it and not to a range of chunks
        retires_at_once: bool = False,  # a chunk is part of that past after its last step, not from the next tick on
        span: tuple[int, int] = (0, 0),  # as of `WorkItem`
        device: torch.device,  # where latents are kept
    ) -> None:
        self.schedule, self._shape, self._sampling, self._noise = schedule, shape, sampling, noise
        self._reuse, self._prefix, self._beside, self._compressed = reuse, prefix, beside, compressed
        self._request, self._span, self._device = request, span, device
        self._at_once = retires_at_once and not sampling.clean_pass
        self._latents: dict[int, Tensor] = {}
        self._solvers: dict[int, Solver] = {}
        self._before: dict[int, Tensor] = {}  # as in `VideoState`
        self._ops: list[KVOp] = []
        self._leaving: set[int] = set()  # as in `VideoState`
        self._flags, self._unsent = FlagLog(self.schedule), list[int]()
        self._weighed: dict[int, list[Pass]] = {}  # of steps that are open, by chunk

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent (T, h, w) of a chunk."""
        return self._sampling.chunk_width, self._shape.height, self._shape.width

    @property
    def renews(self) -> bool:
        """The KV of a finished chunk is renewed from its final latents."""
        return self._sampling.clean_pass

    @property
    def whole_window(self) -> bool:
        """`decide` must be given all chunks of a tick at once."""
        return self._reuse.policy.scope == "window"

    def prefix_work(self) -> list[Work]:
        """Passes that fill the KV of the chunks that are given whole (7.6)."""
        work, width, limit = [], self._sampling.chunk_width, self._sampling.clean_limit(prefix=True)
        for chunk in range(self.schedule.first):
            assert self._prefix is not None
            x = self._prefix[:, :, chunk * width : (chunk + 1) * width].to(self._device)
            x = self._new_solver(chunk).model_input(x, None)
            self._ops.append(KVOp(kind="enter", chunk=chunk))
            for what in self._sampling.clean_passes(0, prefix=True, text_needed=False):
                work.append(self._work(-1, chunk, None, what, limit, x))
            self._publish(chunk)
            self._ops.append(KVOp(kind="retire", chunk=chunk))
        return work

    def begin(self, tick: Tick) -> list[Work]:
        """Start a tick: let the next chunk in, and renew the KV of the one that has just finished.

        That is by the clean passes that are returned, which must be run before the tick's other work. The tick before
        must be sealed. If `renews`, the retiring chunk's last step must be closed.
        """
        work, sampling = list[Work](), self._sampling
        for chunk in tick.retiring:
            limit, text_needed = sampling.clean_limit(prefix=False), self._text_needed(tick)
            passes = sampling.clean_passes(tick.step_in_quantum, prefix=False, text_needed=text_needed)
            x = self._model_input(chunk, None)
            work += [self._work(tick.index, chunk, None, what, limit, x) for what in passes]
            if self._compressed and sampling.clean_pass:
                self._publish(chunk)  # after the compression it could not be told apart
            if not self._at_once:
                self._ops.append(KVOp(kind="retire", chunk=chunk))
            self._leave(chunk)
        for chunk in tick.entering:
            self._ops.append(KVOp(kind="enter", chunk=chunk))
            x = self._noise(chunk, (1, self._shape.channels, *self.grid), 0).to(self._device)
            if (given := self._given(chunk)) is not None:
                x[:, :, : given.shape[2]] = given.to(x)
            self._latents[chunk], self._solvers[chunk] = x, self._new_solver(chunk)
        return work

    def decide(self, tick: Tick, chunks: Sequence[int] | None = None) -> Iterator[tuple[Observation, Decision]]:
        """Decide which chunks are computed, and take the steps of those that are not: no work comes of them.

        The distances of all the chunks are read back from the device at once. `chunks` are those whose latents are
        known; a policy that looks at the whole window must be given all, which is the default. Yields what was seen and
        decided, in the order of the chunks. A chunk that is to be computed must be opened before the next one is asked
        for: its work carries the flags up to it.
        """
        active = [(chunk, step) for chunk, step in tick.active if chunks is None or chunk in chunks]
        looks = self._reuse.policy.observes or self._reuse.observe
        norms = self._observe(active) if looks else {}
        seen, rounded = [], self._reuse.dtype == torch.bfloat16
        see = partial(Observation, tick=tick.index, rounded=rounded)
        for chunk, step in active:
            change, scale = norms.get(chunk, (None, None))
            final = self._sampling.computes(step, last_tick=tick.index == self.schedule.ticks - 1)
            seen.append(see(chunk=chunk, step=step, change=change, scale=scale, final=final))
        for one, decision in zip(seen, self._reuse.policy.decide(seen), strict=True):
            self._flags.add([decision.value])
            self._unsent.append(decision.value)
            if not decision.computes:
                velocity, size_of = self._stand_in(tick, one.chunk, one.step, decision)
                self._step(one.chunk, velocity, size_of)
                self._opened(one.chunk, one.step)
            yield one, decision

    def open(self, tick: Tick, chunk: int, step: int, decision: Decision = Decision.COMPUTE) -> list[Work]:
        """The passes of one chunk's step that are computed, if some are."""
        x, limit = self._model_input(chunk, step), self._sampling.key_limit(step, chunk - self.schedule.first)
        passes = self._step_passes(tick, chunk, step)
        self._weighed[chunk] = [what for what in passes if what.weight]
        run = [what for what in passes if not decision.leaves_out(what.caption)]
        work = [self._work(tick.index, chunk, step, what, limit, x) for what in run]
        self._opened(chunk, step)
        return work

    def close(self, chunk: int, step: int, passes: Sequence[Pass], results: Sequence[Tensor]) -> None:
        """Take a step with the weighted sum of its passes' velocities (7.4, step 6; 7.5).

        Results are velocities, or the last hidden states if `Reuse.read_out` makes velocities of them. Passes without a
        weight, which are run for their KV alone, may be left out; for one that was reused, what its layers added before
        stands in.
        """
        weighed, added = self._weighed.pop(chunk), tuple[Tensor, ...]()
        if self._reuse.read_out is not None:
            hidden = {what.name: part for what, part in zip(passes, results, strict=True)}
            results, added = self._read_out(chunk, step, weighed, hidden)
            passes = weighed
        velocity = self._weighted(chunk, passes, results)
        parts = added or (velocity,)
        self._reuse.memory.computed(chunk, ComputedStep(step, self._sampling.time(step), parts))
        self._step(chunk, velocity, step)

    def seal(self, tick: Tick) -> None:
        """All work of a tick was opened; what comes after it reads what it leaves behind."""
        if self._sampling.clean_pass and not self._compressed:
            for chunk in tick.retiring:
                self._publish(chunk)

    def finish(self, chunk: int) -> Tensor:
        """Take the latents of a chunk whose last step is closed, without given frames; an image's own stays."""
        given = None if self._shape.prefix_frames == 1 else self._given(chunk)
        start, end = 0 if given is None else given.shape[2], self._sampling.chunk_width - self._sampling.ends
        latents = self._latents[chunk][:, :, start:end]
        self._leave(chunk)
        return latents

    def state(self) -> VideoState:
        """What the next ticks depend on; between ticks only, when every step that was opened is closed."""
        return VideoState(
            latents=dict(self._latents),
            before=dict(self._before),
            ops=tuple(self._ops),
            leaving=frozenset(self._leaving),
            policy=self._reuse.policy.state(),
            memory=self._reuse.memory.state(),
            solvers={chunk: solver.state() for chunk, solver in self._solvers.items()},
            flags=self._flags.state(),
            unsent=tuple(self._unsent),
        )

    def restore(self, state: VideoState) -> None:
        """Go on from the state of a run of the same request; in place of `prefix_work` and the ticks before.

        A ValueError if its latents are not those of the request.
        """
        device, shape = self._device, (1, self._shape.channels, *self.grid)
        for part in (*state.latents.values(), *state.before.values()):
            if part.shape != shape or part.dtype != torch.float32:
                raise ValueError(f"it has latents of {part.dtype} {tuple(part.shape)} and not of fp32 {shape}")
        self._latents = {chunk: part.to(device) for chunk, part in state.latents.items()}
        self._before = {chunk: part.to(device) for chunk, part in state.before.items()}
        self._solvers = {chunk: self._new_solver(chunk) for chunk in state.latents}
        for chunk, solver in self._solvers.items():
            solver.restore({name: part.to(device) for name, part in state.solvers[chunk].items()})
        self._ops, self._leaving = list(state.ops), set(state.leaving)
        self._flags.restore(state.flags)
        self._unsent = list(state.unsent)
        self._reuse.policy.restore(state.policy)
        self._reuse.memory.restore(state.memory, device)

    def _observe(self, active: Sequence[tuple[int, int]]) -> dict[int, tuple[float, float]]:
        """L1 norms (of the change, of what was before) by chunk, of (chunk, step): of their patch embeddings, with one
        copy from the device, or as they are known beforehand."""
        if (changes := self._reuse.changes) is not None:
            return {chunk: (changes[step], 1.0) for chunk, step in active if step}
        norms, known = list[Tensor](), []
        for chunk, step in active:
            x = self._model_input(chunk, step)
            if (before := self._before.get(chunk)) is not None:
                norms += change_norms(self._reuse.patches(before), self._reuse.patches(x), self._reuse.dtype)
                known.append(chunk)
            self._before[chunk] = x
        values = torch.stack(norms).tolist() if norms else []
        return {chunk: (values[2 * i], values[2 * i + 1]) for i, chunk in enumerate(known)}

    def _leave(self, chunk: int) -> None:
        """A chunk was retired or finished; once it is both, nothing of it is needed any more."""
        if chunk not in self._leaving:
            self._leaving.add(chunk)
            return
        self._leaving.remove(chunk)
        del self._latents[chunk], self._solvers[chunk]
        self._before.pop(chunk, None)
        self._reuse.policy.forget(chunk)
        self._reuse.memory.forget(chunk)

    def _publish(self, chunk: int) -> None:
        """Later ticks of the other branches read what the null branch wrote (6.5)."""
        if self._sampling.publishes and self._sampling.branches > 1:
            self._ops.append(KVOp(kind="publish", chunk=chunk))

    def _text_needed(self, tick: Tick) -> bool:
        return any(self._sampling.weighs_text(step) for _, step in tick.active)

    def _step_passes(self, tick: Tick, chunk: int, step: int) -> tuple[Pass, ...]:
        oldest = chunk == tick.active[0][0]
        return self._sampling.step_passes(step, oldest=oldest, text_needed=self._text_needed(tick))

    def _stand_in(self, tick: Tick, chunk: int, step: int, decision: Decision) -> tuple[Tensor, int]:
        """The velocity that stands in for a step, and the step whose size it is taken over."""
        if self._reuse.read_out is None:
            extrapolate, time = decision is Decision.EXTRAPOLATE, self._sampling.time(step)
            return self._reuse.memory.velocity(chunk, extrapolate=extrapolate, step=step, time=time)
        passes = [what for what in self._step_passes(tick, chunk, step) if what.weight]
        velocities, _ = self._read_out(chunk, step, passes, {})
        return self._weighted(chunk, passes, velocities), step

    def _read_out(
        self, chunk: int, step: int, passes: Sequence[Pass], hidden: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Velocities of a step's passes, and what their layers added: of the hidden states that came back, by the name
        of the pass, else of what was added before."""
        reuse, velocities, added = self._reuse, list[Tensor](), list[Tensor]()
        assert reuse.read_out is not None
        embedded = reuse.patches(self._model_input(chunk, step))
        before = reuse.memory.last(chunk).parts if len(hidden) < len(passes) else ()
        for place, what in enumerate(passes):
            last = hidden.get(what.name)
            added.append(before[place] if last is None else last - embedded)
            velocities.append(reuse.read_out(embedded + before[place] if last is None else last, what.condition))
        return velocities, tuple(added)

    def _weighted(self, chunk: int, passes: Sequence[Pass], velocities: Sequence[Tensor]) -> Tensor:
        velocity = torch.zeros_like(self._latents[chunk])
        for what, part in zip(passes, velocities, strict=True):
            if what.weight:
                velocity = velocity + part * what.weight
        return velocity

    def _step(self, chunk: int, velocity: Tensor, step: int) -> None:
        self._latents[chunk] = self._solvers[chunk].step(self._latents[chunk], velocity, step)

    def _opened(self, chunk: int, step: int) -> None:
        """A chunk's step has been given out, or taken without."""
        if self._at_once and step == self._sampling.num_steps - 1:
            self._ops.append(KVOp(kind="retire", chunk=chunk))

    def _new_solver(self, chunk: int) -> Solver:
        def draw(number: int, frames: int) -> Tensor:
            size = (1, self._shape.channels, frames, self._shape.height, self._shape.width)
            return self._noise(chunk, size, number).to(self._device)

        return self._sampling.solver(self._given(chunk), draw)

    def _given(self, chunk: int) -> Tensor | None:
        """A chunk's first latent frames that are given, if any."""
        width = self._sampling.chunk_width
        start, stop = chunk * width, min((chunk + 1) * width, self._shape.prefix_frames)
        if stop <= start:
            return None
        assert self._prefix is not None
        return self._prefix[:, :, start:stop].to(self._device)

    def _model_input(self, chunk: int, step: int | None) -> Tensor:
        """What the model is given of a chunk's latents, with the frames that are given (7.4, step 4)."""
        x = self._solvers[chunk].model_input(self._latents[chunk], step)
        if self._beside is None:
            return x
        width = self._sampling.chunk_width
        return torch.cat([x, self._beside[:, :, chunk * width : (chunk + 1) * width].to(x)], dim=1)

    def _work(self, tick: int, chunk: int, step: int | None, what: Pass, limit: int | None, x: Tensor) -> Work:
        before, self._ops = tuple(self._ops), []
        if (self._compressed or self._sampling.sink) and limit != 1:
            limit = None
        item = WorkItem(
            request=self._request,
            tick=tick,
            chunk=chunk,
            step=step,
            chunks_left=self.schedule.chunks - 1 - chunk,
            what=what,
            keys_from=None if limit is None else max(0, chunk + 1 - limit),
            before=before,
            span=self._span,
        )
        flags, self._unsent = tuple(self._unsent), []
        return Work(item=item, x=x, flags=flags, digest=self._flags.digest)
