"""How SkyReels-V2 samples by diffusion forcing: groups of latent frames at noise levels of their own.

Two ways, over the same times and steps. `BlockSampling`, which FlowCache runs: each group is a chunk that attends to
itself and to the groups before it, through the KV that they left behind. `WindowSampling`, which the model was trained
for: the whole window is one chunk, attends to all of itself, and its groups stand at times of their own.

Figures only. It knows no requests, no buffers and no order of work.

Shapes: latents [1, C, T, h, w], P frames that are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from models.errors import InputError
from models.protocols import CELL_FRAMES, Draw, Pass, PassCondition
from models.wan.sampling.unipc import Sigmas, UniPC

_NOISE, _CLEAN = 999, 0  # the model's times of frames that have not begun, and of finished ones
_TRAINED_STEPS = 1000


def whole_chunks(frames: int, width: int, *, most: int | None) -> tuple[int, int]:
    """As `Sampling.prefix`, of whole chunks of latent frames: the first latent frame is one frame, others are four."""
    chunks = (1 + (frames - 1) // CELL_FRAMES) // width
    if not chunks:
        needed = 1 + CELL_FRAMES * (width - 1)
        raise InputError(f"this model goes on from {needed} frames and more, and {frames} are given")
    latents = min(chunks, most or chunks) * width
    return 1 + CELL_FRAMES * (latents - 1), latents


@dataclass(frozen=True, kw_only=True)
class DiffusionForcing:
    """What both ways share; each is a `Sampling`."""

    steps: int  # denoising steps of a group
    shift: float = 8.0  # of the noise levels
    guidance: float = 6.0  # scale of classifier-free guidance; 1 and less runs no negative prompt
    fps: int | None = 24  # for a model that takes them as a condition
    block: int = 1  # latent frames of a group (`causal_block_size`)
    ar_step: int = 0  # rows between two groups that begin; 0 denoises all in step
    frames: int = 25  # latent frames of a window
    noise_condition: int = 0  # noise that is mixed into given frames, in thousandths (`addnoise_condition`)
    overlap_frames: int = 0  # latent frames that a longer video's next window goes on from, or a clip's at most
    aliased: bool = True  # as in `UniPC`
    changes: tuple[float, ...] | None = None  # of the times' embedding e0, by step
    dtype: torch.dtype = torch.float32  # of latents, as in `UniPC`

    residual_of_layers = True
    publishes = False
    sink = 0
    ends = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.block < 1 or self.ar_step < 0:
            raise InputError(f"{self.steps} steps of groups of {self.block} latent frames cannot be sampled")
        if self.frames % self.block:
            raise InputError(
                f"a window of {self.frames} latent frames is not whole groups of {self.block}: some would stay noise"
            )

    @cached_property
    def sigmas(self) -> Sigmas:
        """Noise levels of a group."""
        return Sigmas(self.steps, self.shift)

    @property
    def _apart(self) -> int:
        """Rows between two groups: a group follows at once where the one before has finished."""
        return min(self.ar_step, self.steps)

    @property
    def groups(self) -> int:
        """Groups of a window."""
        return self.frames // self.block

    def weighs_text(self, step: int) -> bool:
        """Both branches count in every step, or there is one alone."""
        return True

    def _new_solver(self) -> UniPC:
        return UniPC(self.sigmas, aliased=self.aliased, dtype=self.dtype)

    def _passes(self, times: tuple[float, ...], *, isolated: bool = False, weighed: bool = True) -> tuple[Pass, ...]:
        """The passes of guidance: v = v_negative + scale (v_positive - v_negative); each branch has KV of its own."""
        guided = self.guidance > 1
        condition = PassCondition(times=times, fps=self.fps)
        weights = (self.guidance, 1 - self.guidance) if guided else (1.0, 0.0)
        names = ("text", "null") if weighed else ("clean_text", "clean")
        positive = Pass(
            name=names[0],
            caption="text",
            branch=0,
            isolated=isolated,
            weight=weights[0] if weighed else 0.0,
            condition=condition,
        )
        negative = replace(positive, name=names[1], caption="null", branch=1, weight=weights[1] if weighed else 0.0)
        return (positive, negative) if guided else (positive,)


# ---- groups as chunks


@dataclass(frozen=True, kw_only=True)
class BlockSampling(DiffusionForcing):
    """Each group is a chunk, block-causal, as FlowCache runs it."""

    clean_pass: bool = False  # renew a finished group's KV at time 0; published, it stays that of the last step
    key_range: int | None = None  # finished groups that are attended to; None for all
    hides_prefix: bool = False  # the first group does not see the given ones in its first step, as published with a
    # range or with compression

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def window(self) -> int:
        return min(self.groups, -(-self.steps // self._apart)) if self._apart else self.groups

    @property
    def stagger(self) -> int:
        return self._apart

    @property
    def chunk_width(self) -> int:
        return self.block

    @property
    def chunks_at_once(self) -> int:
        return self.groups

    @property
    def overlap(self) -> int:
        """Groups that the next window goes on from."""
        return self.overlap_frames // self.block

    def prefix(self, frames: int) -> tuple[int, int]:
        """Those of whole groups, and no more than a window goes on from."""
        if frames == 1:
            raise InputError("groups of frames do not begin with an image: take it with --sampling window")
        return whole_chunks(frames, self.block, most=self.overlap or None)

    def prefix_chunks(self, frames: int) -> int:
        """Whole groups; an InputError if a group is given in part."""
        if frames % self.block:
            raise InputError(f"{frames} given latent frames are not whole groups of {self.block}")
        return frames // self.block

    @property
    def branches(self) -> int:
        return 2 if self.guidance > 1 else 1

    def times(self, step: int) -> tuple[float, ...]:
        """The model's time of a step."""
        return (float(self.sigmas.timesteps[step]),)

    def time(self, step: int) -> float:
        """1 - sigma."""
        return 1 - self.sigmas.values[step].item()

    def solver(self, given: Tensor | None, draw: Draw) -> BlockSolver:
        return BlockSolver(self._new_solver(), given=given is not None, mix=self.noise_condition, draw=draw)

    def computes(self, step: int, *, last_tick: bool) -> bool:
        return step == self.steps - 1

    def key_limit(self, step: int, place: int) -> int | None:
        """All, or those that are not finished and `key_range` before them.

        A group that takes its last step counts as finished for those after it.
        """
        if self.hides_prefix and not step and not place:
            return 1
        if self.key_range is None:
            return None
        ahead = max(0, self.steps - 2 - step) // self._apart if self._apart else place
        return 1 + min(place, ahead) + self.key_range

    def clean_limit(self, *, prefix: bool) -> int | None:
        """A finished group attends to all before it."""
        return None if self.key_range is None else self.key_range + 1

    def step_passes(self, step: int, *, oldest: bool, text_needed: bool) -> tuple[Pass, ...]:
        return self._passes(self.times(step))

    def clean_passes(self, step_in_quantum: int, *, prefix: bool, text_needed: bool) -> tuple[Pass, ...]:
        """Both branches: of a given group at the time of its noise, of a finished one at 0."""
        if not prefix and not self.clean_pass:
            return ()
        return self._passes((float(self.noise_condition if prefix else _CLEAN),), weighed=False)


