"""How a rank of a cluster comes by its part of a model: it is sent a configuration and loads the weights itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.prepare import Pipeline
from models.loading import Loading, load_magi, load_stage
from models.magi.config import MagiConfig
from parallel.mesh import Mesh
from parallel.stage import StageModel
from parallel.stages import stage_range

__all__ = ["MagiSource", "ModelSource"]


class ModelSource(Protocol):
    """A model that every rank can load its part of. It is sent to the ranks, so it holds no weights."""

    @property
    def identity(self) -> str:
        """Names the model, its weights and their split; a checkpoint is taken up by the same only."""

    def lead(self, mesh: Mesh, device: str) -> Pipeline:
        """The first stage's layers, the text encoder and the autoencoder."""

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        """A rank's layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MagiSource:
    """A MAGI-1 model, or magi-pocket.

    Attributes:
        config: values of the configuration file.
        weights: folder in place of the configured one; every node must see it.
        split: layers of each stage, as in `9,9,8,8`; None balances them.
        precise: fp32 output projections, as released.
        attention: name of the attention backend.
    """

    config: MagiConfig
    weights: Path | None = None
    split: str | None = None
    precise: bool = True
    attention: str = "sdpa"

    @property
    def identity(self) -> str:
        """A digest of all that is told here."""
        told = [self.config.to_dict(), str(self.weights), self.split, self.precise, self.attention]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def lead(self, mesh: Mesh, device: str) -> Pipeline:
        """The first stage's layers, the text encoder and the autoencoder.

        Raises:
            InputError: something is missing or damaged.
        """
        return load_magi(self.config, self.weights, self._loading(mesh, device))

    def stage(self, mesh: Mesh, device: str) -> StageModel:
        """A rank's layers.

        Raises:
            InputError: something is missing or damaged.
        """
        model = load_stage(self.config, self.weights, self._loading(mesh, device))
        return StageModel(model=model, attention=model.dit.attention)

    def _loading(self, mesh: Mesh, device: str) -> Loading:
        layers = stage_range(self.config, mesh, self.split)
        return Loading(device=device, precise=self.precise, attention=self.attention, layers=layers)
