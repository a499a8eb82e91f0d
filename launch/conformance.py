"""`flowcache conformance`: run what a published implementation ran, and compare (format: docs/conformance.md).

It knows the files' format and how far figures may differ. The weights file of a case lies beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.engine import Engine, Submission
from engine.kv.selection import Granularity, SelectionSettings, select
from engine.record import Recorder
from engine.request import Encoded, Request
from engine.reuse.policy import ReuseSettings
from engine.video import given_noise
from launch.generate import join_ranks, needs_ranks, start_ranks
from launch.options import Options
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig, checked
from models.magi.dit import MagiDiT
from models.magi.pipeline import MagiPipeline
from models.magi.vae import ViTVAE
from models.magi.weights import Checkpoint, Loading
from models.protocols import CELL_PIXELS, CaptionTable
from parallel.health.errors import GangError
from parallel.health.exit_codes import BAD_INPUT, FAILED, OK
from parallel.mesh import stage_range
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel

TOLERANCE = 1e-4
DECODED_TOLERANCE = 1e-2  # stored as fp16
_Side = Annotated[int, Field(ge=1, le=1_000)]
_KINDS = ("generation", "vae", "kv_selection")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a golden file says of the engine."""

    name: str  # of the file, without its ending
    kind: str  # of the case: generation, vae or kv_selection
    error: float  # the largest relative error (Frobenius) among the latents
    detail: str  # what was compared, in words
    passed: bool  # whether everything agrees


@dataclass(frozen=True, kw_only=True, slots=True)
class _Golden:
    """A golden file, its tensors on the device that computes."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    device: str

    @property
    def kind(self) -> str:
        return self.metadata.get("kind", "")

    def tensor(self, name: str, shape: Sequence[int | None] | None = None) -> Tensor:
        """A tensor, of a shape in which None stands for any number above 0."""
        if name not in self.tensors:
            raise InputError(f"{self.path} lacks the tensor {name}")
        tensor = self.tensors[name]
        found = tuple(tensor.shape)
        if shape is not None and (
            len(shape) != len(found) or any(n < 1 or n != (want or n) for n, want in zip(found, shape, strict=True))
        ):
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise InputError(f"{self.path}: {name} has the shape {list(found)} and not [{wanted}]")
        return tensor

    def json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self.metadata[key])
        except KeyError:
            raise InputError(f"{self.path} lacks the metadata {key}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: the metadata {key} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: the metadata {key} is not a JSON object")
        return value

    def config(self) -> MagiConfig:
        return MagiConfig.from_dict(self.json("config"), source=str(self.path))

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in sorted(self.tensors.items()) if key.startswith(prefix)}


def check_file(path: Path, *, device: str = "cpu") -> Verdict:
    """Run a golden file's case in this process and compare; an `InputError` if it cannot be read, or is none."""
    golden = _read(path, device)
    return _check(golden, _load_model(golden, None), None)