class BlockSolver:
    """A `Solver`: steps of one group; a given one is run once, with noise mixed in."""

    def __init__(self, solver: UniPC, *, given: bool, mix: int, draw: Draw) -> None:
        self._solver, self._given, self._mix, self._draw = solver, given, mix, draw

    def model_input(self, x: Tensor, step: int | None) -> Tensor:
        """The latents; of a given group with its noise."""
        return mixed(x, self._mix, self._draw, 1) if self._given else x

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        return self._solver.step(x, velocity, step)

    def state(self) -> dict[str, Tensor]:
        return self._solver.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._solver.restore(state)


def mixed(x: Tensor, mix: int, draw: Draw, number: int) -> Tensor:
    """Given frames as the model sees them: mixed with thousandths of fresh noise, the `number`th draw."""
    if not mix:
        return x
    share = mix / _TRAINED_STEPS
    return x * (1 - share) + draw(number, x.shape[2]).to(x) * share


# ---- the window as one chunk


@dataclass(frozen=True, kw_only=True)
class WindowSampling(DiffusionForcing):
    """The whole window is one chunk that attends to itself, both ways; its steps are the rows of the time matrix."""

    given: int = 0  # latent frames that are given
    ends: int = 0  # frames at the end that are given too, and are no part of the video

    clean_pass = False
    window = 1
    chunks_at_once = 1
    overlap = 0
    branches = 0  # nothing outlives a pass

    @property
    def stagger(self) -> int:
        """There is one chunk."""
        return self.num_steps

    @property
    def _ready(self) -> int:
        """Groups that are given whole; one that is given in part is denoised, as published."""
        return self.given // self.block

    @property
    def num_steps(self) -> int:
        """Rows, from the first group's first step to the last one's last."""
        return self.steps + self._apart * (self.groups - self._ready - 1)

    @property
    def chunk_width(self) -> int:
        return self.frames + self.ends

    def prefix(self, frames: int) -> tuple[int, int]:
        """Those of whole groups, as of one that is given in part nothing stays."""
        return whole_chunks(frames, self.block, most=self.overlap_frames // self.block or None)

    def prefix_chunks(self, frames: int) -> int:
        """None: the given frames are in the window."""
        return 0

    def time(self, step: int) -> float:
        """Share of the rows that are done."""
        return step / self.num_steps

    def solver(self, given: Tensor | None, draw: Draw) -> WindowSolver:
        return WindowSolver(self, [self._new_solver() for _ in range(self.groups)], draw)

    def computes(self, step: int, *, last_tick: bool) -> bool:
        return False

    def key_limit(self, step: int, place: int) -> int | None:
        return 1

    def clean_limit(self, *, prefix: bool) -> int | None:
        return 1

    def step_of(self, group: int, row: int) -> int:
        """The step that a group takes in a row; negative before its first, `steps` and more after its last."""
        return self.steps if group < self._ready else row - (group - self._ready) * self._apart

    def times(self, row: int) -> tuple[float, ...]:
        """The model's times of each frame in a row."""
        shown = (_NOISE, *self.sigmas.timesteps, _CLEAN)
        steps = [min(max(self.step_of(group, row) + 1, 0), self.steps + 1) for group in range(self.groups)]
        times = [shown[step] for step in steps for _ in range(self.block)] + [_CLEAN] * self.ends
        if self.noise_condition:
            times[: self.given] = [self.noise_condition] * self.given
        return tuple(float(time) for time in times)

    def step_passes(self, step: int, *, oldest: bool, text_needed: bool) -> tuple[Pass, ...]:
        return self._passes(self.times(step), isolated=True)

    def clean_passes(self, step_in_quantum: int, *, prefix: bool, text_needed: bool) -> tuple[Pass, ...]:
        return ()


class WindowSolver:
    """A `Solver`: steps of all groups of a window; those that have not begun or have finished stay as they are."""

    def __init__(self, sampling: WindowSampling, solvers: list[UniPC], draw: Draw) -> None:
        self._sampling, self._solvers, self._draw = sampling, solvers, draw

    def model_input(self, x: Tensor, step: int | None) -> Tensor:
        given, mix = self._sampling.given, self._sampling.noise_condition
        if step is None or not given or not mix:
            return x
        return torch.cat([mixed(x[:, :, :given], mix, self._draw, step + 1), x[:, :, given:]], dim=2)

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """A step of UniPC for each group that takes one."""
        sampling, width, x = self._sampling, self._sampling.block, x.clone()
        for group, solver in enumerate(self._solvers):
            own, frames = sampling.step_of(group, step), slice(group * width, (group + 1) * width)
            if 0 <= own < sampling.steps:
                x[:, :, frames] = solver.step(x[:, :, frames].clone(), velocity[:, :, frames], own)
        return x

    def state(self) -> dict[str, Tensor]:
        states = enumerate(one.state() for one in self._solvers)
        return {f"{group}.{name}": part for group, state in states for name, part in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for group, solver in enumerate(self._solvers):
            start = f"{group}."
            solver.restore({name.removeprefix(start): part for name, part in state.items() if name.startswith(start)})
