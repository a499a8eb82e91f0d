"""One training loop for both networks: schedule, clipping, averaging, progress, and checkpoints to resume from.

It does not know what is trained; a step function draws its batch from the generator that it is given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Step = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]
_SAVE_EVERY = 120.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What all trainings of a run share."""

    out: Path  # folder of checkpoints
    seed: int
    compiled: bool  # with torch.compile, which needs gcc
    report: Callable[[str], None]  # shows one line of progress


def linear_decay(steps: int, *, warmup: int, hold: float) -> Callable[[int], float]:
    """Learning-rate factor: linear warm-up, a plateau for the share `hold` of the run, then linear to zero."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        held = int(hold * steps)
        return 1.0 if step < held else max(0.0, (steps - step) / max(1, steps - held))

    return factor


class Trainer(Generic[Module]):
    """Runs steps and can be stopped and started at any time: a checkpoint holds all that a step depends on.

    Args:
        run: what it is part of.
        name: of the checkpoint in `run.out`.
        module: what is trained.
        optimizers: with the rates that the schedule's factor is applied to.
        schedule: factor of the rates at a step.
        decay: of the averaged weights.
        seed: of this training; that of the run by default.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        module: Module,
        optimizers: list[torch.optim.Optimizer],
        schedule: Callable[[int], float],
        *,
        decay: float,
        seed: int | None = None,
    ) -> None:
        self._checkpoint, self._module, self._decay = run.out / name, module, decay
        self._averaged = deepcopy(module).requires_grad_(False)
        self._optimizers, self._schedule = optimizers, schedule
        self._base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._seed, self._report = run.seed if seed is None else seed, run.report
        self._step = 0
        self.history: list[dict[str, float]] = []
        if self._checkpoint.exists():
            self._load()

    def train(self, steps: int, step: Step) -> Module:
        """Train up to `steps` steps in all; reports every 25 and saves every few minutes.

        Returns:
            The averaged weights.
        """
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        began, since, last_save = time.monotonic(), self._step, time.monotonic()
        sums: dict[str, float] = {}
        counted = 0
        while self._step < steps:
            figures = self._take(step, parameters)
            counted += 1
            for key, value in figures.items():
                sums[key] = sums.get(key, 0.0) + value
            if self._step % 25 == 0 or self._step == steps:
                means = {key: value / counted for key, value in sums.items()}
                self.history.append({"step": self._step, **means})
                pace = (time.monotonic() - began) / (self._step - since)
                left = (steps - self._step) * pace / 60
                shown = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                self._report(f"step {self._step}/{steps}  {shown}  {pace:.2f} s/step  {left:.0f} min left")
                sums, counted = {}, 0
            if time.monotonic() - last_save > _SAVE_EVERY or self._step == steps:
                self._save()
                last_save = time.monotonic()
        return self._averaged

    def _take(self, step: Step, parameters: list[nn.Parameter]) -> dict[str, float]:
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * self._schedule(self._step)
        # Each step has its own stream, so that a resumed run draws what an unbroken one would have drawn.
        loss, figures = step(torch.Generator().manual_seed(self._seed * 1_000_003 + self._step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._step += 1
        self._average()
        return figures

    @torch.no_grad()
    def _average(self) -> None:
        """Take the present weights into the moving average, whose decay starts low."""
        decay = min(self._decay, (1 + self._step) / (10 + self._step))
        averages: list[Tensor] = list(self._averaged.parameters())
        values = [p.detach() for p in self._module.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)

    def _save(self) -> None:
        state = {
            "step": self._step,
            "seed": self._seed,
            "module": self._module.state_dict(),
            "ema": self._averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "history": self.history,
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        if state["seed"] != self._seed:
            raise ValueError(f"{self._checkpoint} was trained with seed {state['seed']}, not {self._seed}")
        self._step, self.history = state["step"], state["history"]
        self._module.load_state_dict(state["module"])
        self._averaged.load_state_dict(state["ema"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._report(f"going on from step {self._step} of {self._checkpoint}")
