"""The mesh of ranks, pipeline stages by context-parallel slots: who talks to whom.

Plain Python. Ranks of one stage have adjacent numbers, so that they stand on one machine where they can.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from models.errors import InputError


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
