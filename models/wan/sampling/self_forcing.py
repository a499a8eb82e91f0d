"""How Self-Forcing samples: one chunk after another, in four steps that go to the end and back into noise.

Figures only, as `forcing.py`. Each finished chunk is run once more as it is, for the KV that later chunks attend to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import InputError
from models.protocols import Draw, Pass, PassCondition, Solver
from models.wan.sampling.forcing import whole_chunks

_TRAINED_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class SelfForcingSampling:
    """A `Sampling`."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)  # of `_TRAINED_STEPS`, before the shift
    shift: float = 5.0  # of the noise levels
    chunk_width: int = 3  # latent frames of a chunk
    held: int | None = None  # latent frames that a chunk attends to, itself and the sink included; None for all
    sink_frames: int = 0  # of them, first frames of the video that always stay
    context_noise: float = 0.0  # time at which a finished chunk is run once more
    clean_pass: bool = True  # run it once more; without, its KV stays that of its last step

    window = 1
    chunks_at_once = None
    overlap = 0
    branches = 1
    publishes = False
    residual_of_layers = True
    ends = 0
    changes = None

    def __post_init__(self) -> None:
        for name, frames in (("attention", self.held or 0), ("sink", self.sink_frames)):
            if frames % self.chunk_width:
                raise InputError(f"{name} over {frames} latent frames is not whole chunks of {self.chunk_width}")

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def stagger(self) -> int:
        """A chunk begins when the one before it has finished."""
        return self.num_steps

    @property
    def sink(self) -> int:
        """First chunks that stay."""
        return self.sink_frames // self.chunk_width

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level before each step: shift s / (1 + (shift - 1) s)."""
        spaced = [step / _TRAINED_STEPS for step in self.steps]
        return tuple(self.shift * s / (1 + (self.shift - 1) * s) for s in spaced)

    def prefix(self, frames: int) -> tuple[int, int]:
        """Those of whole chunks, and no more than a chunk attends to besides itself."""
        most = None if self.held is None else self.held // self.chunk_width - 1
        return whole_chunks(frames, self.chunk_width, most=most)

    def prefix_chunks(self, frames: int) -> int:
        """Whole chunks; an InputError if one is given in part."""
        if frames % self.chunk_width:
            raise InputError(f"{frames} given latent frames are not whole chunks of {self.chunk_width}")
        return frames // self.chunk_width

    def time(self, step: int) -> float:
        """1 - sigma."""
        return 1 - (*self.sigmas, 0.0)[step]

    def solver(self, given: Tensor | None, draw: Draw) -> RenoisingSolver:
        return RenoisingSolver((*self.sigmas, 0.0), draw)

    def computes(self, step: int, *, last_tick: bool) -> bool:
        return step == self.num_steps - 1

    def key_limit(self, step: int, place: int) -> int | None:
        """The chunks that are held, itself included."""
        return None if self.held is None else self.held // self.chunk_width

    def clean_limit(self, *, prefix: bool) -> int | None:
        return self.key_limit(0, 0)

    def weighs_text(self, step: int) -> bool:
        """There is no guidance."""
        return True

    def step_passes(self, step: int, *, oldest: bool, text_needed: bool) -> tuple[Pass, ...]:
        time = torch.tensor(self.sigmas[step] * _TRAINED_STEPS, dtype=torch.float32).item()
        return (self._pass("denoise", time, 1.0),)

    def clean_passes(self, step_in_quantum: int, *, prefix: bool, text_needed: bool) -> tuple[Pass, ...]:
        """One pass over the finished chunk, or a given one."""
        if not prefix and not self.clean_pass:
            return ()
        return (self._pass("clean", self.context_noise, 0.0),)

    def _pass(self, name: str, time: float, weight: float) -> Pass:
        condition = PassCondition(times=(time,))
        return Pass(name=name, caption="text", branch=0, isolated=False, weight=weight, condition=condition)


class RenoisingSolver(Solver):
    """To the clean latents that the velocity points at, and back to the next level with fresh noise."""

    def __init__(self, sigmas: tuple[float, ...], draw: Draw) -> None:
        self._sigmas, self._draw = sigmas, draw

    def model_input(self, x: Tensor, step: int | None) -> Tensor:
        return x

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """x0 = x - sigma v in float64, then (1 - sigma') x0 + sigma' noise."""
        clean = (x.double() - self._sigmas[step] * velocity.double()).to(x.dtype)
        following = self._sigmas[step + 1]
        if not following:
            return clean
        return (1 - following) * clean + following * self._draw(step + 1, x.shape[2]).to(x)
