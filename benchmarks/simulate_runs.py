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
from parallel.mesh import Layout

__all__ = ["Reuse", "Run", "Study", "layouts_on", "reuse_of_record", "run_study", "sampled_reuse", "whole_plan"]

_SEEDS = 4  # different videos; more of them are the same again
_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is simulated.

    Attributes:
        cluster: the model on its GPUs.
        chunks: of each video.
        steps: of each chunk.
        layouts: of a gang; there are as many gangs as fit onto the GPUs.
        concurrency: videos in flight, over all gangs.
    """

    cluster: Cluster
    chunks: int
    steps: int
    layouts: tuple[Layout, ...]
    concurrency: tuple[int, ...]

    @property
    def schedule(self) -> Schedule:
        """Of each video."""
        window = self.cluster.config.runtime_config.window_size
        return Schedule(first=0, chunks=self.chunks, num_steps=self.steps, window=window)

    def sampling(self, *, lean: bool) -> MagiSampling:
        """The passes; `lean` without clean and copy passes, as runs with reuse have it."""
        return MagiSampling(
            config=self.cluster.config, num_steps=self.steps, clean_forward=not lean, nearly_clean_mix=not lean
        )

    def gangs(self, layout: Layout) -> int:
        """Gangs of a layout."""
        return self.cluster.hardware.gpus // layout.world_size


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """Which steps are computed.

    Attributes:
        name: what it is called.
        flags: of different videos, [ticks, chunks] each; none for computing everything.
    """

    name: str
    flags: tuple[np.ndarray, ...] = ()

    @property
    def computed(self) -> float:
        """Chunk-steps, as a share of all."""
        if not self.flags:
            return 1.0
        return float(np.mean([(one == 0).sum() / (one < 255).sum() for one in self.flags]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One layout, one kind of reuse, one number of videos.

    Attributes:
        layout: of each gang.
        gangs: that have something to do.
        reuse: its name.
        videos: in flight, over all gangs, begun together.
        seconds: until all are made.
        first_chunk: seconds until the first chunk of the first video.
        utilisation: of each stage of the first gang.
        chunks: made in all.
        alone: seconds of the same videos on one GPU.
    """

    layout: Layout
    gangs: int
    reuse: str
    videos: int
    seconds: float
    first_chunk: float
    utilisation: tuple[float, ...]
    chunks: int
    alone: float

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
