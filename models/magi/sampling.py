"""How MAGI-1 samples: times, guidance, and how far back a chunk looks (specification part 7).

Figures only. It knows no tensors of the video, no requests and no order of work.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from models.errors import InputError
from models.magi.config import MagiConfig
from models.protocols import CELL_FRAMES, CaptionKind, Draw, Pass, PassCondition, Solver

_SHORTCUT_STEPS = 12
_SHORTCUTS = {"16,16,8": ((0.0, 1 / 16, 2 / 16), (1, 1, 2))}
_DEFAULT_SHORTCUT = ((0.0, 2 / 16, 3 / 16), (2, 1, 1))  # "8,16,16", and whatever else is given
_PREFIX_FALLBACK = 8  # chunks a prefix chunk looks back where neither range says so (7.6)
COPY_WEIGHT = 0.3  # of the copy pass in the sum: 1 - the released `prev_chunks_scale` (7.5)


def timesteps(num_steps: int, shortcut_mode: str) -> torch.Tensor:
    """Times t_0 .. t_N in fp32, t = s^2 / (3 - 2 s^2) (specification 7.2). The last is 1.0000001, as published."""
    if num_steps == _SHORTCUT_STEPS:
        base, _ = _SHORTCUTS.get(shortcut_mode, _DEFAULT_SHORTCUT)
        offsets = [quarter / 4 + part for quarter in range(5) for part in base]
        s = torch.tensor(offsets[: num_steps + 1], dtype=torch.float32)
    else:
        s = torch.linspace(0, 1, num_steps + 1)
    square = s.square()
    return (1 / 3) * square / (1 + (1 / 3 - 1) * square)


@dataclass(frozen=True, slots=True)
class EulerSolver(Solver):
    """Euler's method; frames that are given are written over in every step (7.4, steps 4, 6)."""

    sampling: MagiSampling
    given: Tensor | None

    def model_input(self, x: Tensor, step: int | None) -> Tensor:
        if self.given is None:
            return x
        x = x.clone()
        x[:, :, : self.given.shape[2]] = self.given.to(x)
        return x

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        return self.model_input(x, step) + velocity * self.sampling.step_size(step)


