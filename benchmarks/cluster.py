"""What do gangs of a Ray cluster bring, and what does Ray cost? Measured on this machine.

    python -m benchmarks.cluster --out results/cluster           # some minutes, on two free cores
    python -m benchmarks.cluster --quick --out /tmp/cluster      # small, no speed to speak of
    python -m benchmarks.cluster --parts overhead --repeats 9

Throughput: a batch of videos on two gangs of two stages, one video each at a time, against one gang with two videos in
flight. Overhead: the same videos, all in flight on two stages, by ranks that torchrun starts and by a gang of a Ray
cluster, in turn; the model is so large that an item of a stage takes 100 ms or more. Seconds are of denoising, from the
first submission to the last chunk: ranks are loaded and warm. All latents are compared with those of one process.

Exit status 0 if two gangs are not slower than one, Ray adds little enough and no latents differ, 1 if not, 2 for bad
input.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import common
from benchmarks.common import Out, Row, Verdict, median
from benchmarks.runs import alone, on_ranks
from benchmarks.workload import QUICK, Made, ModelSpec, Workload, build, differing, digest, model_config
from engine.checkpoint.files import CheckpointConfig
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from launch.cluster import ray_cluster
from models.errors import InputError
from models.magi.pipeline import MagiPipeline
from parallel.cluster.config import ClusterSettings, RankTask, VideoSize, video_size
from parallel.cluster.controller import Controller
from parallel.cluster.messages import ChunkMade, Event, GangDown, GangLost, VideoDone, VideoFailed, VideoOrder
from parallel.cluster.placement import GangShape
from parallel.cluster.scheduler import GangSize
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh
from parallel.ranks.worker import StageModel
from parallel.split import stage_range

_STAGES = Layout(pp=2)
_LEAN = ReuseSettings(clean_pass=False, copy_pass=False)
_BELOW, _OVERHEAD, _ITEM = 0.98, 0.03, 0.1  # ratio of two gangs to one, share that Ray adds, seconds of an item
# Videos of a batch; and so large that an item takes 100 ms.
_THROUGHPUT = Workload(model=ModelSpec(), chunks=4, steps=8, videos=12, reuse=_LEAN)
_LARGE = Workload(model=ModelSpec(side=144), chunks=5, steps=8, videos=2, reuse=_LEAN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One of the two measurements: the same videos in two ways, in turn."""

    name: str
    workload: Workload
    runs: Mapping[str, Sequence[Made]]  # of each way, by its name: what it is compared with comes first
    problems: Sequence[str]  # what differs from one process

    @property
    def ratio(self) -> float:
        """Time of the first way over that of the second, medians."""
        first, second = (median(one.seconds for one in runs) for runs in self.runs.values())
        return first / second

    @property
    def verdicts(self) -> list[Verdict]:
        """What it is held to."""
        wrong = len(self.problems)
        if self.name == "throughput":
            wanted = f"not below 1, to within {100 * (1 - _BELOW):.0f}%"
            held = [Verdict("2 gangs over 1 gang", f"{self.ratio:.3f}", wanted, self.ratio >= _BELOW)]
            name = "latents of gangs"
        else:
            share, most = 1 / self.ratio - 1, f"at most {100 * _OVERHEAD:.0f}%"
            item = median(one.item for one in next(iter(self.runs.values())))  # seconds, in the first way
            held = [
                Verdict("time that Ray adds", f"{100 * share:+.1f}%", most, share <= _OVERHEAD),
                Verdict("an item of a stage", f"{1e3 * item:.0f} ms", f"at least {1e3 * _ITEM:.0f} ms", item >= _ITEM),
            ]
            name = "latents with and without Ray"
        return [*held, Verdict(name, f"{wrong} differ", "as of one process, bit for bit", not wrong)]

    @property
    def rows(self) -> list[Row]:
        """A line for each way."""
        rows, videos = list[Row](), self.workload.videos
        for way, runs in self.runs.items():
            seconds = median(one.seconds for one in runs)
            row: Row = {"part": self.name, "way": way, "videos": videos, "seconds": round(seconds, 2)}
            row |= {"videos_per_minute": round(60 * videos / seconds, 2)}
            row |= {"of_each_repeat": " ".join(f"{one.seconds:.2f}" for one in runs)}
            rows.append(row | {"start_s": median(one.start for one in runs if one.start is not None)})
        return rows


