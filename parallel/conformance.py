"""Golden files on a gang: the cases of generation run over all ranks, the others on the lead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from engine.cache import CacheSettings
from engine.conformance import LatentEngine, Runner, Verdict, check_file, load_stage
from engine.engine import OnProgress
from engine.noise import NoiseSource
from engine.prepare import Pipeline
from engine.record import RunTrace
from engine.request import Request
from models.family import CaptionTable
from models.magi.config import MagiConfig
from parallel.gang import Gang
from parallel.stage import StageModel
from parallel.stages import stage_range

__all__ = ["check_on_gang"]


class _LeadOnce:
    """An engine that leads a gang for one video."""

    def __init__(self, gang: Gang, pipeline: Pipeline, cache: CacheSettings) -> None:
        self._gang, self._pipeline, self._cache = gang, pipeline, cache

    def generate_latents(
        self,
        request: Request,
        captions: CaptionTable,
        prefix: Tensor | None,
        noise: NoiseSource,
        on_progress: OnProgress | None = None,
        trace: RunTrace | None = None,
    ) -> Iterator[Tensor]:
        """Latents [1, C, t, h, w], chunk by chunk."""
        with self._gang.lead(self._pipeline, self._cache) as (engine, _):
            yield from engine.generate_latents(request, captions, prefix, noise, on_progress, trace)


def check_on_gang(
    gang: Gang, files: Sequence[Path], *, split: str | None = None, on_verdict: Callable[[Verdict], None]
) -> None:
    """Check golden files; every rank calls this with the same files.

    Args:
        gang: this rank's.
        files: golden files, their weights beside them.
        split: layers of each stage, as in `stage_sizes`.
        on_verdict: told of each verdict, on the lead.

    Raises:
        InputError: a file cannot be read, or the layout does not fit its model.
    """

    def layers(config: MagiConfig) -> range:
        return stage_range(config, gang.mesh, split)

    def engine(pipeline: Pipeline, cache: CacheSettings) -> LatentEngine:
        return _LeadOnce(gang, pipeline, cache)

    runner = Runner(engine=engine, layers=layers, device=str(gang.device))
    for path in files:
        if gang.mesh.leads:
            on_verdict(check_file(path, runner=runner))
        elif (model := load_stage(path, runner)) is not None:
            gang.serve(StageModel(model=model, attention=model.dit.attention))
