"""The size of a request's KV buffers, as plain figures: every process that holds some layers allocates from the same.

It knows neither which layers are held nor how many of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.kv.buffer import Compression, KVBuffer
from engine.kv.layout import KVLayout
from engine.kv.selection import SelectionSettings
from models.attention import Attention
from models.protocols import KVGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class KVPlan:
    """What there is to allocate for a request."""

    chunk_tokens: int  # tokens of a chunk
    frame_tokens: int  # tokens of a latent frame
    clean_tokens: int  # size of the clean region
    window: int  # chunks of the window
    chunks: int  # of the whole video
    branches: int
    selection: SelectionSettings | None  # how the clean region is compressed; None drops its oldest rows

    def allocate(self, geometry: KVGeometry, attention: Attention) -> KVBuffer:
        """The buffers of the layers and heads of a geometry."""
        layout = KVLayout(
            chunk_tokens=self.chunk_tokens, clean_tokens=self.clean_tokens, window=self.window, chunks=self.chunks
        )
        compression = None
        if self.selection is not None:
            compression = Compression(
                settings=self.selection, query_heads=geometry.query_heads, frame_tokens=self.frame_tokens
            )
        return KVBuffer(layout, geometry, branches=self.branches, attention=attention, compression=compression)
