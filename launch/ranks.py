"""Ranks: whether this process is one, starting them on this machine, and joining the others.

It knows how a failure is shown: once, by one process, as one line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.ending import CommandFailed
from models.errors import InputError
from models.magi.config import MagiConfig
from parallel.health.errors import GangError
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang, open_gang
from parallel.ranks.spawn import run_ranks
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """What was given of `--pp`, `--cp`, `--split`, `--concurrency` and `--trace`."""

    pp: int = 1
    cp: int = 1
    split: str | None = None
    concurrency: int | None = None
    trace: Path | None = None

    @property
    def layout(self) -> Layout:
        """Of the ranks.

        Raises:
            InputError: a figure is not positive.
        """
        return Layout(pp=self.pp, cp=self.cp)

    @property
    def wanted(self) -> bool:
        """Only ranks can do what is asked for."""
        return self.layout.world_size > 1 or self.trace is not None or (self.concurrency or 1) > 1

    def at_a_time(self, videos: int) -> int:
        """How many videos are made at a time.

        One video has as many chunks under way as its window holds, 4, less what is reused. So two fill up to four or
        five stages, and every two stages more want another one.
        """
        return min(videos, self.concurrency or max(2, (self.pp + 1) // 2))


def check_layout(config: MagiConfig, ranks: RankOptions) -> None:
    """See that a model can be laid out so, and that something is made at a time.

    Raises:
        InputError: it cannot.
    """
    if ranks.concurrency is not None and ranks.concurrency < 1:
        raise InputError(f"--concurrency {ranks.concurrency} makes nothing: give 1 or more")
    heads = config.model_config.num_query_groups
    stage_sizes(config, ranks.layout.pp, ranks.split)
    if heads % ranks.cp:
        raise InputError(f"--cp {ranks.cp} does not divide the model's {heads} key heads")


def start_ranks(arguments: Sequence[str], ranks: RankOptions, *, threads: int | None = None) -> None:
    """Run this command line once for each rank, on this machine, and wait for all of them.

    Args:
        arguments: of the command line.
        ranks: how many.
        threads: CPU threads of each; None shares the cores evenly.

    Raises:
        CommandFailed: a rank has failed.
    """
    try:
        run_ranks([sys.executable, "-m", "launch", *arguments], ranks.layout, threads=threads)
    except GangError as error:
        raise CommandFailed(str(error), status=error.failure.status, shown_here=True) from None


@contextmanager
def join_ranks(env: RankEnv, ranks: RankOptions, *, trace: bool) -> Iterator[Gang]:
    """Join the other ranks.

    Args:
        env: this rank's.
        ranks: how many there must be.
        trace: remember what is done when.

    Yields:
        The gang.

    Raises:
        InputError: another number of ranks was started.
        CommandFailed: a rank has failed.
    """
    try:
        with open_gang(env, ranks.layout, trace=trace) as gang:
            yield gang
    except GangError as error:
        mine = not env.launcher_speaks and error.failure.reporter == env.rank
        raise CommandFailed(str(error), status=error.failure.status, shown_here=mine) from None
