"""The layer norms of MAGI-1: an ordinary one, and one whose stored weight is a gain minus one ("1p")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Ordinary layer norm that computes in its parameters' dtype (specification 6.3, steps 1 and 9)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(input.to(self.weight.dtype))


class LayerNorm1p(nn.Module):
    """Layer norm with an effective gain of weight + 1, in the dtype of its parameters.

    The parameters are fp32 after promotion, but those of the cross-attention stay in the model's dtype, and weight + 1
    is then rounded to it (specification 5.5 and 6.3, step 5).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the parameters' dtype."""
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight + 1, self.bias, self.eps)
