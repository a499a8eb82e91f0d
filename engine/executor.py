"""Runs work items on the layers that are held here: all of a model, or one stage of it.

It knows KV buffers and captions of the requests that are admitted; it does not know why an item is run or what comes
next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kv.buffer import KVBuffer
from engine.video import Work, WorkItem
from models.protocols import CaptionTable, KVView, VideoModel


class TokenShare(Protocol):
    """Which of a chunk's tokens are computed here, where several processes share the layers."""

    @property
    def tokens(self) -> slice:
        """The tokens."""

    def view(self, inner: KVView) -> KVView:
        """What these tokens attend to, if `inner` holds the heads that are attended with here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What an executor holds for one request."""

    kv: KVBuffer  # its KV buffers
    captions: CaptionTable  # its texts, on the model's device
    grid: tuple[int, int, int]  # latent (T, h, w) of a chunk
    share: TokenShare | None = None  # the tokens that are computed here; None for all


class Executor(Protocol):
    """Where work items are run."""

    def admit(self, request: int, admission: Admission) -> None:
        """Take a request in; its buffers are already allocated."""

    def release(self, request: int) -> None:
        """Let go of a request's buffers."""

    def run(self, work: Work) -> Tensor:
        """Run one item; the velocity [1, C, T, h, w] fp32."""


class Stage:
    """The layers that are held here and the KV of the requests that are in flight."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model
        self._admitted: dict[int, Admission] = {}

    def admit(self, request: int, admission: Admission) -> None:
        """Take a request in; its buffers are already allocated."""
        self._admitted[request] = admission

    def release(self, request: int) -> None:
        """Let go of a request's buffers."""
        self._admitted.pop(request, None)

    def admitted(self, request: int) -> Admission:
        """What is held for a request."""
        return self._admitted[request]

    @torch.no_grad()
    def change(self, item: WorkItem) -> None:
        """Make the changes to the KV that come before an item."""
        for op in item.before:
            self._admitted[item.request].kv.apply(op)

    @torch.no_grad()
    def forward(self, item: WorkItem, hidden: Tensor) -> Tensor:
        """Run the layers over hidden states [1, S, D] of an item's tokens, after `change`."""
        admitted = self._admitted[item.request]
        what, kv, share = item.what, admitted.kv, admitted.share
        asks = item.step is not None  # the next compression asks with the queries of what was denoised last
        view: KVView
        if what.isolated:
            view = kv.isolated_view()
        else:
            view = kv.view(what.branch, item.chunk, item.keys_from, asks=asks)
        caption = admitted.captions.get(what.caption, item.chunks_left)
        first_frame = item.chunk * admitted.grid[0]
        if share is None:
            return self.model.layers(hidden, what.condition, caption, first_frame, admitted.grid, view)
        return self.model.layers(
            hidden, what.condition, caption, first_frame, admitted.grid, share.view(view), tokens=share.tokens
        )


class LocalExecutor(Stage):
    """A whole model: embed, run the layers, read the velocity out."""

    @torch.no_grad()
    def run(self, work: Work) -> Tensor:
        """Run one item; the velocity [1, C, T, h, w] fp32."""
        self.change(work.item)
        hidden = self.forward(work.item, self.model.patches(work.x))
        return self.model.velocity(hidden, self.admitted(work.item.request).grid)
