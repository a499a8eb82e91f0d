"""What `flowcache batch` was given, and what that means for a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.plan import Options, Plan
from models.errors import InputError
from parallel.cluster.config import ClusterSettings, MagiSource, RankTask, VideoSize
from parallel.cluster.placement import GangShape, cluster_has_gpus
from parallel.cluster.queue import GangSize
from parallel.health.timeouts import Timeouts

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """What was given on the command line."""

    file: Path  # a JSON object for each video
    out: Path  # folder of the videos
    base: Options  # options that hold where a line says nothing; its ranks are those of a gang
    gangs: int = 1  # how many
    checkpoint_every: int = 4  # a checkpoint each time so many chunks have entered; 0 for none
    checkpoints: Path | None = None  # folder of checkpoints, which all nodes see; None puts it into `out`
    max_restarts: int = 20  # of all gangs together
    kv_memory: int | None = None
    """Bytes of each rank for keys and values; None is enough for as many of the largest video as are made at a time."""
    address: str | None = None  # of a Ray cluster; None takes the one that this process belongs to, or starts one

    def __post_init__(self) -> None:
        if self.gangs < 1:
            raise InputError(f"--gangs {self.gangs} leaves nobody to work: give 1 or more")
        if self.checkpoint_every < 0:
            raise InputError(f"--checkpoint-every {self.checkpoint_every} cannot be: give 0 for none, or more")
        if self.max_restarts < 0:
            raise InputError(f"--max-restarts {self.max_restarts} cannot be: give 0 or more")


def cluster_settings(
    options: BatchOptions, videos: Sequence[tuple[Plan, VideoSize]], threads: int, timeouts: Timeouts | None = None
) -> ClusterSettings:
    """How to use the cluster that this process has joined.

    Args:
        options: what was given.
        videos: of one model.
        threads: CPU threads of a rank, and CPUs that it reserves.
        timeouts: how long ranks wait for each other.

    Raises:
        InputError: the gangs' memory for keys and values is too small for a video.
    """
    plan, ranks = videos[0][0], options.base.ranks
    window = videos[0][1].window
    at_a_time = ranks.at_a_time(len(videos))
    largest = max(size.kv_bytes for _, size in videos)
    memory = at_a_time * largest if options.kv_memory is None else options.kv_memory
    if memory < largest:
        raise InputError(
            f"--kv-memory {memory} is too small: a video of this batch needs {largest} bytes on a rank; "
            "give more, or make it smaller with --kv-budget"
        )
    source = MagiSource(
        config=plan.config,
        weights=None if plan.weights is None else plan.weights.absolute(),
        split=ranks.split,
        precise=plan.loading.precise,
        attention=plan.loading.attention,
    )
    task = RankTask(
        layout=ranks.layout,
        source=source,
        cache=plan.cache,
        kv=plan.kv,
        timeouts=timeouts or Timeouts(),
        threads=threads,
    )
    return ClusterSettings(
        gangs=min(options.gangs, len(videos)),  # more would have nothing to do
        shape=GangShape(layout=ranks.layout, gpus=cluster_has_gpus(), cpus=threads),
        task=task,
        size=GangSize(slots=at_a_time * window, kv_bytes=memory),
        max_restarts=options.max_restarts,
    )


def parse_size(text: str) -> int:
    """Bytes of a text such as `8GB`, `512 MB` or `1.5g`.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if found is None:
        raise InputError(f"{text!r} is no size: write one such as 8GB")
    return int(float(found[1]) * _UNITS[found[2]])
