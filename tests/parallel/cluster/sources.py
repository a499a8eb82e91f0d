"""Models for gangs of a test cluster: small, with random weights, and with things that can go wrong."""

import time
from dataclasses import dataclass, field

import torch

from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.reuse.policy import ReuseSettings
from models.protocols import CaptionTable
from parallel.cluster.config import video_size
from parallel.mesh import Layout
from parallel.ranks.worker import StageModel
from tests.parallel.small import request, small_config, stage_pipeline

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


class _Poisoned:
    """A pipeline that quanta one prompt into captions which the layers choke on."""

    def __init__(self, pipeline):
        self._pipeline = pipeline

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def captions(self, prompt):
        made = self._pipeline.captions(prompt)
        if prompt != POISON:
            return made
        return CaptionTable(text=torch.full_like(made.text, float("nan")), null=made.null)


class _Brittle:
    """A model that takes its time and does not stand captions without numbers."""

    def __init__(self, model, seconds):
        self._model, self._seconds = model, seconds

    def __getattr__(self, name):
        return getattr(self._model, name)

    def layers(self, hidden, modulation, text, *rest, **named):
        began = time.perf_counter()
        if 0 not in self._model.kv.layers and any(k.isnan().any() for k, *_ in text.values()):
            raise ValueError("the caption is no number")
        made = self._model.layers(hidden, modulation, text, *rest, **named)
        time.sleep(max(0.0, self._seconds * len(self._model.kv.layers) - (time.perf_counter() - began)))
        return made


def size(made, layout, config=None):
    return video_size(small_config(**(config or {})), made, reuse=ReuseSettings(), kv=KVSettings(), layout=layout)


def alone(made, config=None):
    """Latents of one process."""
    layout = Layout(pp=1)
    from parallel.mesh import Mesh

    pipeline = stage_pipeline(small_config(**(config or {})), Mesh(layout=layout, rank=0))
    engine = Engine(pipeline)
    return [chunk.latents for chunk in engine.generate(made)]


def requests(count, **changes):
    return [request(prompt="a thing" + "!" * index, seed=index, **changes) for index in range(count)]
