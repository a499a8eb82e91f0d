"""Messages between two ranks: one `Outbox` and one `Inbox` for each direction.

Headers go over gloo, so that a rank knows what comes without touching its GPU; payloads go over a `Wire`, which is gloo
on CPUs and NCCL on GPUs. A receive of the next header is always posted, and that of a payload as soon as its header is
there, so data moves while a rank computes. Messages of a direction are numbered by their tags and cannot overtake each
other. An inbox that is full leaves the data with the sender, and nobody ever waits in order to send, so there is no
circle in which all wait.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.message import HEADER_BYTES, Header, Kind, Message

__all__ = ["BufferPool", "GlooWire", "Inbox", "Outbox", "Pending", "Wire"]

_POLL = 0.25  # seconds between two looks at whether somebody has failed
_TAGS = 1 << 28
OnError = Callable[[int, Exception], None]


class Pending(Protocol):
    """A transfer that was begun."""

    def wait(self) -> None:
        """Block until it is done."""


class Wire(Protocol):
    """Moves tensors between this rank and a peer, in one direction."""

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to send; the tensor must stay as it is until that is done."""

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to receive into a tensor."""


class _GlooPending:
    def __init__(self, work: dist.Work, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self) -> None:
        self._work.wait()


class GlooWire:
    """Tensors in host memory over gloo."""

    def __init__(self, peer: int) -> None:
        self._peer = peer

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to send."""
        work = dist.isend(tensor, self._peer, tag=tag)
        assert work is not None
        return _GlooPending(work, tensor)

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """Begin to receive."""
        work = dist.irecv(tensor, self._peer, tag=tag)
        assert work is not None
        return _GlooPending(work, tensor)


class BufferPool:
    """Tensors that are used again; `take` waits while `depth` of them are out."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self._device = device
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self._lock = threading.Lock()
        self._left = threading.Semaphore(depth)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with any content."""
        self._left.acquire()
        with self._lock:
            if (shape, dtype) not in self._free:
                self._free = {}  # another size: let the old ones go
            free = self._free.get((shape, dtype))
            tensor, read = free.pop() if free else (None, None)
        if tensor is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        if read is not None:
            read.synchronize()
        return tensor

    def give(self, tensor: Tensor) -> None:
        """Hand a tensor back; on a GPU, once what was launched so far has read it."""
        read = None
        if tensor.device.type == "cuda":
            read = torch.cuda.Event()
            read.record()
        with self._lock:
            self._free.setdefault((tuple(tensor.shape), tensor.dtype), []).append((tensor, read))
        self._left.release()


