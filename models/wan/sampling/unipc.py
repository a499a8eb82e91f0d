"""UniPC as SkyReels-V2 runs it: order 2, variant bh2, on predictions of the clean latents (arXiv 2302.04867, Alg. 5-8).

Figures are taken in fp32, as in diffusers' `UniPCMultistepScheduler` with flow sigmas: trajectories are the same to the
bit. One solver belongs to one block of latent frames. It knows no model and no order of work.

Shapes: latents x and velocities v [1, C, T, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_FIRST = 0.9990000128746033  # 1 - 1/1000 in fp32: where the unshifted sigmas begin


@dataclass(frozen=True)
class Sigmas:
    """Noise levels of a run, shifted: sigma = shift s / (1 + (shift - 1) s) of evenly spaced s."""

    num_steps: int
    shift: float

    @cached_property
    def _whole(self) -> np.ndarray:
        s = np.linspace(_FIRST, 0, self.num_steps + 1)[:-1]
        return self.shift * s / (1 + (self.shift - 1) * s)

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """The model's time before each step: 1000 sigma, cut off."""
        return tuple((self._whole * 1000).astype(np.int64).tolist())

    @cached_property
    def values(self) -> Tensor:
        """Sigma before each step and 0 at the end, [N + 1] fp32."""
        return torch.from_numpy(np.append(self._whole, 0.0).astype(np.float32))

    @cached_property
    def _logs(self) -> Tensor:
        """Half the logarithm of the signal-to-noise ratio, infinite at the end."""
        return torch.log(1 - self.values) - torch.log(self.values)

    def order(self, step: int) -> int:
        """Of a step: 1 at the ends, else 2."""
        return min(2, self.num_steps - step, step + 1)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The figures of all steps."""
        return tuple(self._step(step) for step in range(self.num_steps))

    def _step(self, step: int) -> Step:
        (ratio, scale), previous = self._from(step), None
        logs = self._logs
        if self.order(step) == 2:
            previous = ((logs[step - 1] - logs[step]) / (logs[step + 1] - logs[step])).item()
        return Step(self.values[step].item(), ratio, scale, previous, self._corrector(step) if step else None)

    def _from(self, step: int) -> tuple[float, float]:
        """What the latents before a step and the prediction are multiplied with in it."""
        sigma, h = self.values, self._logs[step + 1] - self._logs[step]
        return (sigma[step + 1] / sigma[step]).item(), ((1 - sigma[step + 1]) * torch.expm1(-h)).item()

    def _corrector(self, step: int) -> Corrector:
        """What corrects the latents before a step with the prediction at them."""
        logs, (ratio, scale) = self._logs, self._from(step - 1)
        if self.order(step - 1) == 1:
            return Corrector(ratio, scale, 0.0, 1.0, 0.5)
        h = logs[step] - logs[step - 1]
        r, e = (logs[step - 2] - logs[step - 1]) / h, torch.expm1(-h)
        phi = e / -h - 1
        b = torch.stack([phi / e, 2 * (phi / -h - 0.5) / e])
        system = torch.stack([torch.ones(2), torch.stack([r, torch.ones(())])])
        older, newer = torch.linalg.solve(system, b).tolist()
        return Corrector(ratio, scale, older, r.item(), newer)


@dataclass(frozen=True, slots=True)
class Corrector:
    """x = ratio x_last - scale (m_last + older (m_older - m_last) / r + newer (m - m_last))."""

    ratio: float
    scale: float
    older: float
    r: float
    newer: float


@dataclass(frozen=True, slots=True)
class Step:
    """A prediction m = x - sigma v, and x_next = ratio x - scale (m + (m_last - m) / 2r)."""

    sigma: float
    ratio: float
    scale: float
    r: float | None  # None leaves out the older prediction
    corrector: Corrector | None  # None at the first step


class UniPC:
    """Takes the steps of one block.

    In the published pipelines the latents handed in are a view of what the result is written into, so the second step
    is corrected from the result of the first in place of the noise before it; `aliased` does the same. With `dtype`
    bf16 latents are rounded where the published code rounds them.
    """

    def __init__(self, sigmas: Sigmas, *, aliased: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self._sigmas, self._aliased, self._dtype = sigmas, aliased, dtype
        self._state: dict[str, Tensor] = {}  # last and older prediction, latents before the last step

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Latents after a step."""
        figures, held = self._sigmas.steps[step], self._state
        m = x - figures.sigma * velocity
        if (correct := figures.corrector) is not None:
            last, before = held["last"], self._scaled(correct.ratio, held["x"])
            change = self._rounded(correct.newer) * (m - last)
            if correct.older:
                change = self._rounded(correct.older) * ((held["older"] - last) / correct.r) + change
            x = self._round(before - correct.scale * last - correct.scale * change)
        following = self._scaled(figures.ratio, x) - figures.scale * m
        if figures.r is not None:
            following = following - figures.scale * 0.5 * ((held["last"] - m) / figures.r)
        following = self._round(following)
        older = {"older": held["last"]} if held else {}
        self._state = {**older, "last": m, "x": following if self._aliased and not step else x}
        return following

    def state(self) -> dict[str, Tensor]:
        """The predictions and latents that the next step looks back to."""
        return dict(self._state)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        self._state = dict(state)

    def _scaled(self, figure: float, x: Tensor) -> Tensor:
        """A product as PyTorch makes it of a number in fp32 and latents in `dtype`; a CPU rounds the number too."""
        return (torch.tensor(figure) * x.to(self._dtype)).to(x.dtype)

    def _round(self, x: Tensor) -> Tensor:
        return x if self._dtype == torch.float32 else x.to(self._dtype).to(x.dtype)

    def _rounded(self, figure: float) -> float:
        return figure if self._dtype == torch.float32 else torch.tensor(figure, dtype=self._dtype).item()
