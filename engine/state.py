"""Everything that the next ticks of a video depend on, as plain values and tensors: what a checkpoint is made of.

States are valid between two ticks only, when no work is under way. They know nothing of files, and they do not grow
with the length of the video: finished chunks are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.work import KVOp

__all__ = ["RunState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The state of a `VideoRun`. Tensors are not copied: a run replaces them and never writes into them.

    Attributes:
        latents: of the chunks of the window [1, C, T, h, w] fp32.
        before: inputs of the tick before, which distances are taken from; the same shape.
        ops: changes of the KV that no work item has carried yet.
        leaving: chunks that were either retired or finished, and still have to be the other.
        policy: of reuse.
        memory: of reuse: (time, size, velocity) of the last computed steps of each chunk.
    """

    latents: Mapping[int, Tensor]
    before: Mapping[int, Tensor]
    ops: tuple[KVOp, ...]
    leaving: frozenset[int]
    policy: Mapping[str, float]
    memory: Mapping[int, Sequence[tuple[float, float, Tensor]]]
