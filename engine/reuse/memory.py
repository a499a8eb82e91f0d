"""What stands in for a step that is not computed, of the steps before it.

It is of three kinds, by name: `residual` repeats what is published for the family, the increment of the latents or what
the layers added to the patch embedding; `velocity` takes the last computed velocity over the present step, which is
right when step sizes differ; `extrapolate` continues the last two computed velocities to the present time, a Taylor
step of first order (the idea of TaylorSeer and SCOPE). It is remembered per chunk and bounded by the window.

Shapes: velocities [1, C, T, h, w], what layers added [1, S, D].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("residual", "velocity", "extrapolate")


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """A step that was computed."""

    step: int  # the chunk's own
    time: float  # before it
    parts: tuple[Tensor, ...]  # its velocity, or what the layers added in each pass that has a weight


class ReuseMemory:
    """The last computed steps of every chunk of the window; two each if a policy may extrapolate (`both`)."""

    def __init__(self, kind: str, *, both: bool = False) -> None:
        self.kind = kind  # one of `KINDS`
        self._keep = 2 if both or kind == "extrapolate" else 1
        self._held: dict[int, tuple[ComputedStep, ...]] = {}

    def computed(self, chunk: int, step: ComputedStep) -> None:
        """Remember a computed step."""
        self._held[chunk] = (*self._held.get(chunk, ()), step)[-self._keep :]

    def last(self, chunk: int) -> ComputedStep:
        """The last computed step."""
        return self._held[chunk][-1]

    def velocity(self, chunk: int, *, extrapolate: bool, step: int, time: float) -> tuple[Tensor, int]:
        """The velocity that stands in for that of a step, and the step whose size it is taken over."""
        *older, last = self._held[chunk]
        (velocity,) = last.parts
        extrapolate = extrapolate or self.kind == "extrapolate"
        if self.kind == "residual" and not extrapolate:
            return velocity, last.step
        if older and extrapolate:
            slope = (time - last.time) / (last.time - older[0].time)
            velocity = velocity + slope * (velocity - older[0].parts[0])
        return velocity, step

    def forget(self, chunk: int) -> None:
        """A chunk has left the window."""
        self._held.pop(chunk, None)

    def state(self) -> dict[int, tuple[ComputedStep, ...]]:
        """Everything that is held, by chunk."""
        return dict(self._held)

    def restore(self, state: Mapping[int, Sequence[ComputedStep]], device: torch.device) -> None:
        """Go on from a saved state, on a device."""
        for chunk, held in state.items():
            self._held[chunk] = tuple(replace(one, parts=tuple(part.to(device) for part in one.parts)) for one in held)
