"""A model of a few layers with random weights, whole or one stage of it, for tests over several ranks."""

import time

import torch

from engine.request import Request
from models.attention import attention_backend
from models.checkpoint import Loading
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from parallel.ranks.worker import StageModel
from parallel.split import balanced_split, stage_layers
from tests.engine.tiny import TinyPipeline, tiny_config


def small_config(layers=5, **changes):
    values = tiny_config(**changes).to_dict()
    values["model_config"]["num_layers"] = layers
    return MagiConfig.from_dict(values, source="small")


class SmallPipeline(TinyPipeline):
    """All layers, or those of one stage with the same weights."""

    def __init__(self, config, layers=None, seed=0, device="cpu"):
        super().__init__(config, seed=seed)
        if layers is not None:
            whole = self.model.state_dict()
            dit = MagiDiT(config.model_config, Loading(layers=layers))
            dit.load_state_dict({name: whole[name] for name in dit.state_dict()})
            self.model = dit.requires_grad_(False)
        self.model.to(device)

    @property
    def stage(self):
        return StageModel(model=self.model, attention=attention_backend("sdpa"))


def stage_pipeline(config, mesh, split=None, seed=0, device="cpu"):
    sizes = split or balanced_split([1.0] * config.model_config.num_layers, mesh.layout.pp)
    return SmallPipeline(config, stage_layers(sizes, mesh.stage), seed=seed, device=device)


def request(**changes):
    values = {"prompt": "a thing", "chunks": 4, "height": 32, "width": 48, "num_steps": 8, "seed": 3}
    return Request(**{**values, **changes})


def one_thread():
    torch.set_num_threads(1)


class Wrapped:
    """What stands before a model or a pipeline, and is like it in all that it does not do itself."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


class Timed(Wrapped):
    """A model whose layers take a given time each, or longer, whatever else the machine does."""

    def __init__(self, model, seconds):
        super().__init__(model)
        self._seconds = seconds

    def layers(self, *arguments, **named):
        began = time.perf_counter()
        hidden = self._inner.layers(*arguments, **named)
        time.sleep(max(0.0, self._seconds * len(self._inner.kv.layers) - (time.perf_counter() - began)))
        return hidden
