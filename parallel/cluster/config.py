"""What a caller tells the controller: the model as ranks load it, the gangs, and what a video takes.

A rank is sent a configuration and loads the weights itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from engine.kv.layout import KVSettings, plan_kv
from engine.request import Request, timetable
from engine.reuse.policy import ReuseSettings
from models.checkpoint import Loading
from models.families import family_of
from models.family import ModelConfig, ModelLoader
from models.protocols import Pipeline
from parallel.cluster.scheduler import GangSize, VideoSize
from parallel.comm.ulysses import local_heads
from parallel.health.timeouts import HEAD_SECONDS, Timeouts
from parallel.mesh import Layout, Mesh
from parallel.ranks.worker import StageModel
from parallel.split import stage_range, stage_sizes

if TYPE_CHECKING:  # it imports Ray, which takes a second and which a model that is loaded here does not need
    from parallel.cluster.placement import GangShape


class ModelSource(Protocol):
    """A model that every rank can load its part of. It is sent to the ranks, so it holds no weights."""

    @property
    def identity(self) -> str:
        """Names the model, its weights and their split; a checkpoint is taken up by the same only."""

    def lead(self, mesh: Mesh, device: str) -> Pipeline:
        """The first stage's layers, the text encoder and the autoencoder; an `InputError` says what is missing."""

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        """A rank's layers; errors as in `lead`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A `ModelSource` of a model of any family, by its loader."""

    loader: ModelLoader
    split: str | None = None  # layers of each stage, as in `9,9,8,8`; None balances them
    precise: bool = True  # fp32 output projections, as released
    compiled: bool = False  # few kernels besides attention
    attention: str = "sdpa"  # name of the attention backend

    @property
    def identity(self) -> str:
        values = [*self.loader.absolute().identity, self.split, self.precise, self.compiled, self.attention]
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def lead(self, mesh: Mesh, device: str) -> Pipeline:
        return self.loader.pipeline(self._loading(mesh, device))

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        model = self.loader.stage(self._loading(mesh, device))
        return StageModel(model=model, attention=model.attention)

    def _loading(self, mesh: Mesh, device: str) -> Loading:
        layers = stage_range(self.loader.config, mesh, self.split) if mesh.layout.pp > 1 else None
        how = {"precise": self.precise, "compiled": self.compiled}
        return Loading(device=device, attention=self.attention, layers=layers, **how)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTask:
    """What every rank of a gang is given."""

    layout: Layout  # of the ranks
    source: ModelSource  # of the weights
    reuse: ReuseSettings  # which steps are reused
    kv: KVSettings  # how much of the past is held
    timeouts: Timeouts  # how long to wait for others
    interface: str | None = None  # network interface to listen at, on all nodes; None takes Ray's address of each
    threads: int = 1  # CPU threads of each rank: another number makes other bits, so nothing but a person changes it


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSettings:
    """How to use a cluster."""

    gangs: int  # how many
    shape: GangShape  # what each needs
    task: RankTask  # what its ranks are given
    size: GangSize  # slots and memory that each has for videos
    max_restarts: int = 20  # of all gangs together
    head_wait: float = HEAD_SECONDS  # seconds for which Ray's head may not answer


def video_size(
    config: ModelConfig,
    request: Request,
    *,
    reuse: ReuseSettings,
    kv: KVSettings,
    layout: Layout,
    split: str | None = None,
) -> VideoSize:
    """What a video of a model takes; an InputError if the model cannot make it, or does not fit the layout."""
    num_steps, passes = request.num_steps, {"clean_pass": reuse.clean_pass, "copy_pass": reuse.copy_pass}
    sampling = family_of(config).sampling(config, num_steps, **passes)
    image = request.prefix is not None and config.figures.sees_image
    _, given = (0, 0) if request.prefix is None or image else sampling.prefix(len(request.prefix))
    sampling = family_of(config).sampling(
        config, num_steps, given=given, ends=0 if request.end is None else 1, **passes
    )
    table = timetable(sampling, request.chunks, given)
    geometry = config.kv_geometry(range(max(stage_sizes(config, layout.pp, split))), torch.device("cpu"))
    plan = plan_kv(sampling, table.spans[0], kv, config.chunk_tokens(request.height, request.width))
    held = local_heads(geometry, layout.cp)
    pinned = plan.host_nbytes(replace(held, device=torch.device("cuda")))
    return VideoSize(schedule=table, kv_bytes=plan.nbytes(held), kv_host_bytes=pinned)
