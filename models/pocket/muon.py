"""Muon, an optimizer for matrices, in a form that a CUDA graph can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices (Jordan et al., 2024, "Muon").

    `torch.optim.Muon` goes through its matrices one by one and cannot be captured in a CUDA graph; here those of one
    shape are updated together.
    """

    def __init__(self, matrices: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        groups: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": group} for group in groups.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """Update all matrices by their gradients."""
        for group in self.param_groups:
            parameters, momentum = group["params"], group["momentum"]
            gradients = torch.stack([parameter.grad for parameter in parameters])
            first = self.state[parameters[0]]
            if "momentum" not in first:
                first["momentum"] = torch.zeros_like(gradients)
            held = first["momentum"].lerp_(gradients, 1 - momentum)
            rows, columns = gradients.shape[1:]
            step = _orthogonal(gradients.lerp(held, momentum)) * (group["lr"] * max(1.0, rows / columns) ** 0.5)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(parameters, list(step))


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, nearly: five steps of a quintic Newton-Schulz iteration, in bf16."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide else x.mT).to(matrices.dtype)
