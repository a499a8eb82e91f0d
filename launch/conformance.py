"""`flowcache conformance`: run what a published implementation ran, and compare (format: docs/conformance.md).

It knows the files' format and how far figures may differ. The weights file of a case lies beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.engine import Engine
from engine.kv.selection import Granularity, SelectionSettings, select
from engine.noise import GivenNoise
from engine.prepare import Encoded
from engine.record import Recorder
from engine.request import Request
from engine.reuse.settings import ReuseSettings
from launch.backends import join_ranks, start_ranks
from launch.generate import needs_ranks
from launch.options import Options
from models.attention import Attention
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.model import MagiModel
from models.magi.sampling import MagiSampling
from models.magi.vae import ViTVAE
from models.magi.weights import Checkpoint
from models.protocols import CELL_PIXELS, Autoencoder, CaptionTable, Pipeline
from parallel.health.errors import BAD_INPUT, FAILED, OK, GangError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel
from parallel.topology.split import stage_range

TOLERANCE = 1e-4
DECODED_TOLERANCE = 1e-2  # stored as fp16


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a golden file says of the engine."""

    name: str  # of the file, without its ending
    kind: str  # of the case
    error: float  # the largest relative error (Frobenius) among the latents
    detail: str  # what was compared, in words
    passed: bool  # whether everything agrees


@contextmanager
def _local_engine(pipeline: Pipeline, reuse: ReuseSettings) -> Iterator[Engine]:
    yield Engine(pipeline, reuse=reuse)


def _all_layers(config: MagiConfig) -> range | None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Venue:
    """Where cases of generation are run."""

    engine: Callable[[Pipeline, ReuseSettings], AbstractContextManager[Engine]] = _local_engine
    layers: Callable[[MagiConfig], range | None] = _all_layers  # which layers of a model are loaded; None for all
    device: str = "cpu"


_HERE = Venue()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Golden:
    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def to(self, device: str) -> _Golden:
        return replace(self, tensors={key: value.to(device) for key, value in self.tensors.items()})

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"{self.path} lacks the tensor {name}")
        return self.tensors[name]

    def json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self.metadata[key])
        except KeyError:
            raise InputError(f"{self.path} lacks the metadata {key}") from None
        except ValueError as error:
            raise InputError(f"{self.path}: the metadata {key} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: the metadata {key} is not a JSON object")
        return value

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in sorted(self.tensors.items()) if key.startswith(prefix)}


def check_file(path: Path, *, device: str = "cpu", venue: Venue | None = None) -> Verdict:
    """Run a golden file's case and compare.

    Args:
        path: the file.
        device: where to run it, without a venue.
        venue: where to run a case of generation; by default in this process.

    Raises:
        InputError: the file cannot be read, or is no golden file.
    """
    venue = venue or replace(_HERE, device=device)
    golden = _read(path)
    kind = golden.metadata.get("kind", "")
    checks = {"vae": _check_vae, "kv_selection": _check_selection}
    if kind != "generation" and kind not in checks:
        raise InputError(f"{path} has kind {kind!r}: known kinds are generation, {', '.join(checks)}")
    golden = golden.to(venue.device)
    with torch.no_grad():
        return _check_generation(golden, venue) if kind == "generation" else checks[kind](golden)


def load_stage(path: Path, venue: Venue) -> MagiModel | None:
    """The layers of a golden file's model that are run here; None if its case has no model.

    Raises:
        InputError: the file or its weights cannot be read.
    """
    golden = _read(path)
    if golden.metadata.get("kind") != "generation":
        return None
    return _load_model(golden, MagiConfig.from_dict(golden.json("config"), source=str(path)), venue)


def check_on_gang(
    gang: Gang,
    files: Sequence[Path],
    *,
    split: str | None = None,
    on_verdict: Callable[[Verdict], None],
    on_unreadable: Callable[[InputError], None] | None = None,
) -> None:
    """Check golden files on all ranks: cases of generation run over the gang, the others on the leader.

    Args:
        gang: this rank's; every rank calls this with the same files.
        files: golden files, their weights beside them.
        split: layers of each stage, as in `stage_sizes`.
        on_verdict: given each verdict, on the leader.
        on_unreadable: given the error of each file that cannot be read, on the leader; the others are checked all the
            same. Without it the first such file ends the gang.

    Raises:
        InputError: a file cannot be read, or the layout does not fit its model.
    """

    @contextmanager
    def engine(pipeline: Pipeline, reuse: ReuseSettings) -> Iterator[Engine]:
        with gang.lead(pipeline, reuse) as (made, _):
            yield made

    venue = Venue(engine=engine, layers=lambda config: stage_range(config, gang.mesh, split), device=str(gang.device))
    for path in files:
        try:
            _check_over_ranks(gang, path, venue, on_verdict)
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


