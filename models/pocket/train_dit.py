"""Training of magi-pocket's DiT on windows of latents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.magi.dit import MagiDiT
from models.pocket.latents import Latents
from models.pocket.muon import Muon
from models.pocket.preset import POCKET_DIT
from models.pocket.trainer import Figures, Loss, Run, Trainer, linear_decay
from models.pocket.windows import (
    GUIDED_KINDS,
    REFINED_KINDS,
    STEADY_KINDS,
    Branch,
    WindowKind,
    Windows,
    choose_branch,
    draw_windows,
    guided_velocity,
    steady_velocity,
    window_loss,
)

_TRIAL = 1500  # steps; after twice as many their number can be chosen


def new_dit(seed: int) -> MagiDiT:
    """A DiT with small random weights. A gate of zero would feed zeros into the post-norms, so gates start open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the biases, which PyTorch draws
        dit = MagiDiT(POCKET_DIT)
    for name, parameter in dit.named_parameters():
        if name.endswith("null_caption_embedding"):
            nn.init.normal_(parameter, std=0.5, generator=generator)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()), generator=generator)
    nn.init.zeros_(dit.get_parameter("final_linear.linear.weight"))
    for name, parameter in dit.named_parameters():
        if name.endswith("ada_modulate_layer.proj.0.bias"):
            nn.init.ones_(parameter)
        elif name.endswith("post_norm.weight"):
            nn.init.constant_(parameter, 0.3 - 1)
    dit.rope.requires_grad_(False)
    return dit


def _trainer(
    run: Run, dit: MagiDiT, schedule: Callable[[int], float], *, rate: float, decay: float, checkpoint: str = "dit.ckpt"
) -> Trainer[MagiDiT]:
    """Muon for the matrices of the blocks, AdamW for the rest; `rate` is a factor."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in dit.named_parameters():
        if parameter.requires_grad:
            block = name.startswith("videodit_blocks.layers") and parameter.dim() == 2 and "ada_" not in name
            (matrices if block else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=0.02 * rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, 2e-3 * rate, (0.9, 0.98), weight_decay=0.0, fused=True, capturable=run.captured),
    ]
    return Trainer(run, checkpoint, dit, optimizers, schedule, decay=decay)


def _loss(
    run: Run,
    dit: MagiDiT,
    latents: Callable[[Branch], Latents],
    wanted: Callable[[Windows, Branch], Tensor] = lambda windows, _: windows.velocity,
    *,
    errors: bool = False,
) -> Loss:
    def loss(branch: Hashable, generator: torch.Generator) -> tuple[Tensor, Figures]:
        assert isinstance(branch, Branch)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            windows = draw_windows(latents(branch), branch, generator, errors=errors and branch.clean > 0)
            value = window_loss(dit, windows, branch, wanted(windows, branch))
        return value, {"loss": value.detach()}

    return loss


def train_dit(run: Run, latents: Latents, *, steps: int, until: float | None = None, leave: int = 0) -> MagiDiT:
    """Train, or go on from the last checkpoint; returns the averaged weights.

    With `until`, a time of the monotonic clock, `steps` is replaced by what fits, less those to `leave` time for. They
    are chosen early, while rates are constant, so that a run with that many steps is the same run.
    """
    dit = new_dit(run.seed).to(run.device)
    trainer = _trainer(run, dit, _schedule(steps), rate=1.0, decay=0.999)
    if run.compiled:
        dit.compile_regions(dynamic=True)  # windows have many sizes
    loss = _loss(run, dit, lambda _: latents)
    if until:
        trainer.train(trainer.step + _TRIAL, choose_branch, loss)  # in which all kinds are seen
        middle = time.monotonic()
        trainer.train(trainer.step + _TRIAL, choose_branch, loss)
        pace = (time.monotonic() - middle) / _TRIAL
        steps = trainer.step + max(0, int((until - time.monotonic()) / pace) - leave)
        trainer.schedule = _schedule(steps)
        run.report(f"{steps} steps of {1000 * pace:.1f} ms")
    return trainer.train(steps, choose_branch, loss)


def _schedule(steps: int) -> Callable[[int], float]:
    return linear_decay(steps, warmup=100, hold=0.4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Clips to go on with: many short ones, and long ones for what those are too short for."""

    short: Latents
    long: Latents

    def of(self, branch: Branch) -> Latents:
        """Those that a kind of window is drawn from."""
        return self.short if branch.clean + branch.noisy <= self.short.chunks.shape[2] else self.long


def refine_dit(run: Run, start: MagiDiT, clips: Clips, *, steps: int, rate: float) -> MagiDiT:
    """Go on with trained weights, at a part of the rates; returns the averaged weights."""
    trainer = _trainer(run, _trainable(run, start), linear_decay(steps, warmup=50, hold=0.2), rate=rate, decay=0.998)
    return _go_on(run, trainer, REFINED_KINDS, steps, _loss(run, trainer.module, clips.of))


def guide_dit(run: Run, guide: MagiDiT, clips: Clips, *, steps: int) -> MagiDiT:
    """Teach trained weights to make first chunks as they do with guidance; returns the averaged weights."""
    trainer, wanted = _learner(run, guide, steps, 0.25, "guided.ckpt"), partial(guided_velocity, guide)
    return _go_on(run, trainer, GUIDED_KINDS, steps, _loss(run, trainer.module, clips.of, wanted))


def steady_dit(run: Run, start: MagiDiT, clips: Clips, *, steps: int) -> MagiDiT:
    """Teach trained weights not to go on from errors in the past; returns the averaged weights."""
    trainer, wanted = _learner(run, start, steps, 0.12, "steady.ckpt"), partial(steady_velocity, start)
    return _go_on(run, trainer, STEADY_KINDS, steps, _loss(run, trainer.module, clips.of, wanted, errors=True))


def _learner(run: Run, teacher: MagiDiT, steps: int, rate: float, checkpoint: str) -> Trainer[MagiDiT]:
    """Of a copy of trained weights, which themselves change no more."""
    dit, schedule = _trainable(run, deepcopy(teacher)), linear_decay(steps, warmup=30, hold=0.3)
    teacher.to(run.device).requires_grad_(False)
    return _trainer(run, dit, schedule, rate=rate, decay=0.99, checkpoint=checkpoint)


def _trainable(run: Run, dit: MagiDiT) -> MagiDiT:
    dit = dit.to(run.device).requires_grad_(True)
    dit.rope.requires_grad_(False)
    return dit


def _go_on(run: Run, trainer: Trainer[MagiDiT], kinds: Sequence[WindowKind], steps: int, loss: Loss) -> MagiDiT:
    if run.compiled and not run.captured:  # a captured step gains little by it, and every size is compiled anew
        torch._dynamo.config.recompile_limit = 64
        trainer.module.compile_regions(dynamic=False)
    return trainer.train(steps, partial(choose_branch, kinds=kinds), loss)
