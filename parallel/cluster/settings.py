"""What the driver of a cluster is given and gives back. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Request
from parallel.checkpoint import CheckpointPlan
from parallel.cluster.crew import RankView
from parallel.cluster.gang import GangState
from parallel.cluster.jobs import GangSize
from parallel.cluster.placement import GangShape
from parallel.cluster.rank_actor import RankTask
from parallel.cluster.size import VideoSize

__all__ = ["ClusterSettings", "GangView", "VideoOrder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSettings:
    """How to use a cluster.

    Attributes:
        gangs: how many.
        shape: what each needs.
        task: what its ranks are told.
        size: slots and memory that each has for videos.
        max_restarts: of all gangs together.
        node_wait: seconds to wait for nodes when no gang has room any more.
        seed: of the scheduler's lots.
    """

    gangs: int
    shape: GangShape
    task: RankTask
    size: GangSize
    max_restarts: int = 20
    node_wait: float = 300.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoOrder:
    """A video to make.

    Attributes:
        video: its name.
        request: what to make.
        size: what it takes.
        checkpoint: where and how often to note how far it is; None begins from the start after a loss.
        stored: chunks that the caller has already, from the first on; they are not handed out again.
        priority: higher goes first.
    """

    video: str
    request: Request
    size: VideoSize
    checkpoint: CheckpointPlan | None = None
    stored: int = 0
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GangView:
    """A gang at this moment.

    Attributes:
        gang: its name.
        state: how far it is.
        attempt: how often it was started again.
        ranks: those that are running.
    """

    gang: str
    state: GangState
    attempt: int
    ranks: tuple[RankView, ...]
