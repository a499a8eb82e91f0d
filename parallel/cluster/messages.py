"""What the driver tells the ranks of a gang. Plain data; all but `AskHealth` are for the lead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint.files import CheckpointConfig
from engine.progress import Progress
from engine.request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoJob:
    """Begin a video."""

    video: str
    request: Request  # what to make
    checkpoint: CheckpointConfig | None = None  # where and how often to note how far it is; None for never
    stored: int = 0  # chunks that the driver has, from the first on


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
class ChunkTaken:
    """A chunk, and all before it, are in safe hands; checkpoints that are after it may be made whole."""

    video: str
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunksHeard:
    """So many chunks, of whatever videos, have come to the driver; there is room for others."""

    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Nothing more will come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskHealth:
    """Say what you are at."""


Command = VideoJob | PermitQuantum | CancelVideo | ChunkTaken | ChunksHeard | Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A gang has taken a video in."""

    video: str
    number: int  # what the gang calls it in its messages
    first: int  # chunk that will be handed out first; more than 0 after a checkpoint
    gang: str = ""  # its name; the driver fills it in


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A gang cannot make a video; the gang is well."""

    video: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantumReady:
    """A video asks for its next quantum."""

    video: str
    quantum: int  # index
    chunk: int | None  # that enters; None if none does any more
    slots: int  # of the gang that the quantum takes


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantumDone:
    """All chunks have taken all steps of a quantum."""

    video: str
    quantum: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressed:
    """How far a video is."""

    video: str
    done: int  # finished chunks
    chunks: int  # of the whole video
    share: float  # of all its steps that are done
    computed: float  # chunk-steps so far that were computed, as a share
    kv_bytes: int  # size of its KV buffers on the lead
    progress: Progress  # the same as the engine tells it
    gang: str = ""  # its name; the driver fills it in


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChunkMade:
    """A finished chunk."""

    video: str
    index: int  # 0 for the first
    frames: NDArray[np.uint8]  # uint8 [F, H, W, 3]
    latents: NDArray[np.float32]  # fp32 [1, C, t, h, w]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDone:
    """All chunks of a video were handed out."""

    video: str
    computed: float  # chunk-steps that were computed, as a share of all
    kv_bytes: int  # size of its KV buffers on the lead
    gang: str = ""  # its name; the driver fills it in


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFailed:
    """A video is set aside."""

    video: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GangReady:
    """A gang has loaded its weights and waits for work; the driver fills in its name."""

    gang: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class GangLost:
    """A gang has failed; its videos go on elsewhere."""

    gang: str
    message: str  # why, in one line
    videos: tuple[str, ...]  # that it was making


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarted:
    """A gang is started again."""

    gang: str
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GangDown:
    """A gang is not started again."""

    gang: str
    message: str


GangEvent = GangReady | Admitted | Refused | QuantumReady | QuantumDone | Progressed | ChunkMade | VideoDone
Event = Admitted | ChunkMade | VideoDone | VideoFailed | Progressed | GangReady | GangLost | Restarted | GangDown


def log_entry(event: GangEvent | Event, seconds: float) -> dict[str, Any]:
    """An event as plain values, without frames and latents."""
    left_out = ("frames", "latents", "progress")
    values = {name: getattr(event, name) for name in event.__slots__ if name not in left_out}
    return {"seconds": seconds, "event": type(event).__name__, **values}
