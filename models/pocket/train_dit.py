"""Training of magi-pocket's DiT on windows of latents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from models.magi.dit import MagiDiT
from models.pocket.latents import Latents
from models.pocket.muon import Muon
from models.pocket.preset import POCKET_DIT
from models.pocket.trainer import Figures, Loss, Run, Trainer, linear_decay
from models.pocket.windows import REFINED_KINDS, Branch, choose_branch, draw_windows, guide, window_loss

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
    run: Run, dit: MagiDiT, schedule: Callable[[int], float], *, rate: float, decay: float
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
    return Trainer(run, "dit.ckpt", dit, optimizers, schedule, decay=decay)


def _loss(run: Run, dit: MagiDiT, latents: Callable[[Branch], Latents], *, guidance: MagiDiT | None = None) -> Loss:
    def loss(branch: Hashable, generator: torch.Generator) -> tuple[Tensor, Figures]:
        assert isinstance(branch, Branch)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            windows = draw_windows(latents(branch), branch, generator)
            windows = windows if guidance is None else guide(guidance, windows, branch)
            value = window_loss(dit, windows, branch)
        return value, {"loss": value.detach()}

    return loss


def train_dit(run: Run, latents: Latents, *, steps: int, until: float | None = None) -> MagiDiT:
    """Train, or go on from the last checkpoint; returns the averaged weights.

    With `until`, a time of the monotonic clock, `steps` is replaced by what fits. They are chosen early, while rates
    are constant, so that a run with that many steps is the same run.
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
        steps = trainer.step + int((until - time.monotonic()) / pace)
        trainer.schedule = _schedule(steps)
        run.report(f"{steps} steps of {1000 * pace:.1f} ms")
    return trainer.train(steps, choose_branch, loss)


def _schedule(steps: int) -> Callable[[int], float]:
    return linear_decay(steps, warmup=100, hold=0.4)


def refine_dit(run: Run, start: MagiDiT, latents: Latents, long: Latents, *, steps: int) -> MagiDiT:
    """Go on with trained weights, at a third of the rates; first chunks learn to be guided.

    `long` has clips for what `latents` are too short for.
    """
    dit = start.to(run.device).requires_grad_(True)
    dit.rope.requires_grad_(False)
    trainer = _trainer(run, dit, linear_decay(steps, warmup=50, hold=0.2), rate=0.35, decay=0.998)
    if run.compiled:
        torch._dynamo.config.recompile_limit = 64
        dit.compile_regions(dynamic=False)
    length = latents.chunks.shape[2]

    def clips(branch: Branch) -> Latents:
        return latents if branch.clean + branch.noisy <= length else long

    loss = _loss(run, dit, clips, guidance=trainer.averaged)
    return trainer.train(steps, lambda host: choose_branch(host, REFINED_KINDS), loss)
