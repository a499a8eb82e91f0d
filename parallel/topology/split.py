"""Layers to stages: contiguous ranges, any number over any number, none lost.

Plain Python. What a layer, the embedding and the output cost is handed in, measured or modelled, in any unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from models.errors import InputError
from parallel.topology.mesh import Mesh

if TYPE_CHECKING:  # the configuration pulls in torch, which a check of figures must not wait for
    from models.magi.config import MagiConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a pass costs, part by part, in any unit."""

    layers: tuple[float, ...]  # each layer
    first: float = 0.0  # what the first stage does besides its layers (embedding)
    last: float = 0.0  # what the last stage does besides its layers (output)

    @classmethod
    def even(cls, count: int) -> Costs:
        """Layers that cost the same, and nothing else."""
        return cls(layers=(1.0,) * count)


def modelled_costs(
    count: int, *, hidden: int, feed_forward: int, keys: int, patch_values: int, gated: bool, attended: float
) -> Costs:
    """Multiplications for one token, from shapes.

    Args:
        count: layers.
        hidden: width.
        feed_forward: width of the MLP.
        keys: width of all keys of a token.
        patch_values: values of a patch that is embedded and of one that is read out.
        gated: the MLP has a gate.
        attended: keys that a token attends to.
    """
    projections = hidden * (2 * hidden + 2 * keys) + 2 * hidden * hidden  # queries twice, keys, values; output
    mlp = hidden * feed_forward * (3 if gated else 2)
    layer = projections + mlp + 2 * hidden * attended
    return Costs(layers=(float(layer),) * count, first=float(hidden * patch_values), last=float(hidden * patch_values))


def stage_cost(costs: Costs, sizes: Sequence[int], stage: int) -> float:
    """What a stage of a split costs."""
    start = sum(sizes[:stage])
    total = sum(costs.layers[start : start + sizes[stage]])
    return total + (costs.first if stage == 0 else 0.0) + (costs.last if stage == len(sizes) - 1 else 0.0)


def balanced_split(costs: Costs, stages: int) -> tuple[int, ...]:
    """How many layers each stage gets, so that the costliest stage is as cheap as can be.

    Among equals the one with the smallest sum of squares is taken, so that no stage is burdened without need.

    Raises:
        InputError: there are more stages than layers.
    """
    count = len(costs.layers)
    if not 1 <= stages <= count:
        raise InputError(f"{count} layers cannot be split over {stages} stages: give --pp 1 to {count}")
    sums = [0.0]
    for layer in costs.layers:
        sums.append(sums[-1] + layer)

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """(costliest stage, sum of squares, sizes) of stages `stage` and after over the layers from `start` on."""
        left = stages - stage
        extra = costs.first if stage == 0 else 0.0
        if left == 1:
            cost = sums[count] - sums[start] + extra + costs.last
            return cost, cost * cost, (count - start,)
        found = []
        for end in range(start + 1, count - left + 2):
            cost = sums[end] - sums[start] + extra
            worst, squares, sizes = best(stage + 1, end)
            found.append((max(cost, worst), squares + cost * cost, (end - start, *sizes)))
        return min(found)

    return best(0, 0)[2]


def parse_split(text: str, *, layers: int, stages: int) -> tuple[int, ...]:
    """Read `9,9,8,8`.

    Raises:
        InputError: it is no list of positive numbers, or does not fit the layers and stages.
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--split {text} is not a list of numbers such as 9,9,8,8") from None
    if len(sizes) != stages:
        raise InputError(f"--split {text} names {len(sizes)} stages, but there are {stages}")
    if min(sizes) < 1:
        raise InputError(f"--split {text} leaves a stage without layers")
    if sum(sizes) != layers:
        raise InputError(f"--split {text} places {sum(sizes)} layers, but the model has {layers}")
    return sizes


def stage_layers(sizes: Sequence[int], stage: int) -> range:
    """The layers of a stage."""
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


def stage_sizes(config: MagiConfig, stages: int, split: str | None = None) -> tuple[int, ...]:
    """Layers of each stage.

    Args:
        config: of the model.
        stages: how many.
        split: what is wanted, as in `9,9,8,8`; None balances modelled costs.

    Raises:
        InputError: the split does not fit, or there are more stages than layers.
    """
    model, runtime = config.model_config, config.runtime_config
    if split is not None:
        return parse_split(split, layers=model.num_layers, stages=stages)
    tokens = config.chunk_tokens(runtime.video_size_h, runtime.video_size_w)
    ranges = runtime.noise2clean_kvrange or (runtime.window_size,)
    costs = modelled_costs(
        model.num_layers,
        hidden=model.hidden_size,
        feed_forward=model.ffn_hidden_size,
        keys=model.num_query_groups * model.kv_channels,
        patch_values=model.patch_size**2 * model.t_patch_size * model.in_channels,
        gated=model.gated_linear_unit,
        attended=tokens * sum(ranges) / len(ranges),
    )
    return balanced_split(costs, stages)


def stage_range(config: MagiConfig, mesh: Mesh, split: str | None = None) -> range:
    """The layers of a rank's stage; arguments and errors as in `stage_sizes`."""
    return stage_layers(stage_sizes(config, mesh.layout.pp, split), mesh.stage)
