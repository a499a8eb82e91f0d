"""Golden files of whole videos: `generation`, and `reuse_decisions`, which was run in bf16 and again in fp32.

The engine makes the videos, here or over a gang. The weights file lies beside the case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from engine.engine import Engine
from engine.executor import KVWatcher, LocalRunner
from engine.kv.layout import KVSettings
from engine.record import NOT_ACTIVE, Recorder, RunRecord
from engine.request import Encoded, Request
from engine.reuse.policy import Decision, Observation, ReuseSettings, change_norms
from engine.schedule import Schedule, Tick
from engine.submission import Submission
from engine.video import given_noise
from launch.conformance.golden import Golden
from models.checkpoint import Loading
from models.config import checked
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import MagiPipeline
from models.magi.weights import Checkpoint
from models.protocols import CELL_PIXELS, CaptionTable, Pipeline
from parallel.mesh import Mesh
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel
from parallel.split import stage_range

_PUBLISHED = {"clean_forward": "clean_pass", "nearly_clean_mix": "copy_pass"}
"""Settings whose names in golden files are those of the published code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One making of a case's video."""

    golden: Golden
    config: MagiConfig
    reuse: ReuseSettings

    def layers(self, mesh: Mesh, split: str | None) -> range:
        """The layers of a rank's stage; errors as in `stage_sizes`."""
        return stage_range(self.config, mesh, split)

    def load(self, layers: range | None) -> MagiDiT:
        """The model, with the layers that are run here; all by default."""
        weights = Checkpoint(self.golden.path.parent / self.golden.text("weights"))
        return weights.dit(self.config, Loading(layers=layers, device=self.golden.device))

    def make(self, model: MagiDiT, gang: Gang | None) -> Result:
        """Make the case's video with a model; on all ranks of a gang, as its leader."""
        golden, shapes, runtime = self.golden, self.config.model_config, self.config.runtime_config
        chunks = runtime.num_frames // runtime.temporal_downsample_factor // runtime.chunk_width
        rows = (shapes.caption_max_length, shapes.caption_channels)
        embedded, mask = golden.tensor("input.caption_embs", rows), golden.tensor("input.caption_mask", rows[:1])
        captions = CaptionTable(text=embedded.float()[mask.bool()], null=model.null_text())
        channels, width = shapes.latent_channels, runtime.chunk_width
        prefix = golden.tensors.get("input.prefix_latents")
        given = 0 if prefix is None else golden.tensor("input.prefix_latents", (1, channels, None, None, None)).shape[2]
        frames = (chunks + math.ceil(given / width)) * width
        size = (None, None) if prefix is None else prefix.shape[-2:]
        noise = golden.tensor("input.noise", (1, channels, frames, *size))
        for index in range(frames // width - given // width):
            golden.tensor(f"output.chunk.{index:03}")
        if self.reuse.policy != "none":
            golden.tensor("output.reuse_flags")
        prefix = None if prefix is None else prefix.to(shapes.dtype)
        encoded = Encoded(captions=captions, prefix=prefix, noise=lambda span: given_noise(noise.cpu()))
        request = video_request(golden, chunks, noise.shape[-2:], runtime.num_steps)
        pipeline = MagiPipeline(self.config, model)
        made, record = make_video(pipeline, request, encoded, gang, reuse=self.reuse, kv=KVSettings())
        return Result(run=self, model=model, chunks=made, record=record)

    def serve(self, model: MagiDiT, gang: Gang) -> None:
        """The same on the other ranks."""
        gang.serve(StageModel(model=model, attention=model.attention))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run has made."""

    run: Run
    model: MagiDiT  # the layers that are held here, the first among them
    chunks: list[Tensor]  # clean latents [1, C, t, h, w]
    record: RunRecord


def runs_of(golden: Golden) -> list[Run]:
    """The runs of a case, in order: one of `generation`, two of `reuse_decisions`."""
    config, reuse = golden.config(), _reuse_settings(golden)
    if golden.kind == "generation":
        return [Run(golden=golden, config=config, reuse=reuse)]
    single = replace(config, model_config=replace(config.model_config, params_dtype="torch.float32"))
    rounded = Run(golden=golden, config=config, reuse=replace(reuse, distance="bf16"))
    return [rounded, Run(golden=golden, config=single, reuse=reuse)]


def _reuse_settings(golden: Golden) -> ReuseSettings:
    given = {_PUBLISHED.get(name, name): value for name, value in golden.json("cache").items()}
    known = {field.name for field in fields(ReuseSettings)}
    if unknown := set(given) - known:
        raise InputError(f"{golden.path}: unknown cache setting {', '.join(sorted(unknown))}")
    return checked(ReuseSettings, given, source=f"{golden.path}: cache")


def video_request(golden: Golden, chunks: int, size: Sequence[int], num_steps: int) -> Request:
    """What is asked for in a case; `size` in latent cells."""
    height, width = (CELL_PIXELS * cells for cells in size)
    return Request(prompt=golden.path.stem, chunks=chunks, height=height, width=width, num_steps=num_steps, seed=0)


def make_video(
    pipeline: Pipeline,
    request: Request,
    encoded: Encoded,
    gang: Gang | None,
    *,
    reuse: ReuseSettings,
    kv: KVSettings,
    watcher: KVWatcher | None = None,
) -> tuple[list[Tensor], RunRecord]:
    """Clean latents of the chunks of a video, and its record; it is made here, or by a gang whose leader this is."""
    runner = LocalRunner(pipeline.model, pipeline.attention, watcher=watcher)
    here = nullcontext((Engine(pipeline, runner, reuse=reuse, kv=kv), None))
    recorder, what = Recorder(), Submission(request=request, encoded=encoded)
    with here if gang is None else gang.lead(pipeline, reuse, kv, watcher=watcher) as (engine, _):
        made = [chunk.latents for chunk in engine.generate(what, recorder=recorder, decode=False)]
    return made, recorder.finish({})


def made_by(golden: Golden, results: Sequence[Result]) -> Iterator[tuple[str, Tensor]]:
    """What a case's runs have made, by the names of the tensors that it must equal."""
    first = results[0]
    for index, chunk in enumerate(first.chunks):
        yield f"output.chunk.{index:03}", chunk
    if "output.reuse_flags" in golden.tensors:
        yield "output.reuse_flags", torch.from_numpy(first.record.flags)
    if golden.kind == "reuse_decisions":
        single = results[1].record
        yield "fp32.reuse_flags", torch.from_numpy(single.flags)
        yield from _decisions("fp32", results[1], torch.from_numpy(single.distances).double())
        yield from _decisions("output", first, _distances_of_latents(golden, first))


def _distances_of_latents(golden: Golden, result: Result) -> Tensor:
    """The published distance of every chunk at every tick, [ticks, chunks] fp64, of the latents that the file gives."""
    schedule, width = result.record.schedule.spans[0], result.run.config.runtime_config.chunk_width
    distances = torch.full((schedule.ticks, schedule.chunks), torch.nan, dtype=torch.float64)
    before: dict[int, Tensor] = {}
    for tick in schedule:
        latents = golden.tensor(f"latents.{tick.index:03}", (1, None, width * len(tick.active), None, None))
        for (chunk, step), x in zip(tick.active, latents.split(width, dim=2), strict=True):
            now = result.model.patches(x)
            if chunk in before:
                change, scale = (norm.item() for norm in change_norms(before[chunk], now, torch.bfloat16))
                distance = _observation(tick, schedule, chunk, step, change, scale=scale, rounded=True).distance
                assert distance is not None
                distances[tick.index, chunk] = distance
            before[chunk] = now
    return distances


def _decisions(prefix: str, result: Result, distances: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is decided of distances [ticks, chunks]: flags, and the distances and sums that they come from."""
    schedule, reuse, policy = result.record.schedule.spans[0], result.run.reuse, result.run.reuse.new_policy()
    used, sums = torch.full_like(distances, torch.nan), torch.full_like(distances, torch.nan)
    flags = torch.full(distances.shape, NOT_ACTIVE, dtype=torch.uint8)
    since = [0.0] * schedule.chunks  # of each chunk, since it was last computed
    for tick in schedule:
        at = distances[tick.index]
        seen = [_observation(tick, schedule, chunk, step, at[chunk].item()) for chunk, step in tick.active]
        for one, decision in zip(seen, policy.decide(seen), strict=True):
            place = tick.index, one.chunk
            if one.step >= reuse.warmup_steps and not one.final:
                since[one.chunk] += at[one.chunk].item()
                used[place], sums[place] = at[one.chunk], since[one.chunk]
            flags[place] = decision.value
            if decision is Decision.COMPUTE:
                since[one.chunk] = 0.0
    yield from ((f"{prefix}.distance", used), (f"{prefix}.sum", sums), (f"{prefix}.reuse_flags", flags))


def _observation(
    tick: Tick, schedule: Schedule, chunk: int, step: int, change: float, *, scale: float = 1.0, rounded: bool = False
) -> Observation:
    last = tick.index == schedule.ticks - 1
    return Observation(chunk=chunk, step=step, tick=tick.index, final=last, change=change, scale=scale, rounded=rounded)