class Outbox:
    """Sends to one peer. `send` returns at once; a thread waits for what is under way and then lets go of it.

    Args:
        peer: rank.
        wire: moves payloads.
        on_error: told in the thread if a transfer fails.
    """

    def __init__(self, peer: int, wire: Wire, on_error: OnError) -> None:
        self.peer = peer
        self.sent_bytes = 0
        """Bytes handed over so far."""
        self._headers, self._payloads = GlooWire(peer), wire
        self._on_error = on_error
        self._number = 0
        self._spare: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._under_way: queue.SimpleQueue[tuple[Tensor, list[Pending]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name=f"outbox to rank {peer}", daemon=True)
        self._thread.start()

    def send(self, header: Header, payload: Tensor | None = None) -> None:
        """Send a message; the payload must be contiguous and must not be changed any more."""
        try:
            buffer = self._spare.get_nowait()
        except queue.Empty:
            buffer = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        if payload is not None:
            header = replace(header, shape=tuple(payload.shape), dtype=payload.dtype)
        header.write(buffer, self._number)
        tag = 2 * self._number % _TAGS
        self._number += 1
        pending = [self._headers.send(buffer, tag)]
        self.sent_bytes += HEADER_BYTES
        if payload is not None and payload.numel():
            wire = self._headers if payload.device.type == "cpu" else self._payloads
            pending.append(wire.send(payload, tag + 1))
            self.sent_bytes += payload.nbytes
        self._under_way.put((buffer, pending))

    def close(self, timeout: float) -> None:
        """Wait until everything is sent."""
        self._under_way.put(None)
        self._thread.join(timeout)

    def _wait(self) -> None:
        try:
            while (sent := self._under_way.get()) is not None:
                buffer, pending = sent
                for one in pending:
                    one.wait()
                self._spare.put(buffer)
        except RuntimeError as error:
            self._on_error(self.peer, error)


class Inbox:
    """Receives from one peer.

    Args:
        peer: rank.
        wire: moves payloads.
        device: where payloads of items are put.
        on_error: told in the thread if a transfer fails.
        check: raises if somebody has failed; called while waiting.
        depth: how many payloads of items are held before the sender has to keep the rest; None for no limit.
    """

    def __init__(
        self,
        peer: int,
        wire: Wire,
        *,
        device: torch.device,
        on_error: OnError,
        check: Callable[[], None],
        depth: int | None,
    ) -> None:
        self.peer = peer
        self._headers, self._payloads = GlooWire(peer), wire
        self._on_error, self._check, self._device = on_error, check, device
        self._pool = None if depth is None else BufferPool(device, depth)
        self._arrived: queue.SimpleQueue[tuple[Header, Tensor | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._receive, name=f"inbox from rank {peer}", daemon=True)
        self._thread.start()

    def poll(self) -> Message | None:
        """The next message if it is there."""
        try:
            return self._message(*self._arrived.get_nowait(), waited=0.0)
        except queue.Empty:
            return None

    def take(self) -> Message:
        """The next message.

        Raises:
            GangError: somebody has failed meanwhile.
        """
        began = time.perf_counter()
        self._check()
        while True:
            try:
                arrived = self._arrived.get(timeout=_POLL)
            except queue.Empty:
                self._check()
                continue
            return self._message(*arrived, waited=time.perf_counter() - began)

    def done(self, message: Message) -> None:
        """A message's payload is not needed any more."""
        if self._pool is not None and message.header.kind is Kind.ITEM and message.payload is not None:
            self._pool.give(message.payload)

    def close(self, timeout: float) -> None:
        """Wait for the thread, which ends after the last message."""
        self._thread.join(timeout)

    @staticmethod
    def _message(header: Header, payload: Tensor | None, *, waited: float) -> Message:
        size = HEADER_BYTES + (0 if payload is None else payload.nbytes)
        return Message(header=header, payload=payload, nbytes=size, waited=waited)

    def _receive(self) -> None:
        try:
            buffers = [torch.zeros(HEADER_BYTES, dtype=torch.uint8) for _ in range(2)]
            number = 0
            coming = self._headers.receive(buffers[0], 0)
            while True:
                coming.wait()
                header = Header.read(buffers[number % 2])
                if header.number != number:
                    raise RuntimeError(f"message {header.number} came in place of message {number}")
                tag = 2 * number % _TAGS
                number += 1
                if header.kind is not Kind.LEAVE:
                    coming = self._headers.receive(buffers[number % 2], 2 * number % _TAGS)
                self._arrived.put((header, self._receive_payload(header, tag + 1)))
                if header.kind is Kind.LEAVE:
                    return
        except (RuntimeError, ValueError) as error:
            self._on_error(self.peer, error)

    def _receive_payload(self, header: Header, tag: int) -> Tensor | None:
        if not header.shape:
            return None
        if header.kind is Kind.ITEM and self._pool is not None:
            payload = self._pool.take(header.shape, header.dtype)
        else:
            on_device = header.kind in (Kind.ITEM, Kind.VELOCITY)
            payload = torch.empty(header.shape, dtype=header.dtype, device=self._device if on_device else "cpu")
        if payload.numel():
            wire = self._headers if payload.device.type == "cpu" else self._payloads
            wire.receive(payload, tag).wait()
        return payload
