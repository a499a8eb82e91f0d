"""What a model is given of an item besides hidden states. Each part is made once, and kept while items need it.

Modulations are those of a step's time, the same for all chunks. Texts and positions are of the chunks of the window:
chunks that see the same text share it.
"""

from functools import lru_cache

from torch import Tensor

from engine.request import Admission
from engine.video import WorkItem
from models.protocols import CaptionKind, CaptionTable, Modulation, Positions, TextKV, VideoModel

_MODULATIONS = 64


class PassInputs:
    """The inputs of one video's items, for the `tokens` of each chunk that are computed here."""

    def __init__(self, model: VideoModel, admission: Admission, tokens: slice) -> None:
        grid, self._model = admission.grid, model
        self._in_use = admission.kv.window + 1  # a finished chunk may have its clean pass beside

        @lru_cache(self._in_use)
        def positions(chunk: int) -> Positions:
            return model.positions(chunk * grid[0], grid, tokens)

        self._positions, self._modulation = positions, lru_cache(_MODULATIONS)(model.modulation)
        self._read(admission.captions)

    def _read(self, captions: CaptionTable) -> None:
        captions, model = captions.to(self._model.kv.device), self._model

        @lru_cache(self._in_use + 1)  # and there is the text of "no text"
        def text(kind: CaptionKind, chunk: int, chunks_left: int) -> TextKV:
            return model.text(captions.get(kind, chunk, chunks_left))

        self._captions, self._text = captions, text

    def change_text(self, chunk: int | None, text: Tensor) -> None:
        """As `CaptionTable.with_text`."""
        self._read(self._captions.with_text(chunk, text))

    def of(self, item: WorkItem) -> tuple[Modulation, TextKV, Positions]:
        """Modulation, text and positions of an item."""
        what = item.what
        seen = self._captions.first_like(what.caption, item.chunk, item.chunks_left)
        return self._modulation(what.condition), self._text(*seen), self._positions(item.chunk)
