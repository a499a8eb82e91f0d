"""What the driver of a cluster is given and gives back. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from engine.checkpoint.files import CheckpointConfig
from engine.request import Request
from parallel.cluster.actor import RankTask
from parallel.cluster.config import VideoSize
from parallel.cluster.gang import GangState
from parallel.cluster.placement import GangShape
from parallel.cluster.queue import GangSize
from parallel.cluster.rank_actors import RankView


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSettings:
    """How to use a cluster."""

    gangs: int  # how many
    shape: GangShape  # what each needs
    task: RankTask  # what its ranks are told
    size: GangSize  # slots and memory that each has for videos
    max_restarts: int = 20  # of all gangs together
    node_wait: float = 300.0  # seconds to wait for nodes when no gang has room any more
    seed: int = 0  # of the scheduler's lots


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoOrder:
    """A video to make."""

    video: str
    request: Request  # what to make
    size: VideoSize  # what it takes
    checkpoint: CheckpointConfig | None = None
    """Where and how often to note how far it is; None begins from the start after a loss."""
    stored: int = 0  # chunks that the caller has already, from the first on; they are not handed out again
    priority: int = 0  # higher goes first


@dataclass(frozen=True, kw_only=True, slots=True)
class GangView:
    """A gang at this moment."""

    gang: str
    state: GangState  # how far it is
    attempt: int  # how often it was started again
    ranks: tuple[RankView, ...]  # those that are running
