"""Golden files of whole videos of SkyReels-V2 and of Self-Forcing: `wan_generation`, `wan_self_forcing`.

The engine makes them, here or over a gang. Groups of latent frames are made as one long video, span by span; each whole
window as a video of its own, as what it takes over from the one before is in the file. The weights file lies beside the
case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.record import RunRecord
from engine.request import Encoded
from engine.reuse.policy import CONDITION, ChunkPolicy, Decision, ReuseSettings
from engine.video import Noise, WorkItem
from launch.conformance.forward import softmax_in_fp32, wan_config
from launch.conformance.generation import make_video, video_request
from launch.conformance.golden import Golden
from models.attention import Attention
from models.checkpoint import Loading
from models.config import checked
from models.errors import InputError
from models.protocols import CELL_FRAMES, Autoencoder, CaptionTable, Sampling
from models.wan.config import CAUSAL_WAN, WanConfig
from models.wan.dit import WanDiT
from models.wan.sampling.changes import KEPT_STEPS, POLYNOMIALS, condition_changes
from models.wan.sampling.forcing import BlockSampling, WindowSampling
from models.wan.sampling.self_forcing import SelfForcingSampling
from models.wan.weights import WanWeights
from parallel.mesh import Mesh
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel
from parallel.split import stage_range

_Count = Annotated[int, Field(ge=0, le=100_000)]
_POLICIES = {"": "none", "flowcache": "flowcache", "teacache": "teacache-cyclic"}
"""The engine's names of published ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sampling:
    """Arguments of the published call."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1_000)]
    shift: float
    guidance_scale: float
    fps: _Count
    base_num_frames: _Count
    num_frames: _Count
    ar_step: _Count
    causal_block_size: Annotated[int, Field(ge=1, le=1_000)]
    overlap_history: _Count | None = None
    addnoise_condition: _Count = 0
    causal_attention: bool = False  # the mask that is causal by blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Policy:
    """The published reuse; an empty one makes a video as published without it."""

    policy: Literal["", "flowcache", "teacache"] = ""
    threshold: float = 0.0
    use_ret_steps: bool = True
    coefficients: str = "1.3B"
    num_steps: _Count = 0
    use_kvrange: bool = False
    kvrange: _Count = 0
    use_compress: bool = False
    budget_block: _Count = 0

    @property
    def polynomial(self) -> tuple[float, ...]:
        return POLYNOMIALS[self.coefficients, self.use_ret_steps]

    def reuse(self) -> ReuseSettings:
        """A threshold below zero computes everything."""
        return ReuseSettings(
            policy="none" if self.threshold < 0 else _POLICIES[self.policy],
            threshold=max(0.0, self.threshold),
            warmup_steps=KEPT_STEPS[self.use_ret_steps],
            cycle=self.num_steps or None,
            distance=CONDITION if self.policy else "fp32",
            polynomial=self.polynomial,
            clean_pass=False,
            copy_pass=False,
        )

    def kv(self) -> KVSettings:
        if not self.use_compress:
            return KVSettings()
        return KVSettings(budget=self.budget_block, selection=SelectionSettings(queries="chunk", asks="next"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Making:
    """A video that the engine is to make, in the layout that it knows."""

    sampling: Sampling
    captions: CaptionTable
    frames: tuple[int, ...]  # latent frames that are made, and those in front of them, of each span
    given: tuple[int, ...]
    size: tuple[int, int]  # latent cells
    prefix: Tensor | None  # [1, C, P, h, w]
    noise: Callable[[int], Noise]
    reuse: ReuseSettings
    kv: KVSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class WanRun:
    """Iterations of a case that are made as one video."""

    golden: Golden
    config: WanConfig
    iterations: range

    def load(self, layers: range | None) -> WanDiT:
        """The model, with the layers that are run here; all by default. In bf16 attention is the published one."""
        weights = WanWeights(self.golden.path.parent / self.golden.text("weights"))
        model = weights.dit(self.config, Loading(layers=layers, device=self.golden.device))
        if self.config.dtype == torch.bfloat16:
            model.attention = softmax_in_fp32(model.attention)
        return model

    def layers(self, mesh: Mesh, split: str | None) -> range:
        """The layers of a rank's stage; errors as in `stage_sizes`."""
        return stage_range(self.config, mesh, split)

    def make(self, model: WanDiT, gang: Gang | None) -> list[WanResult]:
        """Make the iterations with a model; on all ranks of a gang, as its leader."""
        golden = self.golden
        making = _self_forcing(golden) if golden.kind == "wan_self_forcing" else _forcing(self, model)
        sampling = making.sampling
        chunks = sum(-(-frames // sampling.chunk_width) for frames in making.frames)
        request = video_request(golden, chunks, making.size, sampling.num_steps)
        encoded = Encoded(captions=making.captions, prefix=making.prefix, noise=making.noise)
        pipeline, log = Latents(model=model, how=sampling), KeptLog()
        parts, record = make_video(pipeline, request, encoded, gang, reuse=making.reuse, kv=making.kv, watcher=log)
        made, kept = torch.cat(parts, dim=2), log.whole(gang)
        results, latents = list[WanResult](), making.prefix
        for place, iteration in enumerate(self.iterations):
            own = made[:, :, sum(making.frames[:place]) : sum(making.frames[: place + 1])]
            if latents is not None:
                latents = latents[:, :, latents.shape[2] - making.given[place] :]
            latents = own if latents is None else torch.cat([latents.to(own), own], dim=2)
            of_span = record.of_span(place)
            results.append(WanResult(iteration=iteration, latents=latents, record=of_span, kept=kept[place]))
        return results

    def serve(self, model: WanDiT, gang: Gang) -> None:
        """The same on the other ranks."""
        log = KeptLog()
        gang.serve(StageModel(model=model, attention=model.attention, watcher=log))
        log.whole(gang)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """A `Pipeline` that ends with latents."""

    model: WanDiT
    how: Sampling

    @property
    def attention(self) -> Attention:
        return self.model.attention

    @property
    def autoencoder(self) -> Autoencoder:
        raise AssertionError("latents are not decoded")

    def sampling(self, num_steps: int, *, clean_pass: bool, copy_pass: bool, given: int = 0, ends: int = 0) -> Sampling:
        return self.how

    def captions(self, prompt: str) -> CaptionTable:
        raise AssertionError("captions are given")

    def see(self, image: Tensor) -> None:
        """Nothing."""


def wan_runs(golden: Golden) -> list[WanRun]:
    """The videos of a case, in order."""
    config = wan_config(golden)
    if golden.kind == "wan_self_forcing":
        precision = replace(CAUSAL_WAN, dtype=config.precision.dtype)
        return [WanRun(golden=golden, config=replace(config, precision=precision), iterations=range(1))]
    count = len(golden.named("output.latents.iter"))
    if not count:
        raise InputError(f"{golden.path} lacks the tensors output.latents.iter")
    if _policy(golden).policy == "flowcache":
        return [WanRun(golden=golden, config=config, iterations=range(count))]
    return [WanRun(golden=golden, config=config, iterations=range(one, one + 1)) for one in range(count)]


class KeptLog:
    """What compressions see and keep in each span, by the ends of the names that files have; a `KVWatcher`."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Tensor]] = []

    def admitted(self) -> None:
        """The next span."""
        self.spans.append({})

    def kept(self, item: WorkItem, branch: int, layer: int, queries: Tensor, keys: Tensor, positions: Tensor) -> None:
        """Take down; of heads in order."""
        kept, name = self.spans[-1], f"row{item.tick}.{('cond', 'uncond')[branch]}.layer{layer}"
        kept[f"keep.{name}"] = positions.sort(dim=0).values.to(torch.int16)
        kept[f"keep_key.{name}"], kept[f"keep_query.{name}"] = keys.clone(), queries.clone()

    def whole(self, gang: Gang | None) -> list[dict[str, Tensor]]:
        """That of all ranks, the heads of a layer side by side; every rank calls it once a model is let go."""
        if gang is None:
            return self.spans
        own = {f"{span}/{name}": part for span, kept in enumerate(self.spans) for name, part in kept.items()}
        parts = gang.collect(own)
        spans = [dict[str, Tensor]() for _ in self.spans]
        for key in dict.fromkeys(key for part in parts for key in part):
            span, _, name = key.partition("/")
            spans[int(span)][name] = torch.cat([part[key] for part in parts if key in part], dim=1)
        return spans


@dataclass(frozen=True, kw_only=True, slots=True)
class WanResult:
    """What was made of an iteration."""

    iteration: int
    latents: Tensor  # [1, C, T, h, w], with the given ones
    record: RunRecord
    kept: dict[str, Tensor]  # what compressions saw and kept, by the ends of names


def _policy(golden: Golden) -> _Policy:
    given = golden.json("policy") if "policy" in golden.metadata else {}
    return checked(_Policy, given, source=f"{golden.path}: policy")


def _captions(golden: Golden) -> CaptionTable:
    channels = golden.json("config").get("text_dim")
    text = golden.tensor("input.context", (1, None, channels))[0]
    negative = golden.tensors.get("input.negative_context", torch.zeros_like(text)[None])[0]
    return CaptionTable(text=text, null=negative)


def _forcing(run: WanRun, model: WanDiT) -> _Making:
    golden, iteration = run.golden, run.iterations[0]
    asked = checked(_Sampling, golden.json("sampling"), source=f"{golden.path}: sampling")
    policy, channels = _policy(golden), model.latent_channels
    noise = golden.tensor(f"input.noise.iter{iteration}", (channels, None, None, None))[None]
    prefix = golden.tensors.get(f"input.prefix_latents.iter{iteration}")
    end = golden.tensors.get("input.end_latents")
    frames, given = noise.shape[2], 0 if prefix is None else prefix.shape[1]
    common: dict[str, Any] = {
        "steps": asked.num_inference_steps,
        "shift": asked.shift,
        "guidance": asked.guidance_scale,
        "fps": asked.fps,
        "block": asked.causal_block_size,
        "ar_step": asked.ar_step,
        "frames": frames,
        "noise_condition": asked.addnoise_condition,
        "dtype": model.config.dtype,
    }
    causal = asked.causal_attention or golden.path.stem == "df_causal"  # which, as published, says so by its name
    sampling: BlockSampling | WindowSampling
    if causal or policy.policy == "flowcache":
        restricted = policy.use_kvrange or policy.use_compress
        key_range = policy.kvrange if policy.use_kvrange and not policy.use_compress else None
        sampling = BlockSampling(**common, clean_pass=causal, key_range=key_range, hides_prefix=restricted)
        steps: list[tuple[float, ...]] = [(float(time),) for time in sampling.sigmas.timesteps]
        changes = condition_changes(model, steps, asked.fps)
    else:
        ends = 0 if end is None else end.shape[1]
        sampling = WindowSampling(**common, given=given, ends=ends)
        steps = [sampling.times(row) for row in range(sampling.num_steps)]
        changes = condition_changes(model, steps, asked.fps, of_head=not policy.use_ret_steps)
    sizes = [golden.tensor(f"output.latents.iter{one}").shape[1] for one in run.iterations]
    overlap = 0 if asked.overlap_history is None else (asked.overlap_history - 1) // CELL_FRAMES + 1
    before = (given, *[overlap] * (len(sizes) - 1))
    if isinstance(sampling, WindowSampling):  # an image's latent is handed out with those that are made
        sizes, before = [sampling.chunk_width], (0 if given == 1 else given,)
    else:
        sampling = replace(sampling, overlap_frames=overlap)
    return _Making(
        sampling=replace(sampling, changes=changes),
        captions=_captions(golden),
        frames=tuple(size - own for size, own in zip(sizes, before, strict=True)),
        given=before,
        size=(noise.shape[3], noise.shape[4]),
        prefix=None if prefix is None else prefix[None],
        noise=lambda span: _noise(golden, run.iterations[span], end),
        reuse=replace(policy.reuse(), clean_pass=causal),
        kv=policy.kv(),
    )


def _noise(golden: Golden, iteration: int, end: Tensor | None) -> Noise:
    whole = golden.tensor(f"input.noise.iter{iteration}", (None, None, None, None))[None]
    whole = whole if end is None else torch.cat([whole, end[None]], dim=2)
    added = golden.tensors.get(f"input.addnoise.iter{iteration}")

    def noise(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
        start = chunk * shape[2]
        if not draw:
            return whole[:, :, start : start + shape[2]].float().clone()
        if added is None:
            raise InputError(f"{golden.path} lacks the tensor input.addnoise.iter{iteration}")
        return added[draw - 1][None, :, start : start + shape[2]].float()

    return noise


# ---- Self-Forcing


@dataclass(frozen=True, kw_only=True, slots=True)
class _SelfForcing:
    num_frame_per_block: Annotated[int, Field(ge=1, le=1_000)]
    denoising_step_list: tuple[_Count, ...]
    warp_denoising_step: Literal[True]
    timestep_shift: float
    context_noise: float
    local_attn_size: int
    sink_size: _Count
    denoised_timesteps: tuple[float, ...]


def _self_forcing(golden: Golden) -> _Making:
    asked = checked(_SelfForcing, golden.json("sampling"), source=f"{golden.path}: sampling")
    sampling = SelfForcingSampling(
        steps=asked.denoising_step_list,
        shift=asked.timestep_shift,
        chunk_width=asked.num_frame_per_block,
        held=asked.local_attn_size if asked.local_attn_size > 0 else None,
        sink_frames=asked.sink_size,
        context_noise=asked.context_noise,
    )
    whole = golden.tensor("input.noise", (1, None, None, None, None)).transpose(1, 2)
    again = golden.tensor("input.renoise", (None, sampling.chunk_width, *whole.shape[1:2], *whole.shape[3:]))
    prefix = golden.tensors.get("input.prefix_latents")
    given = 0 if prefix is None else prefix.shape[1]
    first, draws = given // sampling.chunk_width, sampling.num_steps - 1

    def noise(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
        place = chunk - first
        if not draw:
            return whole[:, :, place * shape[2] : (place + 1) * shape[2]].clone()
        return again[place * draws + draw - 1].transpose(0, 1)[None]

    return _Making(
        sampling=sampling,
        captions=_captions(golden),
        frames=(whole.shape[2],),
        given=(given,),
        size=(whole.shape[3], whole.shape[4]),
        prefix=None if prefix is None else prefix.transpose(1, 2),
        noise=lambda span: noise,
        reuse=ReuseSettings(),
        kv=KVSettings(),
    )


# ---- what is compared


def wan_made_by(golden: Golden, runs: Sequence[Sequence[WanResult]]) -> Iterator[tuple[str, Tensor]]:
    """What a case's iterations have made, by the names of the tensors that it must equal."""
    results = [result for run in runs for result in run]
    if golden.kind == "wan_self_forcing":
        yield "output.latents", results[0].latents.transpose(1, 2)
        return
    for one in results:
        name = f"output.latents.iter{one.iteration}"
        expected = golden.tensor(name)
        yield name, one.latents[0, :, : expected.shape[1]].to(expected.dtype)
        if f"output.reuse_flags.iter{one.iteration}" in golden.tensors:
            yield f"output.reuse_flags.iter{one.iteration}", _flags(one.record)
        for start in ("keep", "keep_key", "keep_query"):
            whole = f"output.{start}.iter{one.iteration}."
            for end in golden.named(whole):
                yield f"{whole}{end}", one.kept.get(f"{start}.{end}", torch.zeros(0))
    if "output.rel_l1" in golden.tensors:
        policy = _policy(golden)
        changes = torch.cat([_decided(one.record, KEPT_STEPS[policy.use_ret_steps]) for one in results])
        yield "output.rel_l1", changes
        sums = ChunkPolicy(0.0, 1, polynomial=policy.polynomial)
        yield "output.rel_l1_rescaled", torch.tensor([sums.rescale(change) for change in changes.tolist()])


def _flags(record: RunRecord) -> Tensor:
    """[rows, branches, groups], of the decisions [rows, groups]."""
    flags = torch.from_numpy(record.flags)
    flags[0, : record.schedule.first] = 0  # given groups are run once, beside the first row
    of_one = torch.tensor([[value, value] for value in range(256)], dtype=torch.uint8)
    of_one[Decision.REUSE_TEXT.value] = torch.tensor([Decision.REUSE.value, Decision.COMPUTE.value])
    of_one[Decision.REUSE_NULL.value] = torch.tensor([Decision.COMPUTE.value, Decision.REUSE.value])
    return of_one[flags.long()].transpose(1, 2).contiguous()


def _decided(record: RunRecord, kept: int) -> Tensor:
    """The distances of what was decided, row by row, of one branch and then the other."""
    found, last = list[float](), record.schedule.num_steps - 1
    for tick in record.schedule.spans[0]:
        seen = [float(record.distances[tick.index, chunk]) for chunk, step in tick.active if kept <= step < last]
        found += seen * 2
    return torch.tensor(found)
