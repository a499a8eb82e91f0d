"""The messages between the controller and the ranks of a gang, and how they become bytes.

Plain data. A message is one of the dataclasses below or a list of them, and travels as JSON and the bytes of its
arrays: decoding makes nothing but those dataclasses, paths, numbers, texts and arrays.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoint.files import CheckpointConfig
from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.progress import Progress
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from engine.schedule import Schedule, Timetable
from models.errors import InputError
from parallel.cluster.scheduler import VideoSize

# ---- commands, from the controller to the leader


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoOrder:
    """A video to make: what a caller submits to the controller, and what the controller submits to a gang."""

    video: str  # its name
    request: Request
    size: VideoSize  # what it takes
    checkpoint: CheckpointConfig | None = None  # None begins from the start after a loss
    stored: int = 0  # chunks that the caller has already, from the first on; they are not handed out again
    priority: int = 0  # higher goes first
    reuse: ReuseSettings | None = None  # which steps are reused; None for what its gang was started with
    kv: KVSettings | None = None  # how much of the past is held; likewise
    watched: bool = False  # somebody wants to know of every tick
    confirmed: bool = False  # the caller says of chunks that they are stored; else asking for the next event does


@dataclass(frozen=True, kw_only=True, slots=True)
class PermitQuantum:
    """Let a quantum of a video begin."""

    video: str
    quantum: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelVideo:
    """Make no more of a video."""

    video: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangePrompt:
    """Make the chunks of a video from one on of another prompt; no quantum that lets one of them in is permitted."""

    video: str
    first: int  # counted as in a request's script
    prompt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTaken:
    """The caller has stored a chunk and all before it; a checkpoint that comes after them may be committed."""

    video: str
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Nothing more will come."""


Command = VideoOrder | PermitQuantum | CancelVideo | ChangePrompt | ChunkTaken | Finish

# ---- events, from the ranks to the controller, and from there to the caller


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStarted:
    """The process of a rank runs; the first message of every rank."""

    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GangEvent:
    """An event of a gang."""

    gang: str = ""  # its name; the controller fills it in


@dataclass(frozen=True, kw_only=True, slots=True)
class GangReady(GangEvent):
    """A gang has loaded its weights and waits for work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEvent(GangEvent):
    """An event of a video on a gang."""

    video: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted(VideoEvent):
    """A gang has begun a video."""

    number: int  # the gang's number of the video, which its failures name
    first: int  # chunk that will be handed out first; more than 0 after a checkpoint
    damage: tuple[str, ...] = ()  # a line for each damaged checkpoint that was passed over


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantumReady(VideoEvent):
    """A video asks for its next quantum."""

    quantum: int  # index


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantumDone(VideoEvent):
    """All chunks in the window have taken all steps of a quantum."""

    quantum: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressed(VideoEvent):
    """How far a video is."""

    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticked(VideoEvent):
    """What happened in a tick of a video that is watched."""

    tick: int  # index
    decisions: tuple[tuple[int, int, int], ...]  # since the tick before: chunk, step, value of the `Decision`
    kv_fill: float  # share of the KV buffer's rows in use
    kept: tuple[float, ...] | None  # share of each chunk's tokens that is held; None where no chunk has left the window


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChunkMade(VideoEvent):
    """A finished chunk."""

    index: int  # 0 for the first
    frames: NDArray[np.uint8]  # uint8 [F, H, W, 3]
    latents: NDArray[np.float32]  # fp32 [1, C, t, h, w]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDone(VideoEvent):
    """All chunks of a video were handed out."""

    computed: float  # chunk-steps that were computed, as a share of all
    kv_bytes: int  # size of its KV buffers on the leader
    kv_host_bytes: int = 0  # what they have in host memory beside it


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFailed(VideoEvent):
    """A video cannot be made, or is set aside. A gang that refuses one is well."""

    message: str
    disk: bool = False  # a file of it could not be written, as there may be no room for those of others either


@dataclass(frozen=True, kw_only=True, slots=True)
class GangLost(GangEvent):
    """A gang has failed; its videos go on elsewhere."""

    message: str  # why, in one line
    videos: tuple[str, ...]  # that it was making


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarted(GangEvent):
    """A gang is started again."""

    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GangDown(GangEvent):
    """A gang is not started again."""

    message: str


Forwarded = Admitted | Progressed | Ticked | VideoDone | VideoFailed
"""Events of a leader that the controller hands on as they are."""
SentByGang = GangReady | QuantumReady | QuantumDone | ChunkMade | Forwarded
Event = Forwarded | ChunkMade | GangReady | GangLost | Restarted | GangDown


def log_entry(event: GangEvent, seconds: float) -> dict[str, Any]:
    """An event as plain values, without frames and latents."""
    names = [
        one.name for one in fields(event) if one.name not in ("frames", "latents", "progress", "decisions", "kept")
    ]
    values = {name: getattr(event, name) for name in names}
    return {"seconds": seconds, "event": type(event).__name__, **values}


# ---- bytes

_PARTS = (
    *(Request, VideoSize, Timetable, Schedule, CheckpointConfig, Progress),
    *(ReuseSettings, KVSettings, SelectionSettings),
)
_SENT = (*get_args(Command), *get_args(SentByGang), RankStarted, *_PARTS)
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in _SENT}


class MessageError(Exception):
    """What was received is no message, or what was to be sent is none."""


def encode(message: object) -> tuple[bytes, list[NDArray[Any]]]:
    """A message as JSON, and the arrays in it, which are not copied if they are contiguous.

    A MessageError if something in it is neither a kind of message nor a plain value.
    """
    arrays: list[NDArray[Any]] = []
    plain = _plain(message, arrays)
    return json.dumps({"message": plain, "arrays": len(arrays)}).encode(), arrays


def decode(text: bytes, receive: Callable[[], bytes]) -> Any:
    """The message of which `encode` has made this; a list comes back as a tuple, arrays cannot be written to.

    `receive` receives the bytes of its next array. A MessageError if it is no message: an unknown kind, unknown or
    missing fields, or something else.
    """
    try:
        plain = json.loads(text)
        return _value(plain["message"], [receive() for _ in range(plain["arrays"])])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, InputError) as error:
        raise MessageError(f"this is no message: {error}") from error


def _plain(value: Any, arrays: list[NDArray[Any]]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part, arrays) for part in value]
    if isinstance(value, Path):
        return {"kind": "path", "path": str(value)}
    if isinstance(value, torch.Tensor):
        return {"kind": "tensor", "array": _plain(value.cpu().numpy(), arrays)}
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        shape = list(value.shape)
        return {"kind": "array", "number": len(arrays) - 1, "dtype": value.dtype.str, "shape": shape}
    if _KINDS.get(name := type(value).__name__) is not type(value):
        raise MessageError(f"a {name} cannot be sent")
    return {"kind": name, "fields": {one.name: _plain(getattr(value, one.name), arrays) for one in fields(value)}}


def _value(plain: Any, arrays: Sequence[bytes]) -> Any:
    if isinstance(plain, list):
        return tuple(_value(part, arrays) for part in plain)
    if not isinstance(plain, dict):
        return plain
    match plain["kind"]:
        case "path":
            return Path(plain["path"])
        case "tensor":
            return torch.from_numpy(_value(plain["array"], arrays).copy())
        case "array":
            dtype = np.dtype(plain["dtype"])
            if dtype.kind not in "biuf":
                raise ValueError(f"arrays of {dtype} are not sent")
            return np.frombuffer(arrays[plain["number"]], dtype).reshape(plain["shape"])
        case kind:
            return _KINDS[kind](**{name: _value(part, arrays) for name, part in plain["fields"].items()})
