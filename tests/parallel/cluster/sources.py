"""Models for gangs of a test cluster: small, with random weights, and with things that can go wrong."""

from dataclasses import dataclass, field

import torch

from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from models.protocols import CaptionTable
from parallel.cluster.config import video_size
from parallel.mesh import Layout, Mesh
from parallel.ranks.worker import StageModel
from tests.parallel.small import Timed, Wrapped, request, small_config, stage_pipeline

POISON = "a poisoned thing"


@dataclass(frozen=True, kw_only=True)
class SmallSource:
    """The small model; its layers take a given time at least, and one prompt makes them fail."""

    config: dict = field(default_factory=dict)
    layer_seconds: float = 0.0
    identity: str = "small"

    def lead(self, mesh, device):
        pipeline = stage_pipeline(small_config(**self.config), mesh)
        pipeline.model = _Brittle(pipeline.model, self.layer_seconds)
        return _Poisoned(pipeline)

    def stage(self, mesh, device):
        stage = stage_pipeline(small_config(**self.config), mesh).stage
        return StageModel(model=_Brittle(stage.model, self.layer_seconds), attention=stage.attention)


class _Poisoned(Wrapped):
    """A pipeline that turns one prompt into captions which the layers choke on."""

    def captions(self, prompt):
        made = self._inner.captions(prompt)
        if prompt != POISON:
            return made
        return CaptionTable(text=torch.full_like(made.text, float("nan")), null=made.null)


class _Brittle(Timed):
    """A model that takes its time and does not stand captions without numbers."""

    def layers(self, hidden, modulation, text, *rest, **named):
        if 0 not in self._inner.kv.layers and any(k.isnan().any() for k, *_ in text.values()):
            raise ValueError("the caption is no number")
        return super().layers(hidden, modulation, text, *rest, **named)


def size(made, layout, config=None):
    return video_size(small_config(**(config or {})), made, reuse=ReuseSettings(), kv=KVSettings(), layout=layout)


def alone(made, config=None):
    """Latents of one process."""
    engine = Engine(stage_pipeline(small_config(**(config or {})), Mesh(layout=Layout(), rank=0)))
    return [chunk.latents for chunk in engine.generate(made)]


def requests(count, **changes):
    return [request(prompt="a thing" + "!" * index, seed=index, **changes) for index in range(count)]