def check_on_gang(
    gang: Gang,
    files: Sequence[Path],
    *,
    split: str | None = None,
    on_verdict: Callable[[Verdict], None],
    on_unreadable: Callable[[InputError], None] | None = None,
) -> None:
    """Check golden files on all ranks: cases of generation run over the gang, the others on the leader.

    Every rank calls this with the same files; `split` is as in `stage_sizes`. The leader is given each verdict, and the
    error of each file that cannot be read; the others are checked all the same. Without `on_unreadable` the first such
    file ends the gang.

    Raises:
        InputError: a file cannot be read, or the layout does not fit its model.
    """
    for path in files:
        model = None
        try:
            golden = _read(path, str(gang.device))
            model = _load_model(golden, lambda config: stage_range(config, gang.mesh, split))
            if gang.mesh.leads:
                on_verdict(_check(golden, model, gang))
            elif model is not None:
                gang.serve(StageModel(model=model, attention=model.attention))
        except InputError as error:
            if model is not None or on_unreadable is None:  # the others serve the model, and must be ended
                raise
            if gang.mesh.leads:
                on_unreadable(error)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected; infinite for a wrong shape or a NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.float()
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def _read(path: Path, device: str) -> _Golden:
    try:
        with safe_open(path, "pt", device=device) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            golden = _Golden(path=path, metadata=file.metadata() or {}, tensors=tensors, device=device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the golden file {path}: {error}") from None
    if golden.kind not in _KINDS:
        raise InputError(f"{path} has kind {golden.kind!r}: known kinds are {', '.join(_KINDS)}")
    return golden


def _load_model(golden: _Golden, layers: Callable[[MagiConfig], range] | None) -> MagiDiT | None:
    """The case's model, with the layers that are run here (None: all); None if the case has no model."""
    if golden.kind != "generation":
        return None
    if "weights" not in golden.metadata:
        raise InputError(f"{golden.path} lacks the metadata weights")
    config, weights = golden.config(), Checkpoint(golden.path.parent / golden.metadata["weights"])
    return weights.dit(config, Loading(layers=None if layers is None else layers(config), device=golden.device))


@torch.no_grad()
def _check(golden: _Golden, model: MagiDiT | None, gang: Gang | None) -> Verdict:
    """Run the case, with its model if it has one; a case of generation on all ranks of a gang."""
    if model is not None:
        error, detail, passed = _check_generation(golden, model, gang)
    else:
        error, detail, passed = (_check_vae if golden.kind == "vae" else _check_selection)(golden)
    return Verdict(name=golden.path.stem, kind=golden.kind, error=error, detail=detail, passed=passed)


def _check_generation(golden: _Golden, model: MagiDiT, gang: Gang | None) -> tuple[float, str, bool]:
    config, reuse = golden.config(), _reuse_settings(golden)
    shapes, runtime = config.model_config, config.runtime_config
    chunks = runtime.num_frames // runtime.temporal_downsample_factor // runtime.chunk_width
    rows = (shapes.caption_max_length, shapes.caption_channels)
    embedded, mask = golden.tensor("input.caption_embs", rows), golden.tensor("input.caption_mask", rows[:1])
    captions = CaptionTable(text=embedded.float()[mask.bool()], null=model.null_text())
    channels, width, prefix = shapes.latent_channels, runtime.chunk_width, golden.tensors.get("input.prefix_latents")
    given = 0 if prefix is None else golden.tensor("input.prefix_latents", (1, channels, None, None, None)).shape[2]
    frames = (chunks + math.ceil(given / width)) * width
    size = (None, None) if prefix is None else prefix.shape[-2:]
    noise = golden.tensor("input.noise", (1, channels, frames, *size))
    prefix = None if prefix is None else prefix.to(shapes.dtype)
    expected = [golden.tensor(f"output.chunk.{index:03}") for index in range(frames // width - given // width)]
    request = Request(
        prompt=golden.path.stem,
        chunks=chunks,
        height=noise.shape[-2] * CELL_PIXELS,
        width=noise.shape[-1] * CELL_PIXELS,
        num_steps=runtime.num_steps,
        seed=0,
    )
    if reuse.policy != "none":
        golden.tensor("output.reuse_flags")
    recorder = Recorder()
    encoded = Encoded(captions=captions, prefix=prefix, noise=given_noise(noise.cpu()))
    pipeline = MagiPipeline(config, model)
    led = nullcontext((Engine(pipeline, reuse=reuse), None)) if gang is None else gang.lead(pipeline, reuse)
    with led as (engine, _):
        what = Submission(request=request, encoded=encoded)
        made = [chunk.latents for chunk in engine.generate(what, recorder=recorder, decode=False)]
    error = max(relative_error(a, b) for a, b in zip(made, expected, strict=True))
    detail, equal = f"{len(made)} chunks", True
    if "output.reuse_flags" in golden.tensors:
        flags = torch.from_numpy(recorder.finish({}).flags)
        equal = torch.equal(flags, golden.tensor("output.reuse_flags").cpu())
        detail += f", flags {'equal' if equal else 'differ'}"
    return error, detail, equal and error <= TOLERANCE


_PUBLISHED = {"clean_forward": "clean_pass", "nearly_clean_mix": "copy_pass"}
"""Settings whose names in golden files are those of the published code."""


def _reuse_settings(golden: _Golden) -> ReuseSettings:
    given = {_PUBLISHED.get(name, name): value for name, value in golden.json("cache").items()}
    known = {field.name for field in fields(ReuseSettings)}
    if unknown := set(given) - known:
        raise InputError(f"{golden.path}: unknown cache setting {', '.join(sorted(unknown))}")
    return checked(ReuseSettings, given, source=f"{golden.path}: cache")


def _check_vae(golden: _Golden) -> tuple[float, str, bool]:
    vae = ViTVAE(VaeConfig.from_dict(golden.json("config"), source=str(golden.path)))
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    vae.load_state_dict({name: golden.tensor(f"weights.{name}", shape).float() for name, shape in shapes.items()})
    vae.to(golden.device)
    latent_error = decoded_error = 0.0
    cases = sorted(golden.named("input.video.") | golden.named("output.latent_mode.") | golden.named("output.decoded."))
    if not cases:
        raise InputError(f"{golden.path} lacks the tensors input.video")
    for case in cases:
        video = golden.tensor(f"input.video.{case}", (None, vae.config.in_chans, None, None, None))
        latent = golden.tensor(f"output.latent_mode.{case}", (video.shape[0], vae.config.z_chans, None, None, None))
        latent_error = max(latent_error, relative_error(vae.encode(video.float()), latent))
        decoded_error = max(decoded_error, relative_error(vae.decode(latent), golden.tensor(f"output.decoded.{case}")))
    passed = latent_error <= TOLERANCE and decoded_error <= DECODED_TOLERANCE
    return latent_error, f"{len(cases)} videos, decoded {decoded_error:.1e}", passed


@dataclass(frozen=True, kw_only=True, slots=True)
class _SelectionConfig:
    """The configuration of a case of selection, by its published names."""

    mix_lambda: Annotated[float, Field(ge=0, le=1)]
    pool_kernel: Annotated[int, Field(ge=1, le=1_000)]
    keep: Annotated[int, Field(ge=1, le=1_000_000)]
    grid_thw: tuple[_Side, _Side, _Side]
    query_tokens_for_token_granularity: Annotated[int, Field(ge=1, le=1_000_000)]
    gqa_pool: Literal["max"]


def _check_selection(golden: _Golden) -> tuple[float, str, bool]:
    config = checked(_SelectionConfig, golden.json("config"), source=f"{golden.path}: config")
    frames, height, width = config.grid_thw
    frame, chunk = height * width, frames * height * width
    queries, keys = golden.tensor("input.query", (None, None, None)), golden.tensor("input.key", (None, None, None))
    (asking, heads, size), (length, groups, _) = queries.shape, keys.shape
    whole = not length % chunk and asking <= chunk
    if not whole or size != keys.shape[2] or heads % groups or config.keep > length or config.keep % chunk:
        raise InputError(
            f"{golden.path}: keys {list(keys.shape)} and queries {list(queries.shape)} do not fit together"
        )
    wrong = []
    cases = [(kept, asked) for kept in get_args(Granularity) for asked in get_args(Granularity)]
    for retention, who in cases:
        expected = golden.tensor(f"output.keep.{retention}.query_{who}", (config.keep, groups))
        settings = SelectionSettings(
            retention=retention,
            queries=who,
            query_tokens=config.query_tokens_for_token_granularity,
            importance_weight=config.mix_lambda,
            pool=config.pool_kernel,
        )
        kept = select(queries, keys, keep=config.keep, settings=settings, frame_tokens=frame, chunk_tokens=chunk)
        if not torch.equal(kept, expected.to(kept.dtype)):
            wrong.append(f"{retention}.query_{who}")
    detail = f"positions differ: {', '.join(wrong)}" if wrong else f"positions equal in {len(cases)} combinations"
    return float("inf") if wrong else 0.0, detail, not wrong


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
    if env is None and needs_ranks(options):
        start_ranks(arguments, options)
        return OK
    failed: list[str] = []
    unreadable: list[InputError] = []
    layout = "" if env is None else f", pp {options.pp} x cp {options.cp}"

    def show(verdict: Verdict) -> None:
        word, style = ("PASS", "green") if verdict.passed else ("FAIL", "bold red")
        line = f"{verdict.name:<24} relative error {verdict.error:.2e}  {verdict.detail}{layout}  {word}"
        Console().print(line, style=style, highlight=False, markup=False, soft_wrap=True)
        if not verdict.passed:
            failed.append(verdict.name)

    if env is None:
        for path in files:
            try:
                show(check_file(path))
            except InputError as error:
                unreadable.append(error)
                report_error(error)
        return BAD_INPUT if unreadable else FAILED if failed else OK
    with join_ranks(env, options) as gang:  # anything but success ends all ranks
        check_on_gang(gang, files, split=options.split, on_verdict=show, on_unreadable=unreadable.append)
        if unreadable:
            raise InputError("; ".join(dict.fromkeys(map(str, unreadable))))
        if failed:
            raise GangError(gang.monitor.fail(f"these do not pass: {', '.join(failed)}", status=FAILED))
    return OK
