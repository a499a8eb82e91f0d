"""Messages between two ranks: one `Outbox` and one `Inbox` for each direction.

A header goes over gloo, sent and received by a thread of its own. A payload goes by point-to-point operations of
`torch.distributed`, which are issued on the main thread: gloo between CPUs, NCCL between GPUs, in the same code.
Messages of a direction are numbered and cannot overtake each other. A full inbox leaves messages with the sender, and
nobody waits in order to send, so there is no circle in which all wait.

On a GPU a call only queues work on a stream, and the order of streams keeps memory safe. Why each rule holds is in
`docs/architecture.md`; a change here must keep them:

- Payloads are allocated, sent and received on the main thread alone. `_NextBuffer` lets the receive of the next payload
  not wait for the present item.
- A header is sent when its payload has been computed, by a thread that waits for an event of the compute stream.
- Between ranks that share a GPU, payloads go through host memory; the main thread makes the copies.

Between CPUs and through host memory, a payload that has the size of the one before, as nearly all have, travels in the
same buffer as its header: one transfer whose receive is posted ahead, not two. Each header says how large the next
buffer is.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from engine.video import WorkItem
from parallel.comm.messages import HEADER_BYTES, Header, Kind, Message, payload_digest
from parallel.health.timeouts import CHECK_SECONDS

_TAGS = 1 << 28
_DEVICE_KINDS = (Kind.ITEM, Kind.VELOCITY)
"""Messages whose payload is on the device, and nearly always of the same size."""
AHEAD = 2
"""Work items that are received ahead of the one that is computed."""
OnError = Callable[[int, BaseException], None]
OnSent = Callable[[float, WorkItem | None], None]


class GroupTransport:
    """Moves tensors to or from a peer, by point-to-point operations of a process group.

    `Work.wait` makes what the caller does next come after a transfer: on gloo the host waits, on NCCL the current
    stream. Until then the tensor must stay as it is. `peer` is its rank among all; `group` is of this rank and the
    peer, None for the default group, which is gloo's.
    """

    def __init__(self, peer: int, group: dist.ProcessGroup | None = None) -> None:
        self._peer, self._group = peer, group

    def send(self, tensor: Tensor, tag: int) -> Work:
        """Begin to send. NCCL knows no tags: there, operations match in the order in which they are issued."""
        return _begun(dist.isend(tensor, self._peer, group=self._group, tag=tag))

    def receive(self, tensor: Tensor, tag: int) -> Work:
        """Begin to receive."""
        return _begun(dist.irecv(tensor, self._peer, group=self._group, tag=tag))


def _begun(work: Work | None) -> Work:
    assert work is not None
    return work


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """How messages get from or to a peer."""

    peer: int  # rank
    key: bytes  # of this direction, which nobody else knows
    headers: GroupTransport  # in host memory
    payloads: GroupTransport | None  # between devices; None if payloads go through host memory as headers do
    device: torch.device  # of this rank

    def transport(self, header: Header) -> GroupTransport:
        """What moves a message's payload."""
        return self.headers if self.payloads is None or header.kind not in _DEVICE_KINDS else self.payloads

    def inlines(self, header: Header, buffer: int) -> bool:
        """Whether a message's payload is in the buffer of its header, of so many bytes. Both sides must agree."""
        wanted = self.payloads is None and header.kind in _DEVICE_KINDS
        return wanted and 0 < header.payload_bytes == buffer - HEADER_BYTES


def start_thread(name: str, run: Callable[[], None], link: Link, on_error: OnError) -> threading.Thread:
    """Run something in a thread that uses this rank's device, and a stream of its own there; report what ends it."""

    def guarded() -> None:
        try:
            if link.device.type == "cuda":
                torch.cuda.set_device(link.device)
                torch.cuda.set_stream(torch.cuda.Stream(link.device))
            run()
        except BaseException as error:  # noqa: BLE001 - the gang ends with it
            on_error(link.peer, error)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread


@dataclass(slots=True)
class _Outgoing:
    """A message on its way, and all that must live until it has gone."""

    buffer: Tensor
    tag: int
    item: WorkItem | None
    payload: Tensor | None = None  # not in the buffer
    work: Work | None = None  # that sends it
    ready: torch.cuda.Event | None = None  # when it has been computed


class Outbox:
    """Sends to one peer. `send` returns at once; a thread sends headers and waits until messages have gone.

    The thread calls `on_error` if it ends otherwise than by `close`, and `on_sent` with the time at which the sending
    of a work item began, once it has gone.
    """

    def __init__(self, link: Link, on_error: OnError, on_sent: OnSent | None = None) -> None:
        self._link, self._on_sent = link, on_sent
        self.sent_bytes = 0  # so far
        self._number, self._size = 0, HEADER_BYTES
        self._queue: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        self._thread = start_thread(f"outbox to rank {link.peer}", self._run, link, on_error)

    def send(self, header: Header, payload: Tensor | None = None) -> None:
        """Send a message; the payload must be contiguous and must not be changed any more. Main thread only."""
        size, next_size = HEADER_BYTES, self._size
        if payload is not None:
            if self._link.payloads is None:
                payload = payload.cpu()
            size += payload.nbytes
            header = replace(header, shape=tuple(payload.shape), dtype=payload.dtype)
            if header.kind not in _DEVICE_KINDS:
                header = replace(header, payload_digest=payload_digest(payload))
            if self._link.payloads is None and header.kind in _DEVICE_KINDS:
                next_size = size
        header = replace(header, next_buffer=next_size)
        message = _Outgoing(torch.empty(self._size, dtype=torch.uint8), 2 * self._number % _TAGS, header.item)
        header.write(message.buffer, self._number, self._link.key)
        if payload is not None and self._link.inlines(header, self._size):
            message.buffer[HEADER_BYTES:] = payload.flatten().view(torch.uint8)
        elif payload is not None and payload.numel():
            message.payload = payload
            if payload.device.type == "cuda":
                message.ready = torch.cuda.Event(blocking=True)
                message.ready.record()
            message.work = self._link.transport(header).send(payload, message.tag + 1)
        self.sent_bytes += max(size, len(message.buffer))
        self._number, self._size = self._number + 1, next_size
        self._queue.put(message)

    def close(self, timeout: float) -> None:
        """Wait until everything is sent, or for some seconds."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            if message.ready is not None:
                message.ready.synchronize()
            began = time.perf_counter()
            self._link.headers.send(message.buffer, message.tag).wait()
            if message.work is not None:
                message.work.wait()
                if message.ready is not None:
                    torch.cuda.current_stream().synchronize()  # this thread's, which waits for NCCL's
            if self._on_sent is not None and message.item is not None:
                self._on_sent(began, message.item)


class _NextBuffer:
    """Memory for the next payload, allocated before the present one is used: its receive need not wait for that."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._tensor = device, torch.empty(0)
        gpu = device.type == "cuda"
        self._free = torch.cuda.Event() if gpu else None  # all earlier uses of the memory have been computed
        self._stream = torch.cuda.Stream(device) if gpu else None  # the stream that a receive is ordered after

    def allocate(self, like: Tensor) -> None:
        """Allocate memory for a payload like one that was received, unless there is some."""
        if self._fits(tuple(like.shape), like.dtype):
            return
        self._tensor = torch.empty_like(like)
        if self._free is not None:
            self._free.record()

    def receive(self, header: Header, transport: GroupTransport, tag: int) -> tuple[Tensor, Work]:
        """Begin to receive a payload, into that memory if it fits."""
        if not self._fits(header.shape, header.dtype):
            tensor = torch.empty(header.shape, dtype=header.dtype, device=self._device)
            return tensor, transport.receive(tensor, tag)
        tensor, self._tensor = self._tensor, torch.empty(0)
        if self._stream is None or self._free is None:
            return tensor, transport.receive(tensor, tag)
        self._stream.wait_event(self._free)
        with torch.cuda.stream(self._stream):
            return tensor, transport.receive(tensor, tag)

    def _fits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return tuple(self._tensor.shape) == shape and self._tensor.dtype == dtype


