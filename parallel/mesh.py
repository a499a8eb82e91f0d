"""The mesh of ranks, pipeline stages by context-parallel slots: who talks to whom, and who holds which layers.

Plain Python. Ranks of one stage have adjacent numbers, so that they stand on one machine where they can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from models.errors import InputError

if TYPE_CHECKING:  # the configuration pulls in torch, which a check of figures must not wait for
    from models.magi.config import MagiConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How many ranks there are and what they share; an InputError if a figure is not positive."""

    pp: int = 1  # pipeline stages, each with some of the layers
    cp: int = 1  # ranks of a stage, each with some of the tokens and heads

    def __post_init__(self) -> None:
        for name, count in (("--pp", self.pp), ("--cp", self.cp)):
            if count < 1:
                raise InputError(f"{name} {count} leaves nobody to work: give 1 or more")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.cp

    def check_world(self, world_size: int) -> None:
        """Raise an `InputError` if another number of ranks was started."""
        if world_size != self.world_size:
            raise InputError(
                f"--pp {self.pp} x --cp {self.cp} needs {self.world_size} ranks, but {world_size} were started: "
                f"torchrun --nproc-per-node {self.world_size} starts as many"
            )


class Edge(NamedTuple):
    """One direction between two ranks in which messages go."""

    source: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The place of one rank."""

    layout: Layout  # of all ranks
    rank: int

    @property
    def stage(self) -> int:
        """Stage of this rank; 0 is the first, `last_stage` the last."""
        return self.rank // self.layout.cp

    @property
    def cp_rank(self) -> int:
        """Place of this rank in its stage."""
        return self.rank % self.layout.cp

    @property
    def leads(self) -> bool:
        """This rank orders the work and holds the latents."""
        return self.rank == 0

    @property
    def last_stage(self) -> int:
        """The tail."""
        return self.layout.pp - 1

    def ranks_of(self, stage: int) -> list[int]:
        """Ranks of a stage, by cp_rank."""
        return [self.rank_of(stage, cp_rank) for cp_rank in range(self.layout.cp)]

    def rank_of(self, stage: int, cp_rank: int) -> int:
        """The rank at a place."""
        return stage * self.layout.cp + cp_rank

    def name(self, rank: int) -> str:
        """A rank in words."""
        there = Mesh(layout=self.layout, rank=rank)
        cp = f", cp {there.cp_rank} of {self.layout.cp}" if self.layout.cp > 1 else ""
        return f"rank {rank} (stage {there.stage} of {self.layout.pp}{cp})"

    def edges(self) -> Iterator[Edge]:
        """All edges of the mesh, in one order for all ranks.

        The leader sends the other ranks of its stage their tokens; each rank sends on to its cp_rank of the next stage;
        on the last stage all send their tokens to cp_rank 0, which sends the velocity back to the leader.
        """
        layout = self.layout
        for cp_rank in range(1, layout.cp):
            yield Edge(0, self.rank_of(0, cp_rank))
        for stage in range(layout.pp - 1):
            for cp_rank in range(layout.cp):
                yield Edge(self.rank_of(stage, cp_rank), self.rank_of(stage + 1, cp_rank))
        tail = self.rank_of(self.last_stage, 0)
        for cp_rank in range(1, layout.cp):
            yield Edge(self.rank_of(self.last_stage, cp_rank), tail)
        if tail:
            yield Edge(tail, 0)


# ---- layers to stages: contiguous ranges, any number over any number, none lost


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


def stage_sizes(config: MagiConfig, stages: int, split: str | None = None) -> tuple[int, ...]:
    """Layers of each stage: as asked for, as in `9,9,8,8`, or balanced by the multiplications for one token.

    An InputError if the split does not fit, or there are more stages than layers.
    """
    model, runtime = config.model_config, config.runtime_config
    if split is not None:
        return parse_split(split, layers=model.num_layers, stages=stages)
    tokens = config.chunk_tokens(runtime.video_size_h, runtime.video_size_w)
    ranges = runtime.noise2clean_kvrange or (runtime.window_size,)
    hidden, keys = model.hidden_size, model.num_query_groups * model.kv_channels
    projections = hidden * (2 * hidden + 2 * keys) + 2 * hidden * hidden  # queries twice, keys, values; output
    mlp = hidden * model.ffn_hidden_size * (3 if model.gated_linear_unit else 2)
    layer = projections + mlp + 2 * hidden * tokens * sum(ranges) / len(ranges)
    patch = float(hidden * model.patch_size**2 * model.t_patch_size * model.in_channels)  # embedded, or read out
    return balanced_split([layer] * model.num_layers, stages, first=patch, last=patch)


def stage_range(config: MagiConfig, mesh: Mesh, split: str | None = None) -> range:
    """The layers of a rank's stage; arguments and errors as in `stage_sizes`."""
    return stage_layers(stage_sizes(config, mesh.layout.pp, split), mesh.stage)