@dataclass(frozen=True, kw_only=True)
class MagiSampling:
    """A `Sampling`."""

    chunks_at_once = None
    overlap = 0
    publishes = True
    sink = 0
    ends = 0
    residual_of_layers = False
    changes = None

    config: MagiConfig  # the model's configuration
    num_steps: int  # denoising steps, in place of the configuration's
    clean_pass: bool = True  # renew the KV of a finished chunk by a pass at `clean_t`
    copy_pass: bool = True  # blend in a copy of a distilled model's cleanest chunk that sees itself only
    copy_weight: float = COPY_WEIGHT  # of that copy

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_steps % self.window:
            raise InputError(
                f"{self.num_steps} steps do not divide into the window of {self.window} chunks: "
                f"take a multiple of {self.window}"
            )
        ranges = self.config.runtime_config.noise2clean_kvrange
        if ranges and self.num_steps % len(ranges):
            raise InputError(
                f"{self.num_steps} steps do not divide into the {len(ranges)} entries of noise2clean_kvrange"
            )

    @property
    def window(self) -> int:
        return self.config.runtime_config.window_size

    @property
    def stagger(self) -> int:
        """Steps are spread evenly over the window."""
        return self.num_steps // self.window

    @property
    def chunk_width(self) -> int:
        return self.config.runtime_config.chunk_width

    def prefix(self, frames: int) -> tuple[int, int]:
        """All; an image is a latent frame too."""
        return frames, 1 if frames == 1 else frames // CELL_FRAMES

    def prefix_chunks(self, frames: int) -> int:
        """A chunk that the prefix fills in part is one more."""
        return -(-frames // self.chunk_width)

    @property
    def guided(self) -> bool:
        """Three-way classifier-free guidance, as base models have it."""
        return self.config.runtime_config.cfg_number == 3

    @property
    def branches(self) -> int:
        """A guided model keeps apart what its text branch and its null branch attend to."""
        return 2 if self.guided else 1

    @cached_property
    def _times(self) -> tuple[list[float], list[float]]:
        t = timesteps(self.num_steps, self.config.engine_config.shortcut_mode)
        return t.tolist(), (t[1:] - t[:-1]).tolist()

    def time(self, step: int) -> float:
        """Time before a step, 0 noise and 1 clean."""
        return self._times[0][step]

    def step_size(self, step: int) -> float:
        """t of the next step minus t of this one, in fp32."""
        return self._times[1][step]

    def solver(self, given: Tensor | None, draw: Draw) -> EulerSolver:
        return EulerSolver(self, given)

    def computes(self, step: int, *, last_tick: bool) -> bool:
        return last_tick

    def key_limit(self, step: int, place: int) -> int | None:
        """Chunks attended to, itself included: one figure for each quarter of the steps; None for all (7.4, step 3)."""
        ranges = self.config.runtime_config.noise2clean_kvrange
        return ranges[step // (self.num_steps // len(ranges))] if ranges else None

    def clean_limit(self, *, prefix: bool) -> int | None:
        """The same for a finished chunk (7.4) and for a prefix chunk (7.6)."""
        runtime = self.config.runtime_config
        if runtime.clean_chunk_kvrange != -1:
            return runtime.clean_chunk_kvrange
        if runtime.noise2clean_kvrange:
            return runtime.noise2clean_kvrange[-1]
        return _PREFIX_FALLBACK if prefix else None

    def _distill(self, step_in_quantum: int) -> float | None:
        """The step-size constant of a distilled model (6.1, step 4)."""
        if not self.config.engine_config.distill:
            return None
        if self.num_steps != _SHORTCUT_STEPS:
            return self.num_steps / 4 * 2
        _, intervals = _SHORTCUTS.get(self.config.engine_config.shortcut_mode, _DEFAULT_SHORTCUT)
        return 8 / intervals[step_in_quantum % len(intervals)]

    @cached_property
    def _scale_limits(self) -> list[float]:
        """Times at which the scales change."""
        return [torch.tensor(r, dtype=torch.float32).item() - 1e-7 for r in self.config.runtime_config.cfg_t_range]

    def _scales(self, step: int) -> tuple[float, float]:
        """(previous-chunks scale, text scale) at a step's time (7.5)."""
        runtime = self.config.runtime_config
        k = bisect.bisect_left(self._scale_limits, self.time(step)) - 1
        return runtime.prev_chunk_scales[k], runtime.text_scales[k]

    def weighs_text(self, step: int) -> bool:
        """Whether the text branch of guidance counts in this step; it does not at t >= 0.3 as released."""
        return self.guided and self._scales(step)[1] != 0

    def step_passes(self, step: int, *, oldest: bool, text_needed: bool) -> tuple[Pass, ...]:
        """Passes of a denoising step (7.5). Branches whose weight is zero and whose KV nobody reads are left out."""
        time, distill = self.time(step), self._distill(step % (self.num_steps // self.window))
        one = partial(_pass, t=time, distill=distill)
        if not self.guided:
            threshold = self.config.engine_config.distill_nearly_clean_chunk_threshold
            if not (oldest and self.copy_pass and time > threshold):
                return (one("denoise", "text", 1.0),)
            weight = self.copy_weight
            return one("denoise", "text", 1 - weight), one("copy", "text", weight, isolated=True)
        previous, text = self._scales(step)
        passes = [one("null", "null", previous - text, drop=True)]
        if previous != 1:
            passes.insert(0, one("context_free", "null", 1 - previous, drop=True, isolated=True))
        if text_needed:
            passes.append(one("text", "text", text, branch=1))
        return tuple(passes)

    def clean_passes(self, step_in_quantum: int, *, prefix: bool, text_needed: bool) -> tuple[Pass, ...]:
        """Passes of a finished or a prefix chunk: null text, t = clean_t (7.4, step 2; 7.6)."""
        if not prefix and not self.clean_pass:
            return ()
        one = partial(_pass, t=self.config.runtime_config.clean_t, distill=self._distill(step_in_quantum))
        clean = one("clean", "null", 0.0, drop=self.guided)
        if text_needed and self.guided and not prefix:
            return clean, one("clean_text", "null", 0.0, branch=1)
        return (clean,)


def _pass(
    name: str,
    caption: CaptionKind,
    weight: float,
    *,
    t: float,
    distill: float | None,
    drop: bool = False,
    branch: int = 0,
    isolated: bool = False,
) -> Pass:
    condition = PassCondition(times=(t,), distill=distill, drop=drop)
    return Pass(name=name, caption=caption, branch=branch, isolated=isolated, weight=weight, condition=condition)
