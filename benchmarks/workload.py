"""What is made in a measured run, and what comes of it: plain data that travels between processes.

Seconds are of denoising, from the submission of the first video to its last chunk, with everything loaded and warm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.models import PROMPT, ModelSpec, model_config
from engine.kv.size import KVSettings
from engine.request import Request
from engine.reuse.settings import ReuseSettings
from engine.schedule import Schedule
from models.magi.sampling import MagiSampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Videos of one length on one model; they differ in their noise."""

    model: ModelSpec
    chunks: int  # of every video
    steps: int  # of every chunk
    videos: int = 1  # with seeds 0, 1, ...; all in flight at once on a gang, one after another in one process
    reuse: ReuseSettings = field(default_factory=ReuseSettings)  # which steps are reused
    kv: KVSettings = field(default_factory=KVSettings)  # how much of the past is held
    barrier: bool = False  # wait for all chunks of a tick before the next
    decode: bool = False  # make frames; latents alone otherwise

    @property
    def reuses(self) -> bool:
        """Whether steps may be reused."""
        return self.reuse.policy != "none"

    @property
    def name(self) -> str:
        """The videos in words."""
        kind = "reuse" if self.reuses else "no reuse"
        return f"{self.videos} video{'s' * (self.videos > 1)}, {kind}{', barrier' * self.barrier}"

    @property
    def size(self) -> str:
        """Model and length in words."""
        config = model_config(self.model).model_config
        model = f"{self.model.name}: {config.num_layers} layers of width {config.hidden_size}, {self.model.side} pixels"
        return f"{model}, {self.chunks} chunks of {self.steps} steps"

    @property
    def requests(self) -> list[Request]:
        """What the engine is asked for."""
        side = self.model.side
        return [
            Request(prompt=PROMPT, chunks=self.chunks, height=side, width=side, num_steps=self.steps, seed=seed)
            for seed in range(self.videos)
        ]

    @property
    def schedule(self) -> Schedule:
        """Schedule of every video."""
        window = model_config(self.model).runtime_config.window_size
        return Schedule(first=0, chunks=self.chunks, num_steps=self.steps, window=window)

    @property
    def sampling(self) -> MagiSampling:
        """How every video is denoised.

        Raises:
            InputError: the model cannot take that many steps.
        """
        reuse = self.reuse
        return MagiSampling(
            config=model_config(self.model),
            num_steps=self.steps,
            clean_pass=reuse.clean_pass,
            copy_pass=reuse.copy_pass,
        )

    @property
    def warm_up(self) -> Workload:
        """A short video on the same model, before those that count."""
        return replace(self, chunks=1, videos=1, reuse=ReuseSettings(), barrier=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedCall:
    """Mean times of the passes of one name and step."""

    name: str  # of the pass
    step: int | None  # of the chunk; None for a pass over a finished chunk
    count: int  # how many there were
    seconds: tuple[float, ...]  # on each stage of the split


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time of one process goes."""

    calls: tuple[TimedCall, ...]  # what passes take, stage by stage, embedding and reading out counted in
    embed: float  # seconds of one patch embedding
    rest: float  # seconds per pass outside of calls: decisions and distances, steps, bookkeeping

    @property
    def means(self) -> tuple[float, ...]:
        """Mean seconds of a pass on each stage."""
        count = sum(call.count for call in self.calls)
        stages = range(len(self.calls[0].seconds))
        return tuple(sum(call.count * call.seconds[stage] for call in self.calls) / count for stage in stages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of a workload."""

    seconds: float  # from the first video's submission to the last chunk
    latents: tuple[tuple[str, ...], ...]  # digests of each video's chunks
    first_chunk: float = 0.0  # seconds until the first chunk of the first video
    videos: tuple[float, ...] = ()  # seconds of each video, where one was made after another
    decisions: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Of each video, [chunks][steps] as in a record; nothing where no step may be reused."""
    ranks: tuple[dict[str, Any], ...] = ()  # the counters of all ranks of a gang
    hop: float = 0.0  # seconds of a message with hidden states from one rank to another, if it was measured
    timing: Timing | None = None  # of one process, if wanted
    start: float | None = None  # seconds until all ranks of a cluster were warm
    losses: tuple[str, ...] = ()  # why gangs of a cluster were lost; there should be none

    @property
    def item(self) -> float:
        """Mean seconds of a stage's items, from a gang's counters."""
        busy, items = (sum(float(rank[name]) for rank in self.ranks) for name in ("busy", "items"))
        return busy / items if items else 0.0


def digest(chunk: Tensor | NDArray[np.float32]) -> str:
    """A digest of a chunk's latents."""
    return hashlib.sha256(np.ascontiguousarray(chunk).tobytes()).hexdigest()


def differing(runs: Sequence[Made], wanted: Made) -> list[str]:
    """Videos that are not those of one process, and gangs that were lost; one line each."""
    found = []
    for place, run in enumerate(runs, 1):
        found += [f"run {place}: {loss}" for loss in run.losses]
        same = [one == other for one, other in zip(run.latents, wanted.latents, strict=True)]
        found += [f"run {place}: video {number} has other latents" for number, one in enumerate(same) if not one]
    return found
