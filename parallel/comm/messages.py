"""What ranks send each other: a header of fixed size, and a payload that may follow it.

A header has all that a stage must know: what to run, which changes of the KV to make first, the reuse flags that were
decided since the last header of the request, and the digest of all its flags. Its size is fixed so that its receive can
be posted before anyone knows what will come.

Everything is plain data: JSON, and the bytes of tensors as they are in memory. Nothing that is received is executed. An
unknown or missing field, or a value of another type, is an error: the ranks then run different versions of this code.
It does not know how messages travel.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.kv.layout import KVPlan
from engine.request import Admission
from engine.schedule import Schedule
from engine.video import WorkItem
from models.protocols import CaptionTable

HEADER_BYTES = 2048
_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_MAGIC = b"FLC4"
_PROOF_BYTES = 16
_FIXED = struct.Struct("<4sBBHQihHH8s16sI5I")
"""Magic, kind, dtype, dimensions, number, request, not_finite, flags, item's bytes, two digests, next buffer, shape."""
_CONTENT_BYTES = HEADER_BYTES - _PROOF_BYTES
_DIMENSIONS = 5
_PLAIN = ("video", "schedule", "kv", "grid", "checkpoint", "hidden")  # fields of an admission without tensors
_OPTIONAL = ("counters", "image")  # tensors of the captions that may be absent
_LATER = "later-"  # in front of the chunk that is the first to see a text
T = TypeVar("T")


