"""Puts the rows that one layer attends to side by side, where they lie in several places or in host memory.

Attention reads one slice. `join` copies the pieces into it, for one layer at a time. With `offload` pieces in host
memory come by way of a second place: while a layer attends, `fetch` copies those of the layer that comes next, so that
no more than two layers' clean rows are on the device. On a CPU the same copies are made at once.

On a GPU three orders must hold, since the host queues all of this long before it is done:

1. What `fetch` overwrites was read: the copies' stream waits for `read`, which the compute stream passes after it has
   copied the rows on. It is first passed when the memory is allocated, as kernels that read what was there before may
   still be queued. It waits for nothing later, or a copy would wait for the layers that it is to run beside.
2. What `join` reads has come: the compute stream waits for `arrived`.
3. Host memory is written, read and written again on the copies' stream alone, so in order. `to_host` waits for all that
   the compute stream was given, which has made the rows, and the compute stream waits for it, as it moves other rows
   there next. The host itself reads that memory after `settle` only.

PyTorch's allocators see to the rest: pinned memory is not handed out again before its copies are done, nor is memory of
the device that `record_stream` has named.

Shapes: n rows, G key heads, d head size.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from engine.kv.layout import KVPlan
from models.protocols import KVGeometry


class _Mark:
    """A point in the work of one stream that another waits for."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._event = torch.cuda.Event() if on_gpu else None

    def passed(self) -> None:
        """The present stream comes to it after what it was given so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """The present stream goes on once the mark is passed; if it was never set, at once."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Staging:
    """The places where rows are put together, of one video; `plan` says of which size, and whether with host memory."""

    def __init__(self, plan: KVPlan, geometry: KVGeometry) -> None:
        on_gpu = plan.offload and geometry.device.type == "cuda"
        whole, ahead = plan.staging_rows()
        shape = geometry.key_heads, geometry.head_size
        self._whole = torch.empty((2, whole, *shape), dtype=geometry.dtype, device=geometry.device)
        self._ahead = torch.empty((2, ahead, *shape), dtype=geometry.dtype, device=geometry.device)
        self._stream = torch.cuda.Stream(geometry.device) if on_gpu else None
        self._read, self._arrived = _Mark(on_gpu=on_gpu), _Mark(on_gpu=on_gpu)
        self._fetched: object = None  # whose rows are on their way
        self._offload = plan.offload
        if self._stream is not None:
            self._ahead.record_stream(self._stream)
        self._read.passed()

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._whole.nbytes + self._ahead.nbytes

    def fetch(self, key: object, pieces: Sequence[Tensor]) -> None:
        """Begin to copy pieces [2, n, G, d] from host memory, which `join` is given next with the same key."""
        if not self._offload:
            return
        with self._copying():
            self._read.wait()
            _fill(self._ahead, pieces)
            self._arrived.passed()
        self._fetched = key

    def join(self, key: object, pieces: Sequence[Tensor], own: Tensor) -> Tensor:
        """The pieces, and behind them rows [2, n, G, d] on the device, in one tensor, until the next `join`."""
        if self._offload:
            if self._fetched != key:
                self.fetch(key, pieces)
            self._arrived.wait()
            self._fetched = None
            pieces = [self._ahead[:, : sum(piece.shape[1] for piece in pieces)]]
        rows = _fill(self._whole, [*pieces, own])
        self._read.passed()
        return self._whole[:, :rows]

    def to_host(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy rows [2, n, G, d] on the device, the second of each two, to host memory."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with self._copying():
            for target, source in copies:
                _copy(target, source)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def settle(self) -> None:
        """Wait until all copies are done, so that the host may read."""
        if self._stream is not None:
            self._stream.synchronize()

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _fill(whole: Tensor, pieces: Iterable[Tensor]) -> int:
    """Copy pieces to the front, one behind the other; gives their rows."""
    rows = 0
    for piece in pieces:
        _copy(whole[:, rows : rows + piece.shape[1]], piece)
        rows += piece.shape[1]
    return rows


def _copy(target: Tensor, source: Tensor) -> None:
    """Keys and values by themselves: what is not contiguous would go through memory that is not pinned."""
    for to, part in zip(target, source, strict=True):
        to.copy_(part, non_blocking=True)
