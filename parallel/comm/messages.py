"""What ranks send each other: a header of fixed size, and a payload that may follow it.

A header has all that a stage must know: what to run, which changes of the KV to make first, the reuse flags that were
decided since the last header of the request, and the digest of all its flags. Its size is fixed so that its receive can
be posted before anyone knows what will come.

Everything is plain data: JSON, and the bytes of tensors as they are in memory. Nothing that is received is executed. An
unknown or missing field, or a value of another type, is an error: the ranks then run different versions of this code.
It does not know how messages travel.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from functools import cache
from itertools import cycle
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from engine.executor import Admission
from engine.video import WorkItem

HEADER_BYTES = 2048
_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_MAGIC = b"FLC2"
_FIXED = struct.Struct("<4sBBHQiHH8sI5I")
"""Magic, kind, dtype, dimensions, number, request, flags, item's bytes, digest, bytes of the next buffer, shape."""
_DIMENSIONS = 5
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 16
_SIMPLE = (int, str, float, bool, NoneType)

T = TypeVar("T")


class Kind(IntEnum):
    """What a message is about."""

    ADMIT = 1
    """Allocate for a request. The payload is an `Admission`."""
    ITEM = 2
    """Run a work item. The payload is the hidden states of the receiver's tokens, [1, S, D]."""
    VELOCITY = 3
    """A work item's result. The payload is [1, C, T, h, w] fp32."""
    RELEASE = 4
    """A request has ended: free what is held for it."""
    LEAVE = 5
    """The last message."""
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
    next_buffer: int = HEADER_BYTES  # bytes of the buffer in which the next message of the edge comes

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return math.prod(self.shape) * self.dtype.itemsize if self.shape else 0

    def write(self, buffer: Tensor, number: int) -> None:
        """Write it into the first HEADER_BYTES of a uint8 buffer on the CPU, as message `number` of its edge.

        Raises:
            ValueError: it does not fit.
        """
        item = b"" if self.item is None else _json(to_plain(self.item, []))
        fixed = _FIXED.pack(
            _MAGIC,
            self.kind,
            _DTYPES.index(self.dtype),
            len(self.shape),
            number,
            self.request,
            len(self.flags),
            len(item),
            self.digest,
            self.next_buffer,
            *self.shape,
            *(0,) * (_DIMENSIONS - len(self.shape)),
        )
        content = fixed + item + _pack_flags(self.flags)
        if len(content) > HEADER_BYTES:
            raise ValueError(f"a header of {len(content)} bytes does not fit into {HEADER_BYTES}")
        buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(content.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def read(cls, buffer: Tensor) -> Header:
        """Read it from a buffer that begins with it.

        Raises:
            ValueError: it is no header.
        """
        content = buffer[:HEADER_BYTES].numpy().tobytes()
        magic, kind, dtype, dimensions, number, request, flags, length, digest, following, *shape = _FIXED.unpack_from(
            content
        )
        start, end = _FIXED.size, _FIXED.size + length
        size = end + (flags + 3) // 4
        if magic != _MAGIC or dtype >= len(_DTYPES) or dimensions > _DIMENSIONS or size > HEADER_BYTES:
            raise ValueError("the bytes received are no header: sender and receiver are out of step")
        return cls(
            kind=Kind(kind),
            number=number,
            request=request,
            item=from_plain(WorkItem, json.loads(content[start:end])) if length else None,
            flags=_unpack_flags(content[end:size], flags),
            digest=digest,
            shape=tuple(shape[:dimensions]),
            dtype=_DTYPES[dtype],
            next_buffer=following,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A header with its payload. The payload's memory is free once nobody refers to it."""

    header: Header
    payload: Tensor | None
    nbytes: int  # of header and payload
    waited: float  # seconds that the receiver waited for it


def pack_admit(admission: Admission) -> Tensor:
    """As a payload, uint8 [bytes]: the length of a JSON text, the text, and tensors at multiples of 16 bytes."""
    tensors: list[Tensor] = []
    text = _json(to_plain(admission, tensors))
    parts = [_LENGTH.pack(len(text)) + text]
    parts += [one.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for one in tensors]
    return _as_payload(b"".join(part.ljust(_aligned(len(part)), b"\0") for part in parts))


def unpack_admit(payload: Tensor) -> Admission:
    """From a payload; tensors are on the CPU.

    Raises:
        ValueError: it is no `Admission`.
    """
    (length,) = _LENGTH.unpack(payload[: _LENGTH.size].numpy().tobytes())
    end = _LENGTH.size + length
    text = payload[_LENGTH.size : end].numpy().tobytes()
    return from_plain(Admission, json.loads(text), payload[_aligned(end) :])


def pack_json(values: Any) -> Tensor:
    """JSON values as a payload, uint8 [bytes]."""
    return _as_payload(_json(values))


def unpack_json(payload: Tensor | None) -> Any:
    """From a payload."""
    if payload is None:
        raise ValueError("the message has no payload")
    return json.loads(payload.numpy().tobytes())


def to_plain(value: Any, tensors: list[Tensor]) -> Any:
    """A dataclass as JSON values, by field name.

    Args:
        value: a dataclass of numbers, strings, tuples, tensors, None and other such dataclasses.
        tensors: its tensors are appended; in their place stand their dtype, shape and place among the bytes of all.
    """
    kind: Any = type(value)
    if kind in _SIMPLE:
        return value
    types = _field_types(kind)
    if types is not None:
        return {name: to_plain(getattr(value, name), tensors) for name in types}
    if kind is tuple:
        return [to_plain(one, tensors) for one in value]
    place = sum(_aligned(before.nbytes) for before in tensors)
    tensors.append(value)
    return {"dtype": _DTYPES.index(value.dtype), "shape": list(value.shape), "place": place}


def from_plain(kind: type[T], value: Any, data: Tensor | None = None) -> T:
    """The inverse of `to_plain`.

    Args:
        kind: the dataclass.
        value: JSON values.
        data: the bytes of its tensors, uint8, on the CPU.

    Raises:
        ValueError: a field is unknown, missing or of another type.
    """
    read: Callable[[Any], _Reader] = _reader
    made = read(kind)(value, data)
    assert isinstance(made, kind)
    return made


_Reader = Callable[[Any, Tensor | None], Any]


@cache
def _reader(kind: Any) -> _Reader:
    """Checks and converts JSON values of a type; made once for each type, since headers are read often."""
    types, origin, arguments = _field_types(kind), get_origin(kind), get_args(kind)
    if types is not None:
        return _dataclass_reader(kind, {name: _reader(one) for name, one in types.items()})
    if origin is tuple:
        readers = [_reader(one) for one in arguments if one is not Ellipsis]
        return _tuple_reader(kind, readers, repeats=arguments[-1] is Ellipsis)
    if origin is Union or origin is UnionType:
        (some,) = (_reader(one) for one in arguments if one is not NoneType)
        return lambda value, data: None if value is None else some(value, data)
    if kind is Tensor:
        return _read_tensor
    accepted = (int, float) if kind is float else (kind,)

    def read(value: Any, data: Tensor | None) -> Any:
        if type(value) in accepted or (origin is Literal and value in arguments):
            return value
        raise _refused(value, kind)

    return read


def _dataclass_reader(kind: Any, readers: Mapping[str, _Reader]) -> _Reader:
    def read(value: Any, data: Tensor | None) -> Any:
        if type(value) is not dict or value.keys() != readers.keys():
            raise _refused(value, kind)
        return kind(**{name: reader(value[name], data) for name, reader in readers.items()})

    return read


def _tuple_reader(kind: Any, readers: Sequence[_Reader], *, repeats: bool) -> _Reader:
    def read(value: Any, data: Tensor | None) -> Any:
        if type(value) is not list or (len(value) != len(readers) and not repeats):
            raise _refused(value, kind)
        return tuple([reader(one, data) for reader, one in zip(cycle(readers), value)])

    return read


def _read_tensor(value: Any, data: Tensor | None) -> Tensor:
    if data is None or not isinstance(value, dict) or value.keys() != {"dtype", "shape", "place"}:
        raise _refused(value, Tensor)
    dtype, shape, start = _DTYPES[value["dtype"]], value["shape"], value["place"]
    return data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape).clone()


def _refused(value: Any, kind: Any) -> ValueError:
    return ValueError(f"{str(value)[:80]} was received in place of {getattr(kind, '__name__', kind)}")


@cache
def _field_types(kind: Any) -> Mapping[str, Any] | None:
    """Types of a dataclass's fields by name; None for any other type."""
    if not is_dataclass(kind):
        return None
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _json(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def _as_payload(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pack_flags(flags: tuple[int, ...]) -> bytes:
    """Four to a byte."""
    packed = bytearray((len(flags) + 3) // 4)
    for index, flag in enumerate(flags):
        packed[index // 4] |= flag << 2 * (index % 4)
    return bytes(packed)


def _unpack_flags(packed: bytes, count: int) -> tuple[int, ...]:
    return tuple(packed[index // 4] >> 2 * (index % 4) & 3 for index in range(count))
