"""Runs work items on a model that is held whole, in one process.

It knows KV buffers and captions of the requests that are admitted; it does not know why an item is run or what comes
next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kv import KVBuffer
from engine.run import Work
from engine.work import WorkItem
from models.family import CaptionTable, VideoModel

__all__ = ["Admission", "Executor", "LocalExecutor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What an executor holds for one request.

    Attributes:
        kv: its KV buffers.
        captions: its texts, on the model's device.
        grid: latent (T, h, w) of a chunk.
    """

    kv: KVBuffer
    captions: CaptionTable
    grid: tuple[int, int, int]


class Executor(Protocol):
    """Where work items are run."""

    def admit(self, request: int, admission: Admission) -> None:
        """Take a request in; its buffers are already allocated."""

    def release(self, request: int) -> None:
        """Let go of a request's buffers."""

    def run(self, work: Work) -> Tensor:
        """Run one item; the velocity [1, C, T, h, w] fp32."""


class LocalExecutor:
    """A whole model and the KV of the requests that are in flight."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model
        self._admitted: dict[int, Admission] = {}

    def admit(self, request: int, admission: Admission) -> None:
        """Take a request in; its buffers are already allocated."""
        self._admitted[request] = admission

    def release(self, request: int) -> None:
        """Let go of a request's buffers."""
        self._admitted.pop(request, None)

    @torch.no_grad()
    def run(self, work: Work) -> Tensor:
        """Run one item: make its changes to the KV, embed, run the layers, read the velocity out."""
        item, admitted = work.item, self._admitted[work.item.request]
        for op in item.before:
            admitted.kv.apply(op)
        hidden = self._layers(self.model.patches(work.x), item, admitted)
        return self.model.velocity(hidden, admitted.grid)

    def _layers(self, hidden: Tensor, item: WorkItem, admitted: Admission) -> Tensor:
        what, kv = item.what, admitted.kv
        asks = item.step is not None  # the next compression asks with the queries of what was denoised last
        view = kv.isolated_view() if what.isolated else kv.view(what.branch, item.chunk, item.keys_from, asks=asks)
        caption = admitted.captions.get(what.caption, item.chunks_left)
        first_frame = item.chunk * admitted.grid[0]
        return self.model.layers(hidden, what.condition, caption, first_frame, admitted.grid, view)
