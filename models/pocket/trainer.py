"""One training loop for both networks: schedule, clipping, averaging, progress, and checkpoints to resume from.

It does not know what is trained: it is given a loss, which draws its batch from a generator. On a GPU a whole step (the
draw, forward, backward, the optimizers) is captured once for each kind of batch as a CUDA graph and replayed, since
these networks are so small that starting their kernels takes longer than running them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Figures = dict[str, Tensor]
Choose = Callable[[torch.Generator], Hashable]
"""The kind of the next batch, by a generator of the host: a kind has its own shapes and takes its own branches."""
Loss = Callable[[Hashable, torch.Generator], tuple[Tensor, Figures]]
"""The loss of a batch of a kind, which is drawn from a generator of the device, and figures to show."""
Step = Callable[[Loss, Hashable, torch.Generator], Figures]
_SAVE_EVERY = 120.0  # seconds
_WARM_UP = 3  # steps of a kind before it is captured, in which libraries choose their kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What all trainings of a run share."""

    out: Path  # folder of checkpoints
    seed: int
    compiled: bool  # with torch.compile, which needs gcc
    captured: bool = False  # steps are captured as CUDA graphs, which optimizers must know
    device: torch.device
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
        optimizers: with the rates that the schedule's factor is applied to; capturable where steps are captured.
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
        self._run, self._checkpoint, self.module, self._decay = run, run.out / name, module, decay
        self._averaged = deepcopy(module).requires_grad_(False)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizers, self.schedule = optimizers, schedule
        full = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self._seed = run.seed if seed is None else seed
        self._generator = torch.Generator(run.device)
        self.step = 0
        self.history: list[dict[str, float]] = []
        if self._checkpoint.exists():
            self._load()
        # What changes from step to step is read from the device, so that a captured step can be replayed.
        self._rates = [(torch.zeros((), device=run.device), rate) for rate in full]
        self._fresh = torch.zeros((), device=run.device)  # share of the present weights in the average
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, (rate, _) in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        self._take: Step = _Graphs(self._advance) if run.captured else self._advance

    def train(self, steps: int, choose: Choose, loss: Loss) -> Module:
        """Train up to `steps` steps in all; reports every hundredth of them and saves every few minutes.

        Returns:
            The averaged weights.
        """
        began, since, last_save = time.monotonic(), self.step, time.monotonic()
        sums: Figures = {}
        counted, every = 0, max(25, steps // 100)
        while self.step < steps:
            kind = self._prepare(choose)
            for key, value in self._take(loss, kind, self._generator).items():
                sums[key] = sums[key] + value if key in sums else value.clone()
            self.step += 1
            counted += 1
            if self.step % every == 0 or self.step == steps:
                means = {key: value.item() / counted for key, value in sums.items()}
                self.history.append({"step": self.step, **means})
                pace = (time.monotonic() - began) / (self.step - since)
                left = (steps - self.step) * pace / 60
                shown = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                self._run.report(f"step {self.step}/{steps}  {shown}  {1000 * pace:.1f} ms/step  {left:.1f} min left")
                sums, counted = {}, 0
            if time.monotonic() - last_save > _SAVE_EVERY or self.step == steps:
                self._save()
                last_save = time.monotonic()
        return self._averaged

    def _prepare(self, choose: Choose) -> Hashable:
        """Set rates and the generator for the next step, and choose its kind."""
        factor = self.schedule(self.step)
        for rate, full in self._rates:
            rate.fill_(full * factor)
        self._fresh.fill_(1 - min(self._decay, (2 + self.step) / (11 + self.step)))
        # Each step has its own numbers, so that a resumed run draws what an unbroken one would have drawn.
        seed = self._seed * 1_000_003 + self.step
        self._generator.manual_seed(seed)
        return choose(torch.Generator().manual_seed(seed + (1 << 40)))

    def _advance(self, loss: Loss, kind: Hashable, generator: torch.Generator) -> Figures:
        """A whole step."""
        for parameter in self._parameters:
            parameter.grad = None
        value, figures = loss(kind, generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        with torch.no_grad():
            averages: list[Tensor] = list(self._averaged.parameters())
            values = [p.detach() for p in self.module.parameters()]
            change = torch._foreach_sub(values, averages)
            torch._foreach_mul_(change, self._fresh)
            torch._foreach_add_(averages, change)
        return figures

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seed": self._seed,
            "module": self.module.state_dict(),
            "ema": self._averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "history": self.history,
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True, map_location=self._run.device)
        if state["seed"] != self._seed:
            raise ValueError(f"{self._checkpoint} was trained with seed {state['seed']}, not {self._seed}")
        self.step, self.history = state["step"], state["history"]
        self.module.load_state_dict(state["module"])
        self._averaged.load_state_dict(state["ema"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._run.report(f"going on from step {self.step} of {self._checkpoint}")


class _Graphs:
    """Steps on a GPU: the first few of a kind as they are, then captured as a CUDA graph and replayed."""

    def __init__(self, advance: Step) -> None:
        self._advance = advance
        self._seen: dict[Hashable, int] = {}
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Figures]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, loss: Loss, kind: Hashable, generator: torch.Generator) -> Figures:
        """One step."""
        if kind in self._captured:
            graph, figures = self._captured[kind]
            graph.replay()
            return figures
        seen = self._seen.get(kind, 0)
        self._seen[kind] = seen + 1
        if seen == _WARM_UP:
            return self._capture(loss, kind, generator)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            figures = self._advance(loss, kind, generator)
        torch.cuda.current_stream().wait_stream(self._stream)
        return figures

    def _capture(self, loss: Loss, kind: Hashable, generator: torch.Generator) -> Figures:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            figures = self._advance(loss, kind, generator)
        self._captured[kind] = graph, figures
        graph.replay()
        return figures
