"""The runs behind the simulated tables: every layout of a machine, with and without reuse, one video and many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.simulate_cluster import Cluster
from benchmarks.simulate_data import VideoPlan
from benchmarks.simulate_plan import modelled_flags, plan_video, recorded_flags
from benchmarks.simulation import simulate
from engine.record import RunRecord
from engine.schedule import Schedule
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.sampling import MagiSampling
from parallel.topology.mesh import Layout

_SEEDS = 4  # different videos; more of them are the same again
_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is simulated."""

    cluster: Cluster  # the model on its GPUs
    chunks: int  # of each video
    steps: int  # of each chunk
    layouts: tuple[Layout, ...]  # of a gang; there are as many gangs as fit onto the GPUs
    concurrency: tuple[int, ...]  # videos in flight, over all gangs

    @property
    def schedule(self) -> Schedule:
        """Of each video."""
        window = self.cluster.config.runtime_config.window_size
        return Schedule(first=0, chunks=self.chunks, num_steps=self.steps, window=window)

    def sampling(self, *, lean: bool) -> MagiSampling:
        """The passes; `lean` without clean and copy passes, as runs with reuse have it."""
        return MagiSampling(config=self.cluster.config, num_steps=self.steps, clean_pass=not lean, copy_pass=not lean)

    def gangs(self, layout: Layout) -> int:
        """Gangs of a layout."""
        return self.cluster.hardware.gpus // layout.world_size


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """Which steps are computed."""

    name: str  # what it is called
    flags: tuple[np.ndarray, ...] = ()  # of different videos, [ticks, chunks] each; none for computing everything

    @property
    def computed(self) -> float:
        """Chunk-steps, as a share of all."""
        if not self.flags:
            return 1.0
        return float(np.mean([(one == 0).sum() / (one < 255).sum() for one in self.flags]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One layout, one kind of reuse, one number of videos."""

    layout: Layout  # of each gang
    gangs: int  # that have something to do
    reuse: str
    videos: int  # in flight, over all gangs, begun together
    seconds: float  # until all are made
    first_chunk: float  # seconds until the first chunk of the first video
    utilisation: tuple[float, ...]  # of each stage of the first gang
    chunks: int  # made in all
    alone: float  # seconds of the same videos on one GPU

    @property
    def per_chunk(self) -> float:
        """Seconds for a chunk, of whichever video."""
        return self.seconds / self.chunks

    @property
    def speed_up(self) -> float:
        """Over one GPU with the same videos."""
        return self.alone / self.seconds


def layouts_on(config: MagiConfig, gpus: int) -> tuple[Layout, ...]:
    """Powers of two that the model allows and the GPUs hold, and whose gangs fill them."""
    model = config.model_config
    return tuple(
        Layout(pp=pp, cp=cp)
        for pp in _POWERS
        for cp in _POWERS
        if pp <= model.num_layers and not model.num_query_groups % cp and pp * cp <= gpus and not gpus % (pp * cp)
    )


def whole_plan(study: Study, flags: np.ndarray | None, layout: Layout) -> VideoPlan:
    """The plan of a video on a layout."""
    sampling = study.sampling(lean=flags is not None)
    return plan_video(study.schedule, sampling, study.cluster.seconds(layout), flags)


def sampled_reuse(study: Study, fraction: float, warmup: int) -> Reuse:
    """Reuse that leaves a share of the operations of a run without reuse, whose clean and copy passes count.

    Raises:
        InputError: the warm-up alone computes more.
    """
    sampling, schedule = study.sampling(lean=True), study.schedule
    whole = whole_plan(study, None, Layout()).seconds
    lean = plan_video(schedule, sampling, study.cluster.seconds(Layout())).seconds
    share = min(1.0, fraction * whole / lean)
    flags = [modelled_flags(schedule, sampling, fraction=share, warmup=warmup, seed=seed) for seed in range(_SEEDS)]
    return Reuse(name=f"reuse {fraction:g}", flags=tuple(flags))


def reuse_of_record(study: Study, folder: Path) -> Reuse:
    """The reuse of a recorded run.

    Raises:
        InputError: there is no record, or its steps or its window are others.
    """
    record = RunRecord.load(folder)
    flags = recorded_flags(record.flags, study.schedule, record.schedule)
    return Reuse(name=f"record {folder.name}", flags=(flags,))


def run_study(study: Study, reuses: Sequence[Reuse]) -> list[Run]:
    """Simulate everything.

    Raises:
        InputError: a figure makes no sense.
    """
    if min(study.concurrency) < 1:
        raise InputError("a concurrency of less than 1 makes nothing")
    runs = []
    for reuse in reuses:
        alone = _plans(study, reuse, Layout())
        for layout in study.layouts:
            plans, machine = _plans(study, reuse, layout), study.cluster.machine(layout)
            for videos in study.concurrency:
                gangs = min(study.gangs(layout), videos)
                shares = [list(range(gang, videos, gangs)) for gang in range(gangs)]
                # Gangs with the same videos are the same, so those that stand first are simulated for all.
                unique = {tuple(video % len(plans) for video in share) for share in shares}
                made = {share: simulate([plans[video] for video in share], machine) for share in unique}
                first = made[tuple(video % len(plans) for video in shares[0])]
                runs.append(
                    Run(
                        layout=layout,
                        gangs=gangs,
                        reuse=reuse.name,
                        videos=videos,
                        seconds=max(one.seconds for one in made.values()),
                        first_chunk=first.first_chunk,
                        utilisation=first.utilisation,
                        chunks=videos * study.chunks,
                        alone=sum(alone[video % len(alone)].seconds for video in range(videos)),
                    )
                )
    return runs


def _plans(study: Study, reuse: Reuse, layout: Layout) -> list[VideoPlan]:
    return [whole_plan(study, flags, layout) for flags in reuse.flags or (None,)]
