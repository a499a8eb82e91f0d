"""Golden files on a gang: the cases of generation run over all ranks, the others on the lead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from engine.conformance import LatentEngine, Runner, Verdict, check_file, load_stage
from engine.engine import OnProgress
from engine.noise import NoiseSource
from engine.record import Recorder
from engine.request import Request
from engine.reuse.settings import ReuseSettings
from models.errors import InputError
from models.magi.config import MagiConfig
from models.protocols import CaptionTable, Pipeline
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel
from parallel.topology.split import stage_range


class _LeadOnce:
    """An engine that leads a gang for one video."""

    def __init__(self, gang: Gang, pipeline: Pipeline, cache: ReuseSettings) -> None:
        self._gang, self._pipeline, self._cache = gang, pipeline, cache

    def generate_latents(
        self,
        request: Request,
        captions: CaptionTable,
        prefix: Tensor | None,
        noise: NoiseSource,
        on_progress: OnProgress | None = None,
        trace: Recorder | None = None,
    ) -> Iterator[Tensor]:
        """Latents [1, C, t, h, w], chunk by chunk."""
        with self._gang.lead(self._pipeline, self._cache) as (engine, _):
            yield from engine.generate_latents(request, captions, prefix, noise, on_progress, trace)


def check_on_gang(
    gang: Gang,
    files: Sequence[Path],
    *,
    split: str | None = None,
    on_verdict: Callable[[Verdict], None],
    on_unreadable: Callable[[InputError], None] | None = None,
) -> None:
    """Check golden files; every rank calls this with the same files.

    Args:
        gang: this rank's.
        files: golden files, their weights beside them.
        split: layers of each stage, as in `stage_sizes`.
        on_verdict: told of each verdict, on the lead.
        on_unreadable: told of each file that cannot be read, on the lead; the others are checked all the same. Without
            it the first such file ends the gang.

    Raises:
        InputError: a file cannot be read, or the layout does not fit its model.
    """

    def layers(config: MagiConfig) -> range:
        return stage_range(config, gang.mesh, split)

    def engine(pipeline: Pipeline, cache: ReuseSettings) -> LatentEngine:
        return _LeadOnce(gang, pipeline, cache)

    runner = Runner(engine=engine, layers=layers, device=str(gang.device))
    for path in files:
        try:
            _check(gang, path, runner, on_verdict)
        except _Unreadable as error:
            if on_unreadable is None:
                raise error.why from None
            if gang.mesh.leads:
                on_unreadable(error.why)


class _Unreadable(Exception):  # noqa: N818 - all ranks go on after it
    """A file that no rank can read."""

    def __init__(self, why: InputError) -> None:
        super().__init__(str(why))
        self.why = why


def _check(gang: Gang, path: Path, runner: Runner, on_verdict: Callable[[Verdict], None]) -> None:
    """Check one file, or serve its layers."""
    try:
        model = load_stage(path, runner)
    except InputError as error:
        raise _Unreadable(error) from None
    if gang.mesh.leads:
        try:
            verdict = check_file(path, runner=runner)
        except InputError as error:
            if model is not None:  # the others serve it, and must be ended
                raise
            raise _Unreadable(error) from None
        on_verdict(verdict)
    elif model is not None:
        gang.serve(StageModel(model=model, attention=model.dit.attention))
