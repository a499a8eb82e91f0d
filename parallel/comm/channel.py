"""Messages between two ranks: one `Outbox` and one `Inbox` for each direction.

Headers go over gloo, so that a rank knows what comes without touching its GPU; payloads go over a `Wire`, which is gloo
on CPUs and NCCL on GPUs. A receive of the next header is always posted, and that of a payload as soon as its header is
there, so data moves while a rank computes. Messages of a direction are numbered by their tags and cannot overtake each
other. An inbox that is full leaves the data with the sender, and nobody ever waits in order to send, so there is no
circle in which all wait.

A header comes in a frame, and each header says how large the next frame is. On CPUs a frame holds the payload as well
if that has the size of the one before, as nearly all have: one transfer whose receive is posted ahead, not two.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.video import WorkItem
from parallel.comm.messages import HEADER_BYTES, Header, Kind, Message

_POLL = 0.25  # seconds between two looks at whether somebody has failed
_TAGS = 1 << 28
_LARGEST_FRAME = 4 << 20
"""Bytes; a larger payload is not copied into a frame, since one transfer less would not be worth it."""
_STEADY = (Kind.ITEM, Kind.VELOCITY)
"""Messages whose payload is on the device, and of the same size nearly always."""
OnError = Callable[[int, Exception], None]
OnSent = Callable[[float, WorkItem | None], None]


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


@dataclass(slots=True)
class _Sending:
    """What a thread has to send: a frame, a payload of its own in host memory, and a transfer that was begun."""

    frame: Tensor
    payload: Tensor | None
    pending: Pending | None
    item: WorkItem | None
    tag: int


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
    """Sends to one peer. `send` returns at once; a thread sends, one message after another, and waits for each to go.

    Args:
        peer: rank.
        wire: moves payloads.
        on_error: told in the thread if a transfer fails.
        on_sent: told in the thread since when an item was on its way, once it has gone; one at a time.
    """

    def __init__(self, peer: int, wire: Wire, on_error: OnError, on_sent: OnSent | None = None) -> None:
        self.peer = peer
        self.sent_bytes = 0
        """Bytes handed over so far."""
        self._host, self._wire = GlooWire(peer), wire
        self._on_error, self._on_sent = on_error, on_sent
        self._number, self._frame = 0, HEADER_BYTES
        self._spare: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._coming: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"outbox to rank {peer}", daemon=True)
        self._thread.start()

    def send(self, header: Header, payload: Tensor | None = None) -> None:
        """Send a message; the payload must be contiguous and must not be changed any more."""
        frame, size, next_frame = self._new_frame(), HEADER_BYTES, self._frame
        if payload is not None:
            size += payload.nbytes
            header = replace(header, shape=tuple(payload.shape), dtype=payload.dtype)
            if payload.device.type == "cpu" and header.kind in _STEADY and size <= _LARGEST_FRAME:
                next_frame = size
        header = replace(header, next_frame=next_frame)
        header.write(frame, self._number)
        if payload is not None and _framed(header, len(frame), payload.device):
            frame[HEADER_BYTES:] = payload.flatten().view(torch.uint8)
            payload = None
        pending = None
        tag = 2 * self._number % _TAGS
        if payload is not None and payload.numel() and payload.device.type != "cpu":
            pending, payload = self._wire.send(payload, tag + 1), None  # after what this thread has launched
        self.sent_bytes += max(size, len(frame))
        self._number, self._frame = self._number + 1, next_frame
        self._coming.put(_Sending(frame, payload, pending, header.item, tag))

    def close(self, timeout: float) -> None:
        """Wait until everything is sent."""
        self._coming.put(None)
        self._thread.join(timeout)

    def _new_frame(self) -> Tensor:
        try:
            while len(frame := self._spare.get_nowait()) != self._frame:
                pass  # of another size: let it go
        except queue.Empty:
            frame = torch.zeros(self._frame, dtype=torch.uint8)
        return frame

    def _run(self) -> None:
        try:
            while (one := self._coming.get()) is not None:
                began = time.perf_counter()
                pending = [self._host.send(one.frame, one.tag)]
                if one.payload is not None and one.payload.numel():
                    pending.append(self._host.send(one.payload, one.tag + 1))
                for transfer in pending:
                    transfer.wait()
                if one.pending is not None:
                    one.pending.wait()
                self._spare.put(one.frame)
                if self._on_sent is not None and one.item is not None:
                    self._on_sent(began, one.item)
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
        self._host, self._wire = GlooWire(peer), wire
        self._on_error, self._check, self._device = on_error, check, device
        self._frames = None if depth is None else BufferPool(torch.device("cpu"), depth + 1)  # one is posted
        self._pool = None if depth is None or device.type == "cpu" else BufferPool(device, depth)
        self._arrived: queue.SimpleQueue[tuple[Header, Tensor | None, Tensor | None]] = queue.SimpleQueue()
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
        if message.buffer is None:
            return
        pool = self._frames if message.buffer.device.type == "cpu" else self._pool
        if pool is not None:
            pool.give(message.buffer)

    def close(self, timeout: float) -> None:
        """Wait for the thread, which ends after the last message."""
        self._thread.join(timeout)

    @staticmethod
    def _message(header: Header, payload: Tensor | None, buffer: Tensor | None, *, waited: float) -> Message:
        size = HEADER_BYTES + header.payload_bytes
        return Message(header=header, payload=payload, buffer=buffer, nbytes=size, waited=waited)

    def _receive(self) -> None:
        try:
            number, frame, coming = 0, *self._post(0, HEADER_BYTES)
            while True:
                coming.wait()
                header = Header.read(frame)
                if header.number != number:
                    raise RuntimeError(f"message {header.number} came in place of message {number}")
                number += 1
                arrived, framed = frame, _framed(header, len(frame), self._device)
                if framed:
                    payload = arrived[HEADER_BYTES:].view(header.dtype).view(header.shape)
                    self._arrived.put((header, payload, arrived))  # before the next is posted, which may have to wait
                elif self._frames is not None:
                    self._frames.give(arrived)
                if header.kind is not Kind.LEAVE:
                    frame, coming = self._post(number, header.next_frame)
                if not framed:
                    self._arrived.put((header, *self._receive_payload(header, 2 * (number - 1) % _TAGS + 1)))
                if header.kind is Kind.LEAVE:
                    return
        except (RuntimeError, ValueError) as error:
            self._on_error(self.peer, error)

    def _post(self, number: int, size: int) -> tuple[Tensor, Pending]:
        """Begin to receive a frame of so many bytes."""
        if self._frames is None:
            frame = torch.empty(size, dtype=torch.uint8)
        else:
            frame = self._frames.take((size,), torch.uint8)
        return frame, self._host.receive(frame, 2 * number % _TAGS)

    def _receive_payload(self, header: Header, tag: int) -> tuple[Tensor | None, Tensor | None]:
        """A payload that comes by itself, and the buffer to hand back when it is not needed any more."""
        if not header.shape:
            return None, None
        if header.kind is Kind.ITEM and self._pool is not None:
            payload = buffer = self._pool.take(header.shape, header.dtype)
        else:
            on_device = header.kind in _STEADY
            payload = torch.empty(header.shape, dtype=header.dtype, device=self._device if on_device else "cpu")
            buffer = None
        if payload.numel():
            wire = self._host if payload.device.type == "cpu" else self._wire
            wire.receive(payload, tag).wait()
        return payload, buffer


def _framed(header: Header, frame: int, device: torch.device) -> bool:
    """Whether a message's payload stands in its frame; sender and receiver must come to the same."""
    return device.type == "cpu" and header.kind in _STEADY and 0 < header.payload_bytes == frame - HEADER_BYTES
