"""How a command ends that was not ended by its own input: with a status, and with a line that is shown once."""

from __future__ import annotations

import time

from parallel.ranks.environment import RankEnv

_WAIT, _APART = 5.0, 0.5  # seconds


class CommandFailed(Exception):  # noqa: N818 - it may be an interrupt
    """The ranks have ended.

    Args:
        text: one line.
        status: exit status.
        shown_here: this process is the one that shows the line.
    """

    def __init__(self, text: str, *, status: int, shown_here: bool) -> None:
        super().__init__(text)
        self.status, self.shown_here = status, shown_here


def speaks_for_all(env: RankEnv | None) -> bool:
    """Whether this process shows what all ranks know: it is alone, or rank 0 of a launcher that shows nothing."""
    return env is None or (env.rank == 0 and not env.launcher_speaks)


def has_the_word(env: RankEnv | None) -> bool:
    """Whether this process says what is wrong with the input, of ranks that have not met yet.

    All ranks were given the same, and rank 0 says so. The others must not end before it has: a launcher ends all ranks
    once the first has ended. Whoever is still there after some seconds has found what rank 0 has not, such as a machine
    that was given other options, and says it.

    Args:
        env: of this process; None if it is alone.
    """
    if env is None or speaks_for_all(env):
        return True
    if env.launcher_speaks:
        return False
    time.sleep(_WAIT + env.local_rank * _APART)
    return True
