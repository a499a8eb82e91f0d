"""Golden files of one part of a model alone: the autoencoder, the selection of tokens, a quantised layer, and what
SkyReels-V2 samples with, sigmas and steps of UniPC and the matrix of times.

Each function makes a case's figures again, by the names of the tensors that they must equal.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from engine.kv.selection import Granularity, SelectionSettings, select
from engine.schedule import Schedule
from launch.conformance.golden import IN_FP8, Golden
from models.config import checked
from models.errors import InputError
from models.magi.config import VaeConfig
from models.magi.layers import Fp8Linear
from models.magi.vae import ViTVAE
from models.wan.sampling.unipc import Sigmas, UniPC

_Number = Annotated[int, Field(ge=1, le=1_000)]
_Count = Annotated[int, Field(ge=0, le=1_000)]


def make_vae(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """Encode and decode videos with the autoencoder whose weights the file holds."""
    vae = ViTVAE(checked(VaeConfig, golden.json("config"), source=str(golden.path)))
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    vae.load_state_dict({name: golden.tensor(f"weights.{name}", shape).float() for name, shape in shapes.items()})
    vae.to(golden.device)
    cases = sorted(golden.named("input.video.") | golden.named("output.latent_mode.") | golden.named("output.decoded."))
    if not cases:
        raise InputError(f"{golden.path} lacks the tensors input.video")
    for case in cases:
        video = golden.tensor(f"input.video.{case}", (None, vae.config.in_chans, None, None, None))
        latent = golden.tensor(f"output.latent_mode.{case}", (video.shape[0], vae.config.z_chans, None, None, None))
        yield f"output.latent_mode.{case}", vae.encode(video.float())
        yield f"output.decoded.{case}", vae.decode(latent)


@dataclass(frozen=True, kw_only=True, slots=True)
class _SelectionConfig:
    """The configuration of a case of selection, by its published names."""

    mix_lambda: Annotated[float, Field(ge=0, le=1)]
    pool_kernel: _Number
    keep: Annotated[int, Field(ge=1, le=1_000_000)]
    grid_thw: tuple[_Number, _Number, _Number]
    query_tokens_for_token_granularity: Annotated[int, Field(ge=1, le=1_000_000)]
    gqa_pool: Literal["max"]


def make_selection(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """Select tokens by every retention and kind of queries."""
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
    for retention in get_args(Granularity):
        for who in get_args(Granularity):
            name = f"output.keep.{retention}.query_{who}"
            golden.tensor(name, (config.keep, groups))
            settings = SelectionSettings(
                retention=retention,
                queries=who,
                query_tokens=config.query_tokens_for_token_granularity,
                importance_weight=config.mix_lambda,
                pool=config.pool_kernel,
            )
            yield (
                name,
                select(queries, keys, keep=config.keep, settings=settings, frame_tokens=frame, chunk_tokens=chunk),
            )


def make_fp8_linear(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """Run the two kinds of quantised layers; `tensor_uneven` has an input scale whose elements differ.

    Products are those of copies in bf16, and of fp8 as well on a device that has them.
    """
    x = golden.tensor("input.x", (None, None))
    for case, smooth in (("tensor", False), ("tensor_uneven", False), ("channel", True)):
        _, outputs, inputs = golden.tensor(f"{case}.weight", (1, None, x.shape[1])).shape
        layer = Fp8Linear(inputs, outputs, smooth=smooth)
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        layer.load_state_dict({name: golden.tensor(f"{case}.{name}", shape) for name, shape in shapes.items()})
        layer.to(golden.device)
        yield f"{case}.output.quantised", (quantised := layer.quantise(x))
        yield f"{case}.output.y", layer.in_bf16(quantised)
        if layer.multiplies_fp8:
            yield f"{IN_FP8}{case}.output.y", layer(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trajectory:
    num_steps: _Number
    shift: float
    predictor_orders: list[int]


def make_scheduler(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """Noise levels and times of several runs, and the steps that given model outputs lead to, without aliasing."""
    for name in golden.named("output.sigmas."):
        if (found := re.fullmatch(r"n(\d{1,3})\.shift(\d+\.\d+)", name)) is None:
            raise InputError(f"{golden.path}: output.sigmas.{name} does not name steps and shift")
        sigmas = Sigmas(int(found[1]), float(found[2]))
        yield f"output.sigmas.{name}", sigmas.values
        yield f"output.timesteps.{name}", torch.tensor(sigmas.timesteps)
    for name, values in golden.json("cases").items():
        case = checked(_Trajectory, values, source=f"{golden.path}: cases.{name}")
        sigmas = Sigmas(case.num_steps, case.shift)
        if case.predictor_orders != [sigmas.order(step) for step in range(case.num_steps)]:
            raise InputError(f"{golden.path}: cases.{name}: other orders than this solver has")
        x, samples, solver = golden.tensor(f"input.sample.{name}"), list[Tensor](), UniPC(sigmas, aliased=False)
        for step, velocity in enumerate(golden.tensor(f"input.model_outputs.{name}", (case.num_steps, *x.shape))):
            x = solver.step(x, velocity, step)
            samples.append(x)
        yield f"output.samples.{name}", torch.stack(samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    num_latent_frames: _Number
    num_steps: _Number
    shift: float
    base_num_latent_frames: _Number
    ar_step: _Count
    num_pre_ready: _Count
    causal_block_size: _Number


def make_timestep_matrix(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """The published matrices as the engine's schedule has them, frame by frame; groups are chunks."""
    for name, values in golden.json("cases").items():
        case = checked(_Matrix, values, source=f"{golden.path}: cases.{name}")
        groups, width = case.num_latent_frames // case.causal_block_size, case.causal_block_size
        first, stagger = case.num_pre_ready // width, min(case.ar_step, case.num_steps)
        window = min(groups - first, -(-case.num_steps // stagger)) if stagger else groups - first
        schedule = Schedule(
            first=first, chunks=groups, num_steps=case.num_steps, window=max(1, window), stagger=stagger
        )
        index = torch.zeros(schedule.ticks, groups, dtype=torch.int16)
        updates = torch.zeros(schedule.ticks, groups, dtype=torch.uint8)
        index[:, :first] = case.num_steps + 1
        for tick in schedule:
            for chunk, step in tick.active:
                index[tick.index, chunk], updates[tick.index, chunk] = step + 1, 1
            for chunk in tick.finishing:
                index[tick.index + 1 :, chunk] = case.num_steps + 1
        shown = torch.tensor([999, *Sigmas(case.num_steps, case.shift).timesteps, 0], dtype=torch.int16)
        base = case.base_num_latent_frames // width
        newest = torch.tensor([max(base, max((c for c, _ in tick.active), default=0) + 1) for tick in schedule])
        newest = newest.cummax(0).values
        yield f"output.step_index.{name}", index.repeat_interleave(width, dim=1)
        yield f"output.step_matrix.{name}", shown[index.long()].repeat_interleave(width, dim=1)
        yield f"output.update_mask.{name}", updates.repeat_interleave(width, dim=1)
        interval = torch.stack([(newest - base).clamp(min=0), newest], dim=1) * width
        yield f"output.valid_interval.{name}", interval.to(torch.int16)