def run(
    parts: Annotated[str, typer.Option(help="What to measure: of throughput and overhead.")] = "throughput,overhead",
    repeats: Annotated[int, typer.Option(min=1, help="How often both ways are measured.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of small videos.")] = False,
    out: Out = Path("results/cluster"),
) -> int:
    """Measure gangs of a cluster."""
    small, large = _THROUGHPUT, _LARGE
    if quick:
        small, large = (replace(one, model=QUICK, chunks=2, videos=2) for one in (small, large))
        repeats = 1
    two = GangSetup(workload=small, layout=_STAGES, gangs=2)
    ways: dict[str, tuple[Workload, dict[str, Callable[[], Made]]]] = {
        "throughput": (
            small,
            {
                "1 gang, 2 in flight": lambda: on_ray(replace(two, gangs=1, concurrency=2)),
                "2 gangs, 1 in flight each": lambda: on_ray(two),
            },
        ),
        "overhead": (
            large,
            {
                "ranks of torchrun": lambda: on_ranks(_STAGES, [large], torchrun=True)[0],
                "1 gang on Ray": lambda: on_ray(replace(two, workload=large, gangs=1, concurrency=2)),
            },
        ),
    }
    chosen = [name.strip() for name in parts.split(",")]
    for name in chosen:
        if name not in ways:
            raise InputError(f"--parts {parts}: there is no part {name!r}; choose from {', '.join(ways)}")
    common.output_folder(out)
    made = [_measure(name, *own, repeats) for name, own in ways.items() if name in chosen]
    about = "; ".join(f"{part.name}: {part.workload.size}" for part in made)
    return common.publish(
        out,
        "cluster",
        title="Gangs of a Ray cluster",
        about=f"Two stages to a gang; {about}. {common.machine_line()}; one thread per rank.",
        verdicts=[verdict for part in made for verdict in part.verdicts],
        sections={
            "Times": [row for part in made for row in part.rows],
            "What differs": common.bullets(line for part in made for line in part.problems),
        },
    )