def _check_over_ranks(gang: Gang, path: Path, venue: Venue, on_verdict: Callable[[Verdict], None]) -> None:
    """Check one file as the leader, or serve its layers."""
    try:
        model = load_stage(path, venue)
    except InputError as error:
        raise _Unreadable(error) from None
    if gang.mesh.leads:
        try:
            verdict = check_file(path, venue=venue)
        except InputError as error:
            if model is not None:  # the others serve it, and must be ended
                raise
            raise _Unreadable(error) from None
        on_verdict(verdict)
    elif model is not None:
        gang.serve(StageModel(model=model, attention=model.dit.attention))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected; infinite for a wrong shape or a NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.float()
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def _read(path: Path) -> _Golden:
    try:
        with safe_open(path, "pt") as file:
            return _Golden(
                path=path, metadata=file.metadata() or {}, tensors={key: file.get_tensor(key) for key in file.keys()}
            )
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the golden file {path}: {error}") from None


class _LatentPipeline:
    """A model without text encoder and autoencoder: a case brings captions and ends with latents."""

    def __init__(self, config: MagiConfig, model: MagiModel) -> None:
        self._config, self.model = config, model

    @property
    def attention(self) -> Attention:
        return self.model.dit.attention

    def sampling(self, num_steps: int, *, clean_pass: bool, copy_pass: bool) -> MagiSampling:
        return MagiSampling(config=self._config, num_steps=num_steps, clean_pass=clean_pass, copy_pass=copy_pass)

    @property
    def autoencoder(self) -> Autoencoder:
        raise ValueError("a golden case ends with latents")

    def captions(self, prompt: str) -> CaptionTable:
        raise ValueError("a golden case brings its own captions")


def _load_model(golden: _Golden, config: MagiConfig, venue: Venue) -> MagiModel:
    if "weights" not in golden.metadata:
        raise InputError(f"{golden.path} lacks the metadata weights")
    weights = golden.path.parent / golden.metadata["weights"]
    return MagiModel(Checkpoint(weights).dit(config, layers=venue.layers(config), device=venue.device))


def _check_generation(golden: _Golden, venue: Venue) -> Verdict:
    config = MagiConfig.from_dict(golden.json("config"), source=str(golden.path))
    model = _load_model(golden, config, venue)
    text = golden.tensor("input.caption_embs").float()[golden.tensor("input.caption_mask").bool()]
    captions = CaptionTable(text=text, null=model.dit.null_text())
    noise, prefix = golden.tensor("input.noise"), golden.tensors.get("input.prefix_latents")
    runtime = config.runtime_config
    request = Request(
        prompt=golden.path.stem,
        chunks=runtime.num_frames // runtime.temporal_downsample_factor // runtime.chunk_width,
        height=noise.shape[-2] * CELL_PIXELS,
        width=noise.shape[-1] * CELL_PIXELS,
        num_steps=runtime.num_steps,
        seed=0,
    )
    given = None if prefix is None else prefix.to(config.model_config.dtype)
    recorder = Recorder()
    encoded = Encoded(captions=captions, prefix=given, noise=GivenNoise(noise.cpu()))
    with venue.engine(_LatentPipeline(config, model), _reuse_settings(golden)) as engine:
        made = list(engine.generate_latents(request, encoded, recorder=recorder))
    expected = list(golden.named("output.chunk.").values())
    if len(made) != len(expected):
        detail = f"{len(made)} chunks, {len(expected)} expected"
        return _verdict(golden, error=float("inf"), detail=detail, passed=False)
    error = max(relative_error(a, b) for a, b in zip(made, expected, strict=True))
    detail, equal = f"{len(made)} chunks", True
    if "output.reuse_flags" in golden.tensors:
        flags = torch.from_numpy(recorder.finish({}).flags)
        equal = torch.equal(flags, golden.tensor("output.reuse_flags").cpu())
        detail += f", flags {'equal' if equal else 'differ'}"
    return _verdict(golden, error=error, detail=detail, passed=equal and error <= TOLERANCE)


_PUBLISHED = {"clean_forward": "clean_pass", "nearly_clean_mix": "copy_pass"}
"""Settings whose names in golden files are those of the published code."""


def _reuse_settings(golden: _Golden) -> ReuseSettings:
    given = {_PUBLISHED.get(name, name): value for name, value in golden.json("cache").items()}
    known = {field.name for field in fields(ReuseSettings)}
    if unknown := set(given) - known:
        raise InputError(f"{golden.path}: unknown cache setting {', '.join(sorted(unknown))}")
    return ReuseSettings(**given)


