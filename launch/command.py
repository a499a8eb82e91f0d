"""Who does what a command asks for: this process alone, ranks that it starts, or this process as one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from launch.generate import generate_on_ranks, generate_videos
from launch.listing import show_conformance, show_conformance_on_ranks
from launch.plan import Options
from launch.ranks import RankOptions, start_ranks
from launch.several import plan_videos
from models.errors import InputError
from parallel.ranks.environment import RankEnv


def generate_command(
    options: Options, prompts: Sequence[str], arguments: Sequence[str], *, on_ray: bool = False
) -> str | None:
    """Make the videos.

    Args:
        options: what was given.
        prompts: one for each video.
        arguments: the command line, for ranks that are started with it.
        on_ray: have Ray place and start the ranks.

    Returns:
        What was made and what it cost; None if another process says so.

    Raises:
        InputError: something given cannot be used.
        CommandFailed: a rank has failed.
    """
    env = RankEnv.from_environment()
    if on_ray:
        if env is not None:
            raise InputError("--launcher ray starts the ranks itself: leave torchrun out, or --launcher")
        from launch.ray_generate import generate_on_ray  # imports Ray, which takes a second

        return generate_on_ray(options, prompts)
    if env is not None:
        return generate_on_ranks(options, prompts, env)
    if not options.ranks.wanted:
        return generate_videos(options, prompts)
    plan_videos(options, prompts)  # what can be checked is said before ranks are started
    start_ranks(arguments, options.ranks, threads=options.threads)
    return None


def conformance_command(
    files: Sequence[Path],
    ranks: RankOptions,
    arguments: Sequence[str],
    *,
    report_error: Callable[[Exception], None],
) -> int:
    """Check golden files.

    Args:
        files: what to check.
        ranks: who computes.
        arguments: the command line, for ranks that are started with it.
        report_error: called for a file that cannot be read.

    Returns:
        The exit status.

    Raises:
        InputError: the layout cannot be used.
        CommandFailed: a rank has failed, or a file does not pass or cannot be read.
    """
    env = RankEnv.from_environment()
    if env is not None:
        return show_conformance_on_ranks(files, ranks, env)
    if not ranks.wanted:
        return show_conformance(files, report_error=report_error)
    start_ranks(arguments, ranks)
    return 0
