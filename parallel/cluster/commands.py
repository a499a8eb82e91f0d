"""What the driver tells the ranks of a gang. Plain data; all but `AskHealth` are for the lead."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Request
from parallel.checkpoint import CheckpointPlan

__all__ = ["AskHealth", "CancelVideo", "ChunkTaken", "ChunksHeard", "Finish", "GrantTurn", "LeadCommand", "VideoJob"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoJob:
    """Begin a video.

    Attributes:
        video: its name.
        request: what to make.
        checkpoint: where and how often to note how far it is; None for never.
        stored: chunks that the driver has, from the first on.
    """

    video: str
    request: Request
    checkpoint: CheckpointPlan | None = None
    stored: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GrantTurn:
    """Let a turn of a video begin."""

    video: str
    turn: int


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


LeadCommand = VideoJob | GrantTurn | CancelVideo | ChunkTaken | ChunksHeard | Finish