def _measure(name: str, workload: Workload, ways: Mapping[str, Callable[[], Made]], repeats: int) -> Part:
    """Make the videos in one process, and then in both ways again and again; which one is first alternates."""
    log = common.new_log()
    log(f"{name}: {workload.videos} videos in one process")
    (wanted,) = alone([workload])
    runs: dict[str, list[Made]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in list(ways)[:: -1 if repeat % 2 else 1]:
            made = ways[way]()
            runs[way].append(made)
            log(f"{name}, repeat {repeat + 1} of {repeats}: {way}, {made.seconds:.2f} s")
    problems = differing([one for own in runs.values() for one in own], wanted)
    return Part(name=name, workload=workload, runs=runs, problems=problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSource:
    """A model of the benchmarks for a cluster, without an autoencoder: latents are what counts."""

    spec: ModelSpec

    @property
    def identity(self) -> str:
        """A digest of what the model is made of."""
        return hashlib.sha256(repr(sorted(asdict(self.spec).items())).encode()).hexdigest()[:16]

    def lead(self, mesh: Mesh, device: str) -> MagiPipeline:
        """The first stage's layers and the text encoder."""
        return build(self.spec, stage_range(model_config(self.spec), mesh))

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        """A rank's layers."""
        pipeline = self.lead(mesh, device)
        return StageModel(model=pipeline.model, attention=pipeline.attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class GangSetup:
    """Gangs of a cluster, and what they make."""

    workload: Workload
    layout: Layout  # of each gang
    gangs: int  # how many
    concurrency: int = 1  # videos that a gang makes at a time
    timeouts: Timeouts = field(default_factory=Timeouts)  # how long ranks wait for others
    max_restarts: int = 0  # of all gangs together

    @property
    def settings(self) -> ClusterSettings:
        """How to use the cluster, one thread per rank."""
        own, source = self.workload, BenchSource(spec=self.workload.model)
        task = RankTask(
            layout=self.layout, source=source, reuse=own.reuse, kv=own.kv, timeouts=self.timeouts, threads=1
        )
        size = self._size(own.requests[0])
        room = GangSize(slots=self.concurrency * size.schedule.window, kv_bytes=self.concurrency * size.kv_bytes)
        shape = GangShape(layout=self.layout, gpus=False)
        return ClusterSettings(gangs=self.gangs, shape=shape, task=task, size=room, max_restarts=self.max_restarts)

    def order(self, video: str, request: Request, checkpoint: CheckpointConfig | None = None) -> VideoOrder:
        """A video to make."""
        return VideoOrder(video=video, request=request, size=self._size(request), checkpoint=checkpoint)

    def _size(self, request: Request) -> VideoSize:
        own = self.workload
        return video_size(model_config(own.model), request, reuse=own.reuse, kv=own.kv, layout=self.layout)


@dataclass(slots=True)
class Outcome:
    """What has come of a cluster's videos so far."""

    chunks: dict[str, list[str]] = field(default_factory=dict)  # digests of the latents of each chunk, by video
    done: set[str] = field(default_factory=set)  # videos that were reported complete
    failed: dict[str, str] = field(default_factory=dict)  # why others are not
    problems: list[str] = field(default_factory=list)  # chunks that did not come in their order

    @property
    def waiting(self) -> int:
        """Videos that have neither come nor failed."""
        return len(self.chunks) - len(self.done) - len(self.failed)

    def submit(self, controller: Controller, orders: Iterable[VideoOrder]) -> None:
        """Queue videos, and expect them."""
        for order in orders:
            controller.submit(order)
            self.chunks[order.video] = []

    def on_event(self, event: Event) -> None:
        """Note what has happened."""
        if isinstance(event, ChunkMade):
            made = self.chunks[event.video]
            if event.index != len(made):
                self.problems.append(f"{event.video}: chunk {event.index} came where {len(made)} was due")
            made.append(digest(event.latents))
        elif isinstance(event, VideoDone):
            self.done.add(event.video)
        elif isinstance(event, VideoFailed):
            self.failed[event.video] = event.message


def warm_up(controller: Controller, setup: GangSetup, on_event: Callable[[Event], None] = lambda event: None) -> None:
    """Make short videos until every gang has made one, so that none is starting or new to its work."""
    short, rounds = replace(setup, workload=replace(setup.workload, chunks=1, videos=setup.gangs)), 0
    warm: set[str] = set()
    while len(warm) < setup.gangs:
        for number, request in enumerate(short.workload.requests):
            controller.submit(short.order(f"warm-up-{rounds}-{number}", request))
        rounds += 1
        for event in controller.run():
            on_event(event)
            if isinstance(event, VideoDone):
                warm.add(event.gang)


def on_ray(setup: GangSetup) -> Made:
    """The videos of a workload on gangs of a Ray cluster that is started for them."""
    began = time.perf_counter()
    with ray_cluster(cpus=setup.gangs * setup.layout.world_size), Controller(setup.settings) as controller:
        warm_up(controller, setup)
        outcome, losses = Outcome(), []
        start, ended = time.perf_counter() - began, 0.0
        orders = [setup.order(f"video-{place}", one) for place, one in enumerate(setup.workload.requests)]
        began = time.perf_counter()
        outcome.submit(controller, orders)
        for event in controller.run():
            outcome.on_event(event)
            if isinstance(event, ChunkMade):
                ended = time.perf_counter()
            elif isinstance(event, GangLost | GangDown):
                losses.append(f"{event.gang}: {event.message}")
    latents = tuple(tuple(made) for made in outcome.chunks.values())
    return Made(seconds=ended - began, latents=latents, start=start, losses=tuple(losses))


if __name__ == "__main__":
    sys.exit(common.run_command(run, "cluster"))
