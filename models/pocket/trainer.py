"""One training loop for both networks: schedule, clipping, averaging, progress, and checkpoints to resume from.

It does not know what is trained: one function draws a batch from the generator that it is given, another computes the
loss of a batch. On a GPU forward and backward of each kind of batch are captured once as a CUDA graph and replayed,
since these networks are so small that starting the kernels takes longer than running them.
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
Figures = dict[str, Tensor]
_SAVE_EVERY = 120.0  # seconds
_WARM_UP = 3  # steps of a kind of batch before it is captured, in which libraries choose their kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a loss is computed of. Batches of one kind have tensors of the same shapes and take the same branches."""

    kind: object  # hashable
    tensors: tuple[Tensor, ...]


Draw = Callable[[torch.Generator], Batch]
Loss = Callable[[Batch], tuple[Tensor, Figures]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What all trainings of a run share."""

    out: Path  # folder of checkpoints
    seed: int
    compiled: bool  # with torch.compile, which needs gcc; not on GPUs
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


class Ema(Generic[Module]):
    """Exponential moving average of a module's weights, with a decay that starts low."""

    def __init__(self, module: Module, decay: float) -> None:
        self.decay = decay
        self.module = deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: Module, step: int) -> None:
        """Take the module's present weights in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.module.parameters())
        values = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)


class _Graphs:
    """Forward and backward of a loss on a GPU, a CUDA graph for each kind of batch; all add to the same gradients."""

    def __init__(self, loss: Loss, parameters: list[nn.Parameter]) -> None:
        self._loss, self._parameters = loss, parameters
        self._seen: dict[object, int] = {}
        self._captured: dict[object, tuple[torch.cuda.CUDAGraph, Batch, Figures]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def backward(self, batch: Batch) -> Figures:
        """Gradients of a batch, in place of those before."""
        if batch.kind in self._captured:
            graph, held, figures = self._captured[batch.kind]
            for place, given in zip(held.tensors, batch.tensors, strict=True):
                place.copy_(given)
            graph.replay()
            return figures
        self._seen[batch.kind] = self._seen.get(batch.kind, 0) + 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            figures = self._run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        if self._seen[batch.kind] == _WARM_UP:
            self._capture(batch)
        return figures

    def _capture(self, batch: Batch) -> None:
        held = Batch(kind=batch.kind, tensors=tuple(tensor.clone() for tensor in batch.tensors))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            figures = self._run(held)
        self._captured[batch.kind] = graph, held, figures

    def _run(self, batch: Batch) -> Figures:
        torch._foreach_zero_([parameter.grad for parameter in self._parameters])
        loss, figures = self._loss(batch)
        loss.backward()
        return figures


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
        self._checkpoint, self._module, self._ema = run.out / name, module, Ema(module, decay)
        self._optimizers, self._schedule = optimizers, schedule
        self._base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._seed, self._report = run.seed if seed is None else seed, run.report
        self._device = run.device
        self._step = 0
        self.history: list[dict[str, float]] = []
        if self._checkpoint.exists():
            self._load()

    def train(self, steps: int, draw: Draw, loss: Loss) -> Module:
        """Train up to `steps` steps in all; reports every hundredth of them and saves every few minutes.

        Returns:
            The averaged weights.
        """
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        backward = _Graphs(loss, parameters).backward if self._device.type == "cuda" else _eager(loss, parameters)
        began, since, last_save = time.monotonic(), self._step, time.monotonic()
        sums: Figures = {}
        counted, every = 0, max(25, steps // 100)
        while self._step < steps:
            figures = self._take(draw, backward, parameters)
            counted += 1
            for key, value in figures.items():
                sums[key] = sums[key] + value if key in sums else value.clone()
            if self._step % every == 0 or self._step == steps:
                means = {key: value.item() / counted for key, value in sums.items()}
                self.history.append({"step": self._step, **means})
                pace = (time.monotonic() - began) / (self._step - since)
                left = (steps - self._step) * pace / 60
                shown = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                self._report(f"step {self._step}/{steps}  {shown}  {1000 * pace:.1f} ms/step  {left:.1f} min left")
                sums, counted = {}, 0
            if time.monotonic() - last_save > _SAVE_EVERY or self._step == steps:
                self._save()
                last_save = time.monotonic()
        return self._ema.module

    def _take(self, draw: Draw, backward: Callable[[Batch], Figures], parameters: list[nn.Parameter]) -> Figures:
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * self._schedule(self._step)
        # Each step has its own stream, so that a resumed run draws what an unbroken one would have drawn.
        generator = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + self._step)
        figures = backward(draw(generator))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._step += 1
        self._ema.update(self._module, self._step)
        return figures

    def _save(self) -> None:
        state = {
            "step": self._step,
            "seed": self._seed,
            "module": self._module.state_dict(),
            "ema": self._ema.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "history": self.history,
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True, map_location=self._device)
        if state["seed"] != self._seed:
            raise ValueError(f"{self._checkpoint} was trained with seed {state['seed']}, not {self._seed}")
        self._step, self.history = state["step"], state["history"]
        self._module.load_state_dict(state["module"])
        self._ema.module.load_state_dict(state["ema"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._report(f"going on from step {self._step} of {self._checkpoint}")


def _eager(loss: Loss, parameters: list[nn.Parameter]) -> Callable[[Batch], Figures]:
    def backward(batch: Batch) -> Figures:
        for parameter in parameters:
            parameter.grad = None
        value, figures = loss(batch)
        value.backward()
        return figures

    return backward
