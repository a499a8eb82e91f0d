"""Splits a model's layers over the pipeline stages: contiguous ranges, any number over any number, none lost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from models.errors import InputError
from parallel.mesh import Mesh

if TYPE_CHECKING:  # the configuration pulls in torch, which a check of figures must not wait for
    from models.family import ModelConfig


def balanced_split(layers: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """How many layers each stage gets, so that the costliest stage is as cheap as can be.

    Among equals the one with the smallest sum of squares is taken, so that no stage is burdened without need. `layers`
    is what each costs, in any unit; `first` and `last` what those stages do besides, embedding and output. An
    InputError if there are more stages than layers.
    """
    count = len(layers)
    if not 1 <= stages <= count:
        raise InputError(f"{count} layers cannot be split over {stages} stages: give --pp 1 to {count}")
    sums = [0.0]
    for layer in layers:
        sums.append(sums[-1] + layer)

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """(costliest stage, sum of squares, sizes) of stages `stage` and after over the layers from `start` on."""
        left = stages - stage
        extra = first if stage == 0 else 0.0
        if left == 1:
            cost = sums[count] - sums[start] + extra + last
            return cost, cost * cost, (count - start,)
        found = []
        for end in range(start + 1, count - left + 2):
            cost = sums[end] - sums[start] + extra
            worst, squares, sizes = best(stage + 1, end)
            found.append((max(cost, worst), squares + cost * cost, (end - start, *sizes)))
        return min(found)

    return best(0, 0)[2]


def parse_split(text: str, *, layers: int, stages: int) -> tuple[int, ...]:
    """Read `9,9,8,8`; an InputError if it is no list of positive numbers, or does not fit the layers and stages."""
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


def stage_sizes(config: ModelConfig, stages: int, split: str | None = None) -> tuple[int, ...]:
    """Layers of each stage: as asked for, as in `9,9,8,8`, or balanced by the multiplications for one token.

    An InputError if the split does not fit, or there are more stages than layers.
    """
    known = config.figures
    if split is not None:
        return parse_split(split, layers=known.layers, stages=stages)
    first = known.edge_cost + known.decode_cost  # the leader decodes, on the same device
    return balanced_split([known.layer_cost] * known.layers, stages, first=first, last=known.edge_cost)


def stage_range(config: ModelConfig, mesh: Mesh, split: str | None = None) -> range:
    """The layers of a rank's stage; arguments and errors as in `stage_sizes`."""
    return stage_layers(stage_sizes(config, mesh.layout.pp, split), mesh.stage)
