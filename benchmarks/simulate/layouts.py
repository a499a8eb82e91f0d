"""A machine of several GPUs with a model of the MAGI-1 family, and the runs that are simulated on it.

Times and bytes are counted from the model's shapes, but for one time that was measured: what a full pass of one chunk
takes on one GPU. Every layout of the machine makes one video and many, with and without reuse. docs/simulation.md lists
the assumptions.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import search
from benchmarks.flops import pass_flops
from benchmarks.pipeline import layouts_for
from benchmarks.simulate.clock import Machine, Seconds, VideoPlan, plan_video, simulate
from engine.kv.layout import KVSettings, plan_kv
from engine.record import NOT_ACTIVE, RunRecord
from engine.reuse.policy import ChunkPolicy, Decision, Observation
from engine.schedule import Schedule, Timetable
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.family import MagiFamily
from models.magi.sampling import MagiSampling
from models.magi.weights import stage_bytes
from models.protocols import Pass, Sampling
from parallel.comm.ulysses import local_heads
from parallel.mesh import Layout
from parallel.split import stage_layers, stage_sizes

_WIDTH = 2  # bytes of bf16
_TEXT = 100  # caption tokens that count
_SEEDS = 4  # different videos; more of them are the same again
_JITTER, _HALVINGS = 0.2, 40
_WARMUP = 5  # first steps of a chunk that are computed
_SHARE = 0.9  # of a GPU's memory that weights and KV may take


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A model on the GPUs of one machine; by default A800s."""

    config: MagiConfig  # of the model
    pass_seconds: float = 3.6  # of a full pass of one chunk on one GPU
    mfu: float = 0.34  # share of the peak that it reaches
    budget: int = 5  # finished chunks that the KV buffer holds
    gpus: int = 8  # how many
    peak: float = 312e12  # bf16 operations per second of one
    memory: float = 80e9  # bytes of one
    bandwidth: float = 200e9  # bytes per second of a GPU's NVLinks, in one direction: half of the 400 GB/s of both
    used: float = 0.8  # share of that which transfers reach
    latency: float = 0.5e-3  # seconds of a message between stages, its header by way of the host
    collective: float = 30e-6  # seconds of an all-to-all that carries nothing
    doubling: float = 0.95
    """Share of the speed that is kept when cp is doubled, communication apart: smaller matrix products, and what every
    rank does for itself."""
    decide: float = 2e-3  # seconds that the leader takes for a distance and a decision
    take: float = 1e-3  # seconds that the leader takes for a velocity that is back

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        run = self.config.runtime_config
        return self.config.chunk_tokens(run.video_size_h, run.video_size_w)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a chunk between two stages."""
        return self.tokens * self.config.model_config.hidden_size * _WIDTH

    @property
    def velocity_bytes(self) -> int:
        """Bytes of a chunk's velocity, fp32."""
        model = self.config.model_config
        return self.tokens * model.patch_size**2 * model.latent_channels * 4

    @cached_property
    def attended(self) -> float:
        """Chunks of keys with which a pass of that time has that share of the peak; an `InputError` if it is none."""
        wanted = self.pass_seconds * self.mfu * self.peak
        one, two = self._flops(1), self._flops(2)
        chunks = 1 + (wanted - one) / (two - one)
        if chunks < 1:
            least = f"at {self.mfu:.0%} of the peak it takes {one / (self.mfu * self.peak):.2g} s or more"
            what = f"a pass of {self.pass_seconds:g} s is too short for this model"
            raise InputError(f"{what}: {least}: give a longer --pass-seconds")
        return chunks

    def seconds(self, layout: Layout) -> Seconds:
        """What passes take on the stages of a layout."""
        layers, sizes = self.config.model_config.num_layers, stage_sizes(self.config, layout.pp)
        share = [size / layers for size in sizes]
        exchange = [size * self.exchange_seconds(layout.cp) for size in sizes]
        fan = (layout.cp - 1) / layout.cp * self.hidden_bytes / self._reached  # to and from cp_rank 0 of a stage

        @cache
        def seconds(what: Pass, step: int | None) -> tuple[float, ...]:
            whole = self.pass_seconds
            if what.isolated or step is None:  # a context-free or clean pass attends to its own chunk only
                whole = whole * self._flops(1) / self._flops(self.attended)
            whole /= self.cp_speed(layout.cp)
            spent = [whole * part + extra for part, extra in zip(share, exchange, strict=True)]
            spent[0] += fan
            spent[-1] += fan if what.weight else 0.0
            return tuple(spent)

        return seconds

    def cp_speed(self, cp: int) -> float:
        """How much faster cp ranks compute than one."""
        return cp * self.doubling ** math.log2(cp)

    def exchange_bytes(self, cp: int) -> float:
        """Bytes that a rank sends in one layer: keys, values, queries and the result, to all others (Ulysses)."""
        model = self.config.model_config
        width = 2 * model.num_query_groups * model.kv_channels + 2 * model.num_attention_heads * model.kv_channels
        return self.tokens / cp * width * _WIDTH * (cp - 1) / cp

    def exchange_seconds(self, cp: int) -> float:
        """Seconds of the exchanges of one layer; nothing of them is taken to be hidden behind computing."""
        return 0.0 if cp == 1 else self.exchange_bytes(cp) / self._reached + 4 * self.collective

    def machine(self, layout: Layout) -> Machine:
        """What carries passes out. Every cp_rank of a stage sends its own tokens, over links of its own."""
        return Machine(
            stages=layout.pp,
            latency=self.latency,
            bandwidth=self._reached,
            hidden_bytes=self.hidden_bytes / layout.cp,
            velocity_bytes=self.velocity_bytes,
            decide=self.decide,
            take=self.take,
        )

    def held(self, layout: Layout) -> tuple[int, int]:
        """Bytes of weights and of one video's KV on the fullest rank; what layers work with comes on top.

        The leader has the autoencoder as well. The bookkeeping of compression is left out.
        """
        model, run, sizes = self.config.model_config, self.config.runtime_config, stage_sizes(self.config, layout.pp)
        weights = [stage_bytes(self.config, stage_layers(sizes, stage)) for stage in range(layout.pp)]
        weights[0] += MagiFamily().vae_bytes(self.config, None)
        schedule = Schedule(
            first=0, chunks=self.budget + run.window_size, num_steps=run.num_steps, window=run.window_size
        )
        sampling = MagiSampling(config=self.config, num_steps=run.num_steps)
        plan = replace(plan_kv(sampling, schedule, KVSettings(budget=self.budget), self.tokens), selection=None)
        geometry = local_heads(model.kv_geometry(range(max(sizes)), torch.device("meta")), layout.cp)
        return max(weights), plan.nbytes(geometry)

    def petaflops(self, plan: VideoPlan) -> float:
        """Operations of a video in 10^15, from the time that its passes take on one GPU."""
        return plan.total * self.mfu * self.peak / 1e15

    @property
    def _reached(self) -> float:
        return self.bandwidth * self.used

    def _flops(self, chunks: float) -> int:
        """Of a pass that attends to so many chunks."""
        return pass_flops(self.config.model_config, tokens=self.tokens, keys=round(chunks * self.tokens), text=_TEXT)


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
        """Schedule of each video."""
        window = self.cluster.config.runtime_config.window_size
        return Schedule(first=0, chunks=self.chunks, num_steps=self.steps, window=window)

    def sampling(self, *, lean: bool) -> MagiSampling:
        """The passes; `lean` without clean and copy passes, as runs with reuse have it."""
        return MagiSampling(config=self.cluster.config, num_steps=self.steps, clean_pass=not lean, copy_pass=not lean)

    def gangs(self, layout: Layout) -> int:
        """Gangs of a layout."""
        return self.cluster.gpus // layout.world_size

    def rank_bytes(self, layout: Layout, videos: int) -> int:
        """Bytes of weights and KV on the fullest rank, with so many videos in flight over all gangs."""
        weights, kv = self.cluster.held(layout)
        return weights + -(-videos // self.gangs(layout)) * kv

    def fits(self, layout: Layout, videos: int) -> bool:
        """Whether that leaves some of a GPU's memory."""
        return self.rank_bytes(layout, videos) <= _SHARE * self.cluster.memory

    def plan(self, flags: np.ndarray | None, layout: Layout) -> VideoPlan:
        """The plan of a video on a layout."""
        sampling = self.sampling(lean=flags is not None)
        return plan_video(self.schedule, sampling, self.cluster.seconds(layout), flags)


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """Which steps are computed."""

    name: str
    flags: tuple[np.ndarray, ...] = ()  # of different videos, [ticks, chunks] each; none for computing everything

    @property
    def computed(self) -> float:
        """Computed chunk-steps, as a share of all."""
        if not self.flags:
            return 1.0
        return float(np.mean([(one == 0).sum() / (one != NOT_ACTIVE).sum() for one in self.flags]))


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
    """Those that the model allows and whose gangs fill the GPUs."""
    return tuple(one for one in layouts_for(config, gpus) if not gpus % one.world_size)


def sampled_reuse(study: Study, fraction: float) -> Reuse:
    """Reuse that leaves a share of the operations of a run without reuse, whose clean and copy passes count."""
    sampling, schedule = study.sampling(lean=True), study.schedule
    whole = study.plan(None, Layout()).total
    lean = plan_video(schedule, sampling, study.cluster.seconds(Layout())).total
    share = min(1.0, fraction * whole / lean)
    flags = [modelled_flags(schedule, sampling, fraction=share, warmup=_WARMUP, seed=seed) for seed in range(_SEEDS)]
    return Reuse(name=f"reuse {fraction:g}", flags=tuple(flags))


def reuse_of_record(study: Study, folder: Path) -> Reuse:
    """The reuse of a recorded run; an `InputError` if there is none, or its steps or its window are others."""
    record = RunRecord.load(folder)
    flags = recorded_flags(record.decisions, study.schedule, record.schedule)
    return Reuse(name=f"record {folder.name}", flags=(flags,))


def recorded_flags(decisions: np.ndarray, schedule: Schedule, recorded: Schedule | Timetable) -> np.ndarray:
    """Flags from decisions [chunks, steps] of a record, which are repeated or cut to another number of chunks."""
    if (recorded.num_steps, recorded.window) != (schedule.num_steps, schedule.window):
        has = f"the record has {recorded.num_steps} steps in a window of {recorded.window}"
        wanted = f"{schedule.num_steps} in {schedule.window}"
        raise InputError(f"{has}, not {wanted}: give --steps {recorded.num_steps}")
    made = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    for tick in schedule:
        for chunk, step in tick.active:
            made[tick.index, chunk] = decisions[(chunk - schedule.first) % len(decisions), step]
    return made


def modelled_flags(
    schedule: Schedule, sampling: Sampling, *, fraction: float, warmup: int, seed: int = 0
) -> np.ndarray:
    """Flags in which a given share of the chunk-steps is computed.

    A chunk moves from step to step by the step's size, give or take a fifth, and FlowCache's policy sums that up to a
    threshold, which is searched for. MAGI-1's steps grow towards the clean end, so the cleanest chunk reuses least. The
    variation, of a seed, keeps chunks from reusing in step. A warm-up that alone computes more is an `InputError`.
    """
    dice, seen = random.Random(seed), []
    for tick in schedule:
        for chunk, step in tick.active:
            last, moved = tick.index == schedule.ticks - 1, None
            if step:
                moved = abs(sampling.time(step) - sampling.time(step - 1)) * dice.uniform(1 - _JITTER, 1 + _JITTER)
            one = Observation(
                chunk=chunk, step=step, tick=tick.index, final=last, change=moved, scale=1.0 if step else None
            )
            seen.append(one)
    if not warmup / schedule.num_steps <= fraction <= 1:
        raise InputError(f"a computed share of {fraction:g} cannot be had with {warmup} warm-up steps of a chunk")

    def computed(threshold: float) -> float:
        return float(ChunkPolicy(threshold, warmup).decide(seen).count(Decision.COMPUTE))

    known = search(computed, fraction * len(seen), {0.0: math.inf, 1.0: -math.inf}, tries=_HALVINGS)
    threshold = list(known)[-1]  # the last one, within rounding where the share jumps
    flags = np.full((schedule.ticks, schedule.chunks), NOT_ACTIVE, dtype=np.uint8)
    for one, decision in zip(seen, ChunkPolicy(threshold, warmup).decide(seen), strict=True):
        flags[one.tick, one.chunk] = decision.value
    return flags


def run_study(study: Study, reuses: Sequence[Reuse]) -> list[Run]:
    """Simulate everything."""
    if min(study.concurrency) < 1:
        raise InputError("a concurrency of less than 1 makes nothing")
    runs = []
    for reuse in reuses:
        alone = [study.plan(flags, Layout()) for flags in reuse.flags or (None,)]
        for layout in study.layouts:
            seconds = study.cluster.seconds(layout)
            plans = [replace(plan, seconds=seconds) for plan in alone]
            runs += [_run(study, reuse.name, layout, alone, plans, videos) for videos in study.concurrency]
    return runs


def _run(
    study: Study, reuse: str, layout: Layout, alone: Sequence[VideoPlan], plans: Sequence[VideoPlan], videos: int
) -> Run:
    """One run; `alone` are the plans on one GPU, `plans` those on the layout."""
    gangs = min(study.gangs(layout), videos)
    shares = [tuple(video % len(plans) for video in range(gang, videos, gangs)) for gang in range(gangs)]
    # Gangs with the same videos are the same, so those that stand first are simulated for all.
    machine = study.cluster.machine(layout)
    made = {share: simulate([plans[number] for number in share], machine) for share in set(shares)}
    first = made[shares[0]]
    return Run(
        layout=layout,
        gangs=gangs,
        reuse=reuse,
        videos=videos,
        seconds=max(one.seconds for one in made.values()),
        first_chunk=first.first_chunk,
        utilisation=first.utilisation,
        chunks=videos * study.chunks,
        alone=sum(alone[video % len(alone)].total for video in range(videos)),
    )
