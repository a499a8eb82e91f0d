"""Golden files of one forward of SkyReels-V2: `wan_forward`, in fp32, and in bf16 with the casts of the published code.

A mask that is causal by blocks is chunks in order; without one, all latent frames are one chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from launch.conformance.forward import Seen, View, softmax_in_fp32
from launch.conformance.golden import Golden
from models.config import checked
from models.errors import InputError
from models.protocols import Caption, PassCondition
from models.wan.config import IMAGE_TOKENS, SKYREELS, Dtype, WanConfig, shapes_from_dict
from models.wan.dit import WanDiT
from models.wan.weights import WanWeights

_FPS = (16, 24)  # by the published index


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    t: str  # name of a tensor
    fps_index: tuple[Annotated[int, Field(ge=0, le=1)]] = (1,)
    causal_block: Annotated[int, Field(ge=0, le=1_000)] = 0


def wan_config(golden: Golden) -> WanConfig:
    """The configuration of a case, in the precision that it was run in."""
    shapes = shapes_from_dict(golden.json("config"), source=str(golden.path))
    dtype: Dtype = "bfloat16" if "precision" in golden.metadata else "float32"
    return WanConfig(shapes=shapes, precision=replace(SKYREELS, dtype=dtype))


def make_wan_forward(golden: Golden) -> Iterator[tuple[str, Tensor]]:
    """The velocity of every case, and what `mid.` says on the way to that of the first.

    In bf16 each is made twice: with the attention that the engine has, and with that of the published code.
    """
    config = wan_config(golden)
    shapes = config.shapes
    model = WanWeights(golden.path.parent / golden.text("weights")).dit(config).to(golden.device)
    backends = [model.attention]
    if config.dtype == torch.bfloat16:
        backends.append(softmax_in_fp32(model.attention))
    image = golden.tensor("input.clip", (1, IMAGE_TOKENS, shapes.clip_dim))[0] if shapes.sees_image else None
    caption = Caption(golden.tensor("input.context", (1, None, shapes.text_dim))[0], image)
    if not (cases := golden.json("cases")):
        raise InputError(f"{golden.path}: the metadata cases names none")
    size = golden.tensor(f"output.{next(iter(cases))}", (1, shapes.out_dim, None, None, None)).shape
    x = golden.tensor("input.x", size)
    if any(size % 2 for size in x.shape[3:]):
        raise InputError(f"{golden.path}: input.x has the shape {list(x.shape)}, not of whole patches")
    if shapes.sees_image:
        x = torch.cat([x, golden.tensor("input.y", (1, shapes.in_dim - shapes.out_dim, *x.shape[2:]))], dim=1)
    for index, (name, values) in enumerate(cases.items()):
        case = checked(_Case, values, source=f"{golden.path}: cases.{name}")
        times = golden.tensor(case.t).flatten().tolist()
        if len(times) not in (1, x.shape[2]):
            raise InputError(f"{golden.path}: {case.t} has {len(times)} times, and input.x {x.shape[2]} frames")
        condition = PassCondition(times=tuple(times), fps=_FPS[case.fps_index[0]])
        for model.attention in backends:
            hidden, velocity = _run(model, x, condition, caption, case.causal_block or x.shape[2])
            yield f"output.{name}", velocity
            if not index and golden.named("mid."):
                yield from _on_the_way(model, hidden, condition, caption)


def _run(
    model: WanDiT, x: Tensor, condition: PassCondition, caption: Caption, width: int
) -> tuple[Sequence[Tensor], Tensor]:
    """Hidden states before and after each layer [S, D], and the velocity, of chunks of a width in order."""
    seen, hidden, velocities = Seen(), list[list[Tensor]](), list[Tensor]()
    for number, start in enumerate(range(0, x.shape[2], width)):
        part = x[:, :, start : start + width]
        grid = (part.shape[2], part.shape[3], part.shape[4])
        times = condition.times[start : start + width] if len(condition.times) > 1 else condition.times
        told = replace(condition, times=times)
        first = model.patches(part)
        inputs = model.modulation(told), model.text(caption), model.positions(start, grid)
        view = View(model.attention, seen, range(number + 1))
        states = [first, *model.each_layer(first, *inputs, view)]
        hidden.append([state[0] for state in states])
        velocities.append(model.velocity(states[-1], grid, told))
    return [torch.cat(parts) for parts in zip(*hidden, strict=True)], torch.cat(velocities, dim=2)


def _on_the_way(
    model: WanDiT, hidden: Sequence[Tensor], condition: PassCondition, caption: Caption
) -> Iterator[tuple[str, Tensor]]:
    yield "mid.patch", hidden[0]
    for number, state in enumerate(hidden[1:]):
        yield f"mid.block{number}", state
    e, e0 = model.embed_condition(condition)
    yield "mid.time_embedding", e
    yield "mid.e0_per_frame", e0
    yield "mid.text_embedding", model.embed_text(caption.text)[0]
