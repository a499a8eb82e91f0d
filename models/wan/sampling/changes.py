"""How far the model's condition moves from step to step, and the published fits to it (TeaCache, FlowCache).

The published distance is the relative L1 change of e0, the layers' embedding of time and frames per second. It does
not look at latents: it is a table by step, the same for every chunk, branch, prompt and seed.
"""

from collections.abc import Sequence

import torch

from models.protocols import PassCondition
from models.wan.dit import WanDiT

POLYNOMIALS = {
    ("1.3B", True): (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    ("1.3B", False): (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
    ("14B", True): (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    ("14B", False): (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
}
"""What rescales a distance, of the highest power first; by size of the model, and whether the first steps are kept."""
KEPT_STEPS = {True: 5, False: 1}
"""First steps of a chunk that are always computed, by the same."""


@torch.no_grad()
def condition_changes(
    model: WanDiT, steps: Sequence[tuple[float, ...]], fps: int | None, *, of_head: bool = False
) -> tuple[float, ...]:
    """Relative L1 change of e0 in each step, since the step before; the first is 0.

    `steps` has the times of each, of the chunk or of its latent frames. TeaCache's fits without kept steps are for e,
    the head's embedding (`of_head`).
    """
    changes, before = [0.0], None
    for times in steps:
        now = model.embed_condition(PassCondition(times=times, fps=fps))[0 if of_head else 1]
        if before is not None:
            changes.append(((now - before).abs().mean() / before.abs().mean()).item())
        before = now
    return tuple(changes)