class Inbox:
    """Receives from one peer. A thread receives headers; `receive` and `poll` belong to the main thread.

    The thread calls `on_error` if it ends otherwise than by the last message. `check` raises if a rank has failed, and
    is called while waiting. The sender has to keep what is more than `limit` messages; None for no limit.
    """

    def __init__(self, link: Link, on_error: OnError, check: Callable[[], None], *, limit: int | None) -> None:
        self._link, self._check, self._limit = link, check, limit
        self._room = None if limit is None else threading.Semaphore(limit + 1)  # one is being received
        self._arrived: queue.SimpleQueue[tuple[Header, Tensor]] = queue.SimpleQueue()
        self._begun: deque[tuple[Header, Tensor | None, Work | None]] = deque()
        """Headers that have arrived, their payloads, and what receives these unless they are in the header's buffer."""
        self._next = _NextBuffer(link.device)
        self._thread = start_thread(f"inbox from rank {link.peer}", self._run, link, on_error)

    @property
    def peer(self) -> int:
        """The rank that sends."""
        return self._link.peer

    def poll(self) -> Message | None:
        """The next message if its header has arrived."""
        self._begin_all()
        return self._finish(time.perf_counter()) if self._begun else None

    def receive(self) -> Message:
        """The next message; a GangError if a rank fails meanwhile.

        Receives of payloads behind it are begun, as far as their headers have arrived.
        """
        began = time.perf_counter()
        self._check()
        self._begin_all()
        while not self._begun:
            try:
                self._begin(*self._arrived.get(timeout=CHECK_SECONDS))
            except queue.Empty:
                self._check()
        return self._finish(began)

    def close(self, timeout: float) -> None:
        """Wait for the thread, which ends after the last message, or for some seconds."""
        self._thread.join(timeout)

    def _begin_all(self) -> None:
        """Begin to receive the payloads whose headers have arrived: the next one, and `limit` ahead of it."""
        while self._limit is None or len(self._begun) <= self._limit:
            try:
                self._begin(*self._arrived.get_nowait())
            except queue.Empty:
                return

    def _begin(self, header: Header, buffer: Tensor) -> None:
        payload, work, tag = None, None, 2 * header.number % _TAGS + 1
        if self._link.inlines(header, len(buffer)):
            payload = buffer[HEADER_BYTES:].view(header.dtype).view(header.shape)
        elif header.payload_bytes and self._link.payloads is not None and header.kind in _DEVICE_KINDS:
            payload, work = self._next.receive(header, self._link.payloads, tag)
        elif header.shape:
            payload = torch.empty(header.shape, dtype=header.dtype)
            work = self._link.headers.receive(payload, tag) if payload.numel() else None
        self._begun.append((header, payload, work))

    def _finish(self, began: float) -> Message:
        """The oldest message that was begun; waited for since a given time."""
        header, payload, work = self._begun.popleft()
        if self._room is not None:
            self._room.release()
        if work is not None:
            work.wait()
        if payload is not None and header.kind not in _DEVICE_KINDS:
            if payload_digest(payload) != header.payload_digest:
                raise RuntimeError(f"a payload that rank {self._link.peer} has not sent was received")
        elif payload is not None:
            payload = payload.to(self._link.device)
            if self._link.payloads is not None:
                self._next.allocate(payload)
        waited = time.perf_counter() - began
        return Message(header=header, payload=payload, nbytes=HEADER_BYTES + header.payload_bytes, waited=waited)

    def _run(self) -> None:
        number, size = 0, HEADER_BYTES
        while True:
            if self._room is not None:
                self._room.acquire()
            buffer = torch.empty(size, dtype=torch.uint8)
            self._link.headers.receive(buffer, 2 * number % _TAGS).wait()
            header = Header.read(buffer, self._link.key)
            if header.number != number:
                raise RuntimeError(f"message {header.number} was received in place of message {number}: out of step")
            self._arrived.put((header, buffer))
            if header.kind is Kind.LEAVE:
                return
            number, size = number + 1, header.next_buffer
