"""`flowcache conformance`: run what a published implementation ran, and compare (format: docs/conformance.md).

It knows the files' format and how far figures may differ. The weights file of a case lies beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.engine import Engine, Submission
from engine.kv.selection import Granularity, SelectionSettings, select
from engine.prepare import Encoded
from engine.record import Recorder
from engine.request import Request, given_noise
from engine.reuse.settings import ReuseSettings
from launch.generate import join_ranks, needs_ranks, start_ranks
from launch.options import Options
from models.errors import InputError
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import Checkpoint, Loading, MagiPipeline
from models.magi.vae import ViTVAE
from models.protocols import CELL_PIXELS, CaptionTable
from parallel.health.errors import BAD_INPUT, FAILED, OK, GangError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel
from parallel.topology.split import stage_range

TOLERANCE = 1e-4
DECODED_TOLERANCE = 1e-2  # stored as fp16
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
    config = golden.config()
    text = golden.tensor("input.caption_embs").float()[golden.tensor("input.caption_mask").bool()]
    captions = CaptionTable(text=text, null=model.null_text())
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
    encoded = Encoded(captions=captions, prefix=given, noise=given_noise(noise.cpu()))
    pipeline, reuse = MagiPipeline(config, model), _reuse_settings(golden)
    led = nullcontext((Engine(pipeline, reuse=reuse), None)) if gang is None else gang.lead(pipeline, reuse)
    with led as (engine, _):
        what = Submission(request=request, encoded=encoded)
        made = [chunk.latents for chunk in engine.generate(what, recorder=recorder, decode=False)]
    expected = list(golden.named("output.chunk.").values())
    if len(made) != len(expected):
        return float("inf"), f"{len(made)} chunks, {len(expected)} expected", False
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
    return ReuseSettings(**given)


def _check_vae(golden: _Golden) -> tuple[float, str, bool]:
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
    return latent_error, f"{len(cases)} videos, decoded {decoded_error:.1e}", passed


def _check_selection(golden: _Golden) -> tuple[float, str, bool]:
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