def _check_vae(golden: _Golden) -> Verdict:
    vae = ViTVAE(VaeConfig.from_dict(golden.json("config"), source=str(golden.path)))
    vae.load_state_dict({key: value.float() for key, value in golden.named("weights.").items()})
    vae.to(golden.device)
    latent_error = decoded_error = 0.0
    cases = golden.named("input.video.")
    for case, video in cases.items():
        latent = golden.tensor(f"output.latent_mode.{case}")
        latent_error = max(latent_error, relative_error(vae.encode(video.float()), latent))
        decoded_error = max(decoded_error, relative_error(vae.decode(latent), golden.tensor(f"output.decoded.{case}")))
    passed = latent_error <= TOLERANCE and decoded_error <= DECODED_TOLERANCE
    return _verdict(
        golden, error=latent_error, detail=f"{len(cases)} videos, decoded {decoded_error:.1e}", passed=passed
    )


def _check_selection(golden: _Golden) -> Verdict:
    config = golden.json("config")
    frames, height, width = config["grid_thw"]
    queries, keys = golden.tensor("input.query"), golden.tensor("input.key")
    wrong = []
    cases = golden.named("output.keep.")
    for case, expected in cases.items():
        retention, asking = case.split(".query_")
        settings = SelectionSettings(
            retention=cast(Granularity, retention),
            queries=cast(Granularity, asking),
            query_tokens=config["query_tokens_for_token_granularity"],
            importance_weight=config["mix_lambda"],
            pool=config["pool_kernel"],
        )
        sizes = {"frame_tokens": height * width, "chunk_tokens": frames * height * width}
        kept = select(queries, keys, keep=config["keep"], settings=settings, **sizes)
        if not torch.equal(kept, expected.to(kept.dtype)):
            wrong.append(case)
    detail = f"positions differ: {', '.join(wrong)}" if wrong else f"positions equal in {len(cases)} combinations"
    return _verdict(golden, error=0.0 if not wrong else float("inf"), detail=detail, passed=not wrong)


def _verdict(golden: _Golden, *, error: float, detail: str, passed: bool) -> Verdict:
    return Verdict(
        name=golden.path.stem, kind=golden.metadata.get("kind", ""), error=error, detail=detail, passed=passed
    )


# ---- the command


def check_conformance(
    files: Sequence[Path], options: Options, arguments: Sequence[str], *, report_error: Callable[[Exception], None]
) -> int:
    """Check golden files, one line for each, also where one cannot be read; of the options only the ranks count.

    Returns:
        The exit status: 0 if all pass, 1 if one fails, 2 if one cannot be read.

    Raises:
        InputError: the layout cannot be used.
        CommandFailed: on ranks, one has failed, or a file does not pass or cannot be read.
    """
    env = RankEnv.from_environment()
    if env is not None:
        return _command_as_rank(files, options, env)
    if not needs_ranks(options):
        return _command_here(files, report_error)
    start_ranks(arguments, options)
    return OK


def _command_here(files: Sequence[Path], report_error: Callable[[Exception], None]) -> int:
    console, status = Console(), OK
    for path in files:
        try:
            verdict = check_file(path)
        except InputError as error:
            report_error(error)
            status = BAD_INPUT
            continue
        _show(console, verdict)
        if not verdict.passed:
            status = max(status, FAILED)
    return status


def _command_as_rank(files: Sequence[Path], options: Options, env: RankEnv) -> int:
    """Check golden files as one of the ranks; the leader prints. Anything but success ends all ranks."""
    console, layout = Console(), f"pp {options.pp} x cp {options.cp}"
    failed: list[str] = []
    unreadable: list[InputError] = []

    def show(verdict: Verdict) -> None:
        _show(console, verdict, layout=layout)
        if not verdict.passed:
            failed.append(verdict.name)

    with join_ranks(env, options, trace=False) as gang:
        check_on_gang(gang, files, split=options.split, on_verdict=show, on_unreadable=unreadable.append)
        if unreadable:
            raise InputError("; ".join(dict.fromkeys(map(str, unreadable))))
        if failed:
            raise GangError(gang.monitor.fail(f"these do not pass: {', '.join(failed)}", status=FAILED))
    return OK


def _show(console: Console, verdict: Verdict, *, layout: str | None = None) -> None:
    parts = [part for part in (verdict.detail, layout) if part]
    detail = f"  {', '.join(parts)}" if parts else ""
    word, style = ("PASS", "green") if verdict.passed else ("FAIL", "bold red")
    line = f"{verdict.name:<24} relative error {verdict.error:.2e}{detail}  {word}"
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
