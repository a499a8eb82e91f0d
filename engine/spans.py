"""A long video of a family whose times and positions have an end: one run after the other, each from the last latents
of the one before. Nothing else is kept, so memory does not grow with the video.

It knows neither how a run is carried out nor what becomes of its chunks.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from engine.request import Encoded
from engine.schedule import Place, Timetable


class Course:
    """How far a video is in its spans; most have one."""

    def __init__(
        self,
        table: Timetable,  # of the video
        encoded: Encoded,  # the request, as it was read
        overlap: int,  # latent frames that a span hands over to the next; 0 for a family without an end
        *,
        quantum: int = 0,  # to begin with
        state: Mapping[str, Tensor] | None = None,  # of the checkpoint before that quantum
    ) -> None:
        self.table, self._encoded, self._overlap = table, encoded, overlap
        self.number, self.quantum = table.at(quantum)  # of the present span; the latter is counted within it
        held = state or {}
        self._prefix = held.get("prefix", encoded.prefix)
        self._tail = held.get("tail", encoded.prefix)

    @property
    def place(self) -> Place:
        """Where the present span begins."""
        return self.table.places[self.number]

    @property
    def last(self) -> bool:
        """No other comes after it."""
        return self.number == len(self.table.spans) - 1

    @property
    def encoded(self) -> Encoded:
        """The request as the model reads it in the present span."""
        captions, begins = self._encoded.captions, self.place.chunk
        later = tuple((chunk - begins, text) for chunk, text in captions.later)
        return replace(self._encoded, prefix=self._prefix, captions=replace(captions, later=later))

    def change_text(self, chunk: int | None, text: Tensor) -> None:
        """As `CaptionTable.with_text`, for the spans to come."""
        self._encoded = replace(self._encoded, captions=self._encoded.captions.with_text(chunk, text))

    def finished(self, latents: Tensor) -> None:
        """Take note of finished latents [1, C, t, h, w], in order."""
        if self._overlap:
            known = latents if self._tail is None else torch.cat([self._tail.to(latents), latents], dim=2)
            self._tail = known[:, :, -self._overlap :]

    def go_on(self, dtype: torch.dtype) -> None:
        """Turn to the next span, which goes on from latents in that dtype."""
        self.number, self.quantum = self.number + 1, 0
        self._prefix = self._tail.to(dtype) if self._overlap and self._tail is not None else None

    def state(self) -> dict[str, Tensor]:
        """What the rest of the video depends on, empty for a family without an end."""
        held = {"prefix": self._prefix, "tail": self._tail} if self._overlap else {}
        return {name: part for name, part in held.items() if part is not None}