class Kind(IntEnum):
    """What a message is about."""

    ADMIT = 1  # allocate for a request; the payload is an `Admission`
    ITEM = 2  # run a work item; the payload is the hidden states of the receiver's tokens, [1, S, D]
    VELOCITY = 3  # a work item's result; the payload is [1, C, T, h, w] fp32
    RELEASE = 4  # a request has ended: free what is held for it
    LEAVE = 5  # the last message
    CHECKPOINT = 6  # take a snapshot of a request and begin to write it; the payload is the folder, as JSON
    TEXT = 7  # chunks of a request that have not entered see another text; the payload is of `pack_text`


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The header of a message."""

    kind: Kind  # what it is about
    number: int = 0  # messages of an edge are counted from 0
    request: int = -1  # whose it is; -1 for none
    item: WorkItem | None = None  # what to run, or what was run
    not_finite: int = -1  # the first rank of those so far at which something of the request was not; -1 for none
    flags: tuple[int, ...] = ()
    """Reuse flags since the last header of the request, as in `Work`."""
    digest: bytes = bytes(8)  # of all flags of the request so far
    shape: tuple[int, ...] = ()  # of the payload; empty for none
    dtype: torch.dtype = torch.uint8  # of the payload
    payload_digest: bytes = bytes(16)  # of a payload that is more than numbers: it is read
    next_buffer: int = HEADER_BYTES  # bytes of the buffer in which the next message of the edge comes

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return math.prod(self.shape) * self.dtype.itemsize if self.shape else 0

    def write(self, buffer: Tensor, number: int, key: bytes) -> None:
        """Write it into the start of a uint8 buffer on the CPU, as message `number` of its edge.

        Its last bytes prove that the sender knows the edge's `key`. A ValueError if it does not fit.
        """
        item = b"" if self.item is None else to_plain(self.item)
        dtype, dimensions = _DTYPES.index(self.dtype), len(self.shape)
        shape = (*self.shape, *(0,) * (_DIMENSIONS - dimensions))
        counts = (number, self.request, self.not_finite, len(self.flags), len(item))
        digests = self.digest, self.payload_digest
        fixed = _FIXED.pack(_MAGIC, self.kind, dtype, dimensions, *counts, *digests, self.next_buffer, *shape)
        content = fixed + item + _pack_flags(self.flags)
        if len(content) > _CONTENT_BYTES:
            raise ValueError(f"a header of {len(content)} bytes does not fit into {_CONTENT_BYTES}")
        content = content.ljust(_CONTENT_BYTES, b"\0")
        proven = bytearray(content + _proof(key, content))
        buffer[:HEADER_BYTES] = torch.frombuffer(proven, dtype=torch.uint8)

    @classmethod
    def read(cls, buffer: Tensor, key: bytes) -> Header:
        """Read it from a buffer that begins with it; a ValueError if it is none, or of somebody without the key."""
        proven = buffer[:HEADER_BYTES].numpy().tobytes()
        content, proof = proven[:_CONTENT_BYTES], proven[_CONTENT_BYTES:]
        if not hmac.compare_digest(proof, _proof(key, content)):
            raise ValueError("the bytes received are no header of this run")
        magic, kind, dtype, dimensions, number, request, *fields = _FIXED.unpack_from(content)
        not_finite, flags, length, digest, payload, following, *shape = fields
        start, end = _FIXED.size, _FIXED.size + length
        size = end + (flags + 1) // 2
        if magic != _MAGIC or dtype >= len(_DTYPES) or dimensions > _DIMENSIONS or size > _CONTENT_BYTES:
            raise ValueError("the bytes received are no header: sender and receiver are out of step")
        return cls(
            kind=Kind(kind),
            number=number,
            request=request,
            not_finite=not_finite,
            item=from_plain(WorkItem, content[start:end]) if length else None,
            flags=_unpack_flags(content[end:size], flags),
            digest=digest,
            payload_digest=payload,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _AdmissionForm:
    """An admission without its tensors."""

    video: int
    schedule: Schedule
    kv: KVPlan
    grid: tuple[int, int, int]
    checkpoint: str | None
    hidden: bool
    max_length: int | None


def pack_admit(admission: Admission) -> Tensor:
    """As a payload, uint8 [bytes]: safetensors of the captions, and of a JSON text."""
    captions = admission.captions
    form = _AdmissionForm(**{name: getattr(admission, name) for name in _PLAIN}, max_length=captions.max_length)
    tensors = {"form": _as_payload(to_plain(form)), "text": captions.text, "null": captions.null}
    tensors |= {f"{_LATER}{first}": text for first, text in captions.later}
    tensors |= {name: part for name in _OPTIONAL if (part := getattr(captions, name)) is not None}
    return _as_payload(save({name: part.cpu().contiguous() for name, part in tensors.items()}))


def unpack_admit(payload: Tensor) -> Admission:
    """From a payload, with tensors on the CPU; a ValueError if it is no `Admission`."""
    try:
        tensors = load(payload.numpy().tobytes())
        form = from_plain(_AdmissionForm, tensors.pop("form").numpy().tobytes())
        starts = sorted(int(name.removeprefix(_LATER)) for name in tensors if name.startswith(_LATER))
        later = tuple((first, tensors.pop(f"{_LATER}{first}")) for first in starts)
        captions = CaptionTable(**tensors, later=later, max_length=form.max_length)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the bytes received are no admission: {error}") from None
    return Admission(**{name: getattr(form, name) for name in _PLAIN}, captions=captions)


def pack_text(chunk: int | None, text: Tensor) -> Tensor:
    """A text [N, channels] and the first chunk that sees it, as a payload."""
    return _as_payload(save({"chunk": pack_json(chunk), "text": text.cpu().contiguous()}))


def unpack_text(payload: Tensor | None) -> tuple[int | None, Tensor]:
    """From a payload, with the text on the CPU."""
    if payload is None:
        raise ValueError("the message has no payload")
    tensors = load(payload.numpy().tobytes())
    return unpack_json(tensors["chunk"]), tensors["text"]


def pack_json(values: Any) -> Tensor:
    """JSON values as a payload, uint8 [bytes]."""
    return _as_payload(json.dumps(values).encode())


def unpack_json(payload: Tensor | None) -> Any:
    """From a payload."""
    if payload is None:
        raise ValueError("the message has no payload")
    return json.loads(payload.numpy().tobytes())


def to_plain(value: Any) -> bytes:
    """A dataclass of numbers, strings, tuples, dictionaries, None and other such dataclasses, as JSON by field name."""
    kind: Any = type(value)
    return _adapter(kind).dump_json(value)


def from_plain(kind: type[T], content: bytes) -> T:
    """The inverse of `to_plain`; a ValueError if a field is unknown, missing or of another type."""
    wanted: Any = kind
    adapter = _adapter(wanted)
    made: T = adapter.validate_json(content, strict=True)
    if adapter.dump_json(made) != content:
        raise ValueError(f"unknown fields were received in a {kind.__name__}: {content[:200]!r}")
    return made


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def payload_digest(payload: Tensor) -> bytes:
    """A digest of a payload on the CPU, for its header."""
    return hashlib.sha256(payload.numpy().tobytes()).digest()[:16]


def _proof(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")[:_PROOF_BYTES]


def _as_payload(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _pack_flags(flags: tuple[int, ...]) -> bytes:
    """Two to a byte."""
    packed = bytearray((len(flags) + 1) // 2)
    for index, flag in enumerate(flags):
        packed[index // 2] |= flag << 4 * (index % 2)
    return bytes(packed)


def _unpack_flags(packed: bytes, count: int) -> tuple[int, ...]:
    return tuple(packed[index // 2] >> 4 * (index % 2) & 15 for index in range(count))
