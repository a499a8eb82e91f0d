"""A long video of a family whose times and positions have an end: one run after the other, each from the last latents
of the one before. Nothing else is kept, so memory does not grow with the video.

It knows neither how a run is carried out nor what becomes of its chunks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.progress import Whole
from engine.request import Encoded, Request, Span, spans
from models.protocols import Sampling


class Course:
    """How far a video is in its spans; most have one."""

    def __init__(self, sampling: Sampling, request: Request, encoded: Encoded) -> None:
        given = 0 if encoded.prefix is None else encoded.prefix.shape[2]
        self._encoded, self._spans, self._at = encoded, spans(sampling, request, given), 0
        self._chunks, self._tail = request.chunks, Tensor()
        self._ticks = [(span.chunks - 1) * sampling.stagger + sampling.num_steps for span in self._spans]
        self._overlap = sampling.overlap * sampling.chunk_width

    @property
    def span(self) -> Span:
        """The present one."""
        return self._spans[self._at]

    @property
    def last(self) -> bool:
        """No other comes after it."""
        return self._at == len(self._spans) - 1

    @property
    def whole(self) -> Whole:
        """The video, for those who watch the present span."""
        return Whole(chunks=self._chunks, ticks=sum(self._ticks), before=sum(self._ticks[: self._at]))

    def change_text(self, chunk: int | None, text: Tensor) -> None:
        """As `CaptionTable.with_text`, for the spans to come."""
        self._encoded = replace(self._encoded, captions=self._encoded.captions.with_text(chunk, text))

    def finished(self, latents: Tensor) -> None:
        """Take note of finished latents [1, C, t, h, w], in order."""
        if not self.last:
            self._tail = torch.cat([self._tail, latents], dim=2)[:, :, -self._overlap :] if len(self._tail) else latents

    def go_on(self, dtype: torch.dtype) -> Encoded:
        """Turn to the next span: the request as the model reads it there, which goes on from latents in that dtype."""
        self._at, prefix = self._at + 1, self._tail[:, :, -self._overlap :].to(dtype)
        captions = self._encoded.captions
        later = tuple((chunk - self.span.begins, text) for chunk, text in captions.later)
        return replace(self._encoded, prefix=prefix, captions=replace(captions, later=later))
