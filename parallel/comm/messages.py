"""What ranks say to each other: a header of fixed size, and a tensor that may follow it.

A header tells all that a stage must know: what to run, which changes of the KV to make first, the reuse flags that were
decided since the last header of the request, and the digest of all its flags. Its size is fixed so that receives can
be posted before anyone knows what will come.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from engine.executor import Admission
from engine.video import WorkItem

HEADER_BYTES = 2048
_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_MAGIC = b"FLC1"
_FIXED = struct.Struct("<4sBBHQiHH8sI5I")
"""Magic, kind, dtype, dimensions, number, request, flags, body, digest, next frame, shape."""
_DIMENSIONS = 5


class Kind(IntEnum):
    """What a message is about."""

    ADMIT = 1
    """A request comes: allocate for it. The payload is an `Admission`."""
    ITEM = 2
    """Run a work item. The payload are the hidden states of the receiver's tokens, [1, S, D]."""
    VELOCITY = 3
    """A work item's result. The payload is [1, C, T, h, w] fp32."""
    RELEASE = 4
    """A request is over: let go of it."""
    LEAVE = 5
    """Nothing comes any more."""
    CHECKPOINT = 6
    """Take a snapshot of a request and begin to write it. The payload is the folder, as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The header of a message."""

    kind: Kind  # what it is about
    number: int = 0  # messages of an edge are counted from 0
    request: int = -1  # whose it is; -1 for none
    item: WorkItem | None = None  # what to run, or what was run
    flags: tuple[int, ...] = ()
    """Reuse flags since the last header of the request, in the order (tick, chunk): the values of `Decision`."""
    digest: bytes = bytes(8)  # of all flags of the request so far
    shape: tuple[int, ...] = ()  # of the payload; empty for none
    dtype: torch.dtype = torch.uint8  # of the payload
    next_frame: int = HEADER_BYTES  # bytes of the frame in which the next message of the edge comes

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return math.prod(self.shape) * self.dtype.itemsize if self.shape else 0

    def write(self, buffer: Tensor, number: int) -> None:
        """Write it into the first HEADER_BYTES of a uint8 buffer on the CPU, as message `number` of its edge.

        Raises:
            ValueError: it does not fit.
        """
        body = b"" if self.item is None else pickle.dumps(self.item, pickle.HIGHEST_PROTOCOL)
        shape = (*self.shape, *(0,) * (_DIMENSIONS - len(self.shape)))
        fixed = _FIXED.pack(
            _MAGIC,
            self.kind,
            _DTYPES.index(self.dtype),
            len(self.shape),
            number,
            self.request,
            len(self.flags),
            len(body),
            self.digest,
            self.next_frame,
            *shape,
        )
        content = fixed + body + _pack_flags(self.flags)
        if len(content) > HEADER_BYTES:
            raise ValueError(f"a header of {len(content)} bytes does not fit into {HEADER_BYTES}")
        buffer[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    @classmethod
    def read(cls, buffer: Tensor) -> Header:
        """Read it from a buffer that begins with it.

        Raises:
            ValueError: it is no header.
        """
        content = buffer[:HEADER_BYTES].numpy().tobytes()
        magic, kind, dtype, dimensions, number, request, flags, body, digest, frame, *shape = _FIXED.unpack_from(
            content
        )
        if magic != _MAGIC:
            raise ValueError("what came is no header: sender and receiver are out of step")
        start = _FIXED.size
        end = start + body
        return cls(
            kind=Kind(kind),
            number=number,
            request=request,
            item=pickle.loads(content[start:end]) if body else None,
            flags=_unpack_flags(content[end : end + (flags + 3) // 4], flags),
            digest=digest,
            shape=tuple(shape[:dimensions]),
            dtype=_DTYPES[dtype],
            next_frame=frame,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A header with its payload; who takes it in hands the payload back by `done` when it is not needed any more."""

    header: Header
    payload: Tensor | None
    buffer: Tensor | None  # what the payload is a part of and is to be used again; None if it is not
    nbytes: int  # of header and payload
    waited: float  # seconds for which it was waited for


def pack_admit(admit: Admission) -> Tensor:
    """As a payload, uint8 [bytes]. Tensors must be on the CPU."""
    file = io.BytesIO()
    torch.save(admit, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack_admit(payload: Tensor) -> Admission:
    """From a payload, which a rank of the same gang has packed."""
    loaded: Any = torch.load(io.BytesIO(payload.numpy().tobytes()), map_location="cpu", weights_only=False)
    assert isinstance(loaded, Admission)
    return loaded


def pack_values(values: Any) -> Tensor:
    """Plain JSON values as a payload, uint8 [bytes]."""
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def unpack_values(payload: Tensor | None) -> Any:
    """From a payload."""
    assert payload is not None
    return json.loads(payload.numpy().tobytes())


def _pack_flags(flags: tuple[int, ...]) -> bytes:
    """Four to a byte."""
    packed = bytearray((len(flags) + 3) // 4)
    for index, flag in enumerate(flags):
        packed[index // 4] |= flag << 2 * (index % 4)
    return bytes(packed)


def _unpack_flags(packed: bytes, count: int) -> tuple[int, ...]:
    return tuple(packed[index // 4] >> 2 * (index % 4) & 3 for index in range(count))
