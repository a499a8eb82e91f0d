"""What a chunk attends to in the KV buffers of its request, layer by layer.

Shapes: N rows of a tensor, S tokens of a chunk, Q queries, G key heads, d head size, H query heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.kv.staging import Staging
from models.attention import Attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A compression that is still to be made in a layer; where rows stand afterwards is known."""

    pieces: Sequence[Tensor]  # where the rows of the clean region lie until then, the last on the device
    begin: int  # the row of the layout that the layer's tensor begins with until then
    used: int  # rows in all before it


@dataclass(slots=True)
class LayerKV:
    """One layer of one branch; with compression also who asks and whence tokens came."""

    kv: Tensor  # keys and values [2, N, G, d]
    queries: Tensor | None = None  # of the chunk that was denoised last [Q, H, d]
    origin: Tensor | None = None  # chunk of each row [N, G]
    host: Tensor | None = None  # clean keys and values in host memory, if they are there
    due: Due | None = None  # a compression that the next queries are to make

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(part.nbytes for part in (self.kv, self.queries, self.origin) if part is not None)


class SliceView:
    """A chunk's view: it writes its own rows and attends to one slice of the buffer that ends with them, behind the
    rows of each layer that lie elsewhere, if there are any."""

    def __init__(
        self,
        layers: dict[int, LayerKV],
        own: slice,
        span: slice,
        attention: Attention,
        *,
        asks: bool,
        compress: Callable[[int, Tensor], None] | None = None,  # makes a layer's compression that is due
        elsewhere: Mapping[int, Sequence[Tensor]] | None = None,  # by layer
        staging: Staging | None = None,  # puts those side by side with the slice, if there are any
    ) -> None:
        self._layers, self._own, self._span, self._attention, self._asks = layers, own, span, attention, asks
        self._compress, self._elsewhere, self._staging = compress, elsewhere or {}, staging
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._fetch(min(self._elsewhere, default=0))

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the chunk's keys and values [1, S, G, d] of a layer, once the rows that they go to are free."""
        if self._layers[layer].due is not None:
            self._waiting = k, v
            return
        kv = self._layers[layer].kv
        kv[0, self._own] = k[0]
        kv[1, self._own] = v[0]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [1, S, H, d] over the slice."""
        held = self._layers[layer]
        if self._waiting is not None:
            assert self._compress is not None
            self._compress(layer, q[0])
            waiting, self._waiting = self._waiting, None
            self.store(layer, *waiting)
        if self._asks and held.queries is not None:
            held.queries.copy_(q[0, -held.queries.shape[0] :])
        seen = held.kv[:, self._span]
        if self._staging is not None:
            seen = self._staging.join((self, layer), self._elsewhere[layer], seen)
            self._fetch(layer + 1)
        return self._attention(q, seen[0][None], seen[1][None])

    def _fetch(self, layer: int) -> None:
        """Have a layer's rows that lie elsewhere come, unless they are still to be written."""
        if self._staging is not None and layer in self._elsewhere and self._layers[layer].due is None:
            self._staging.fetch((self, layer), self._elsewhere[layer])


class IsolatedView:
    """A chunk that sees itself only and leaves nothing behind."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Hold the chunk's keys and values until its queries come."""
        self._kv = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [1, S, H, d] over the chunk itself."""
        return self._attention(q, *self._kv)
