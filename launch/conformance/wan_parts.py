"""Golden files of what SkyReels-V2 samples with: `scheduler`, sigmas and steps of UniPC, and `timestep_matrix`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from engine.schedule import Schedule
from launch.conformance.golden import Golden
from models.config import checked
from models.errors import InputError
from models.wan.sampling.unipc import Sigmas, UniPC

_Count = Annotated[int, Field(ge=0, le=1_000)]
_Steps = Annotated[int, Field(ge=1, le=1_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trajectory:
    num_steps: _Steps
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
    num_latent_frames: _Steps
    num_steps: _Steps
    shift: float
    base_num_latent_frames: _Steps
    ar_step: _Count
    num_pre_ready: _Count
    causal_block_size: _Steps


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
