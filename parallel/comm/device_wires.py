"""What carries tensors between GPUs: NCCL, or host memory where two ranks share a GPU.

Transfers run on a stream of their own, after what was launched before they began. `wait` blocks the calling thread, not
the GPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.channel import GlooWire, Pending


class _EventPending:
    def __init__(self, event: torch.cuda.Event, tensor: Tensor) -> None:
        self._event, self._tensor = event, tensor

    def wait(self) -> None:
        self._event.synchronize()


class NcclWire:
    """Tensors on GPUs over a communicator of two ranks that is used in one direction only."""

    def __init__(self, peer: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self._peer, self._group, self._device = peer, group, device
        self._stream = torch.cuda.Stream(device)

    def join(self, *, sends: bool) -> None:
        """Set the communicator up, which takes both sides at once."""
        one = torch.zeros(1, device=self._device)
        (self.send(one, 0) if sends else self.receive(one, 0)).wait()

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to send, after what this thread has launched."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return self._pending(dist.isend(tensor, self._peer, group=self._group), tensor)

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to receive; nothing that was launched may still use the tensor."""
        with torch.cuda.stream(self._stream):
            return self._pending(dist.irecv(tensor, self._peer, group=self._group), tensor)

    def _pending(self, work: dist.Work | None, tensor: Tensor) -> Pending:
        assert work is not None
        work.wait()  # makes the stream wait, not this thread
        event = torch.cuda.Event()
        event.record(self._stream)
        return _EventPending(event, tensor)


class _CopyPending:
    def __init__(self, pending: Pending, source: Tensor, target: Tensor) -> None:
        self._pending, self._source, self._target = pending, source, target

    def wait(self) -> None:
        self._pending.wait()
        if self._target is not self._source:
            self._target.copy_(self._source)
            torch.cuda.synchronize(self._target.device)


class HostWire:
    """Tensors on GPUs through host memory, over gloo."""

    def __init__(self, wire: GlooWire) -> None:
        self._wire = wire

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to send a copy."""
        return self._wire.send(tensor.cpu(), tag)

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to receive; the tensor is filled by `wait`."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        return _CopyPending(self._wire.receive(host, tag), host, tensor)
