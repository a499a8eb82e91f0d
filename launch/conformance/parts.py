"""Golden files of one part of a model alone: the autoencoder, the selection of tokens, a quantised layer.

Each function makes a case's figures again, by the names of the tensors that they must equal.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field
from torch import Tensor

from engine.kv.selection import Granularity, SelectionSettings, select
from launch.conformance.forward import make_forward, make_released_forward
from launch.conformance.golden import IN_FP8, Golden
from launch.conformance.wan_forward import make_wan_forward
from launch.conformance.wan_parts import make_scheduler, make_timestep_matrix
from models.config import checked
from models.errors import InputError
from models.magi.config import VaeConfig
from models.magi.layers import Fp8Linear
from models.magi.vae import ViTVAE

_Side = Annotated[int, Field(ge=1, le=1_000)]


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
    pool_kernel: Annotated[int, Field(ge=1, le=1_000)]
    keep: Annotated[int, Field(ge=1, le=1_000_000)]
    grid_thw: tuple[_Side, _Side, _Side]
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


PARTS: dict[str, Callable[[Golden], Iterable[tuple[str, Tensor]]]] = {
    "vae": make_vae,
    "kv_selection": make_selection,
    "fp8_linear": make_fp8_linear,
    "forward": make_forward,
    "released_forward": make_released_forward,
    "scheduler": make_scheduler,
    "timestep_matrix": make_timestep_matrix,
    "wan_forward": make_wan_forward,
    "wan_forward_bf16": make_wan_forward,
}
"""By kind of file."""
