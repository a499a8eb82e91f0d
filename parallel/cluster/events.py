"""What the lead of a gang tells the driver, and what the driver tells whoever wants videos. Plain data.

Frames and latents are NumPy arrays: those cross processes without being copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.engine import Progress

__all__ = [
    "Admitted",
    "ChunkMade",
    "Event",
    "GangDown",
    "GangLost",
    "GangReady",
    "LeadEvent",
    "Progressed",
    "Refused",
    "Restarted",
    "TurnDone",
    "TurnReady",
    "VideoDone",
    "VideoFailed",
    "log_entry",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A gang has taken a video in.

    Attributes:
        video: its name.
        number: what the gang calls it in its messages.
        first: chunk that will be handed out first; more than 0 after a checkpoint.
        gang: its name; the driver fills it in.
    """

    video: str
    number: int
    first: int
    gang: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A gang cannot make a video; the gang is well."""

    video: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnReady:
    """A video asks for its next turn.

    Attributes:
        video: its name.
        turn: index.
        chunk: that enters; None if none does any more.
        slots: of the gang that the turn takes.
    """

    video: str
    turn: int
    chunk: int | None
    slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnDone:
    """All chunks have taken all steps of a turn."""

    video: str
    turn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressed:
    """How far a video is.

    Attributes:
        video: its name.
        done: finished chunks.
        chunks: of the whole video.
        share: of all its steps that are done.
        computed: chunk-steps so far that were computed, as a share.
        kv_bytes: size of its KV buffers on the lead.
        progress: the same as the engine tells it.
        gang: its name; the driver fills it in.
    """

    video: str
    done: int
    chunks: int
    share: float
    computed: float
    kv_bytes: int
    progress: Progress
    gang: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChunkMade:
    """A finished chunk.

    Attributes:
        video: its name.
        index: 0 for the first.
        frames: uint8 [F, H, W, 3].
        latents: fp32 [1, C, t, h, w].
    """

    video: str
    index: int
    frames: NDArray[np.uint8]
    latents: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDone:
    """All chunks of a video were handed out.

    Attributes:
        video: its name.
        computed: chunk-steps that were computed, as a share of all.
        kv_bytes: size of its KV buffers on the lead.
        gang: its name; the driver fills it in.
    """

    video: str
    computed: float
    kv_bytes: int
    gang: str = ""


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
    """A gang has failed; its videos go on elsewhere.

    Attributes:
        gang: which.
        message: why, in one line.
        videos: that it was making.
    """

    gang: str
    message: str
    videos: tuple[str, ...]


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


LeadEvent = GangReady | Admitted | Refused | TurnReady | TurnDone | Progressed | ChunkMade | VideoDone
Event = Admitted | ChunkMade | VideoDone | VideoFailed | Progressed | GangReady | GangLost | Restarted | GangDown


def log_entry(event: LeadEvent | Event, seconds: float) -> dict[str, Any]:
    """An event as plain values, without frames and latents."""
    left_out = ("frames", "latents", "progress")
    values = {name: getattr(event, name) for name in event.__slots__ if name not in left_out}
    return {"seconds": seconds, "event": type(event).__name__, **values}
