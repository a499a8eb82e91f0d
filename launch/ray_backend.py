"""Videos on a Ray cluster: one gang for `generate --launcher ray`, several for `batch`.

A file of its own because importing Ray takes a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from launch.backends import Job
from launch.plan import Plan, at_a_time, layout_of
from launch.ray_cluster import ray_cluster
from models.errors import InputError
from parallel.cluster.config import ClusterSettings, MagiSource, RankTask, video_size
from parallel.cluster.controller import Controller
from parallel.cluster.messages import Event, VideoOrder
from parallel.cluster.placement import GangShape, cluster_has_gpus
from parallel.cluster.queue import GangSize, VideoSize
from parallel.health.timeouts import Timeouts


def size_of(plan: Plan) -> VideoSize:
    """What a video takes of a gang.

    Raises:
        InputError: the model cannot make it.
    """
    return video_size(
        plan.model.config,
        plan.request,
        reuse=plan.model.reuse,
        kv=plan.model.kv,
        layout=layout_of(plan.options),
        split=plan.options.split,
    )


class RayBackend:
    """The controller of a cluster as a backend."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def submit(self, job: Job) -> None:
        """Queue a video.

        Raises:
            InputError: no gang can ever hold it, or there is one of that name.
        """
        self._controller.submit(
            VideoOrder(
                video=job.video,
                request=job.plan.request,
                size=size_of(job.plan),
                checkpoint=job.checkpoint,
                stored=job.stored,
                priority=job.priority,
            )
        )

    def cancel(self, video: str) -> None:
        """Make no more of a video."""
        self._controller.cancel(video)

    def run(self) -> Iterator[Event]:
        """Make what was submitted."""
        return self._controller.run()


@contextmanager
def on_ray(
    plans: Sequence[Plan], *, gangs: int = 1, kv_bytes: int | None = None, max_restarts: int = 20
) -> Iterator[RayBackend]:
    """Join or start a cluster, and start gangs on it.

    Args:
        plans: of all videos that will be submitted; they have one model.
        gangs: how many to start, at most; no more than there are videos.
        kv_bytes: of each rank for keys and values; None is enough for as many of the largest video as are made at a
            time.
        max_restarts: of all gangs together.

    Raises:
        InputError: there is no cluster, it is too small, or the memory is too small for a video.
    """
    options = plans[0].options
    gangs = min(gangs, len(plans))
    world = layout_of(options).world_size
    cpus = options.threads or 1  # that a rank reserves; without --threads ranks share the cores of their node
    with ray_cluster(cpus=gangs * world * cpus):
        settings = ClusterSettings(
            gangs=gangs,
            shape=GangShape(layout=layout_of(options), gpus=cluster_has_gpus(), cpus=cpus),
            task=_task(plans[0]),
            size=_gang_size(plans, kv_bytes),
            max_restarts=max_restarts,
        )
        with Controller(settings) as controller:
            yield RayBackend(controller)


def _task(plan: Plan) -> RankTask:
    model = plan.model
    source = MagiSource(
        config=model.config,
        weights=None if model.weights is None else model.weights.absolute(),
        split=plan.options.split,
        precise=model.loading.precise,
        attention=model.loading.attention,
    )
    return RankTask(
        layout=layout_of(plan.options),
        source=source,
        reuse=model.reuse,
        kv=model.kv,
        timeouts=Timeouts(),
        threads=plan.options.threads,
    )


def _gang_size(plans: Sequence[Plan], kv_bytes: int | None) -> GangSize:
    """Room of a gang for videos.

    Raises:
        InputError: it is too small for the largest of them.
    """
    sizes = [size_of(plan) for plan in plans]
    videos = at_a_time(plans[0].options, len(plans))
    largest = max(size.kv_bytes for size in sizes)
    memory = videos * largest if kv_bytes is None else kv_bytes
    if memory < largest:
        raise InputError(
            f"--kv-memory {memory} is too small: a video of this batch needs {largest} bytes on a rank; "
            "give more, or make it smaller with --kv-budget"
        )
    return GangSize(slots=videos * sizes[0].schedule.window, kv_bytes=memory)
