"""How a command ends before its work is done: signals, failures of ranks, and which process says so, once.

Nothing heavy is imported here. Exit codes are in `parallel/health/errors.py`.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from parallel.ranks.environment import RankEnv

_WAIT, _APART = 5.0, 0.5  # seconds
_SIGNAL_BASE = 128  # a shell's status of a process that a signal has ended


class CommandFailed(Exception):  # noqa: N818 - it may be an interrupt
    """The ranks have ended, with an exit status and a line, which is shown by the process that has `shown_here`."""

    def __init__(self, text: str, *, status: int, shown_here: bool) -> None:
        super().__init__(text)
        self.status, self.shown_here = status, shown_here


class _Unwind:
    """A handler that ends the process by an exception, so that every context cleans up behind itself."""

    def __init__(self) -> None:
        self._received: int | None = None
        self.deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if not self.deferred:
            self.check()

    def check(self) -> None:
        """Raise for a signal that came, again if a library has swallowed the exception."""
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            sys.exit(_SIGNAL_BASE + self._received)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def unwind_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP (a closed terminal) unwind this process; nothing is left behind.

    A signal that whoever started the process has had ignored, as nohup does, stays ignored. A rank learns of SIGTERM
    and SIGHUP from its gang, which first finds out why.
    """
    handler, alone = _Unwind(), RankEnv.from_environment() is None
    for number in _ENDING if alone else _ENDING[:1]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def check_signals() -> None:
    """Raise if a signal came that should have ended this process; to be called in every long loop."""
    if (handler := _handler()) is not None:
        handler.check()


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Within, a signal interrupts nothing, as libraries could not bear it: `check_signals` raises, and the end does."""
    handler = _handler()
    if handler is None:
        yield
        return
    handler.deferred = True
    try:
        yield
    finally:
        handler.deferred = False
    handler.check()


def _handler() -> _Unwind | None:
    found = (signal.getsignal(number) for number in _ENDING)
    return next((handler for handler in found if isinstance(handler, _Unwind)), None)


def speaks_for_all(env: RankEnv | None) -> bool:
    """Whether this process shows what all ranks know: it is alone, or rank 0 of a launcher that shows nothing."""
    return env is None or (env.rank == 0 and not env.launcher_speaks)


def shows_bad_input(env: RankEnv | None) -> bool:
    """Whether this process says what is wrong with the input, of ranks that have not met yet.

    All ranks were given the same, and rank 0 says so. The others must not end before it has: a launcher ends all ranks
    once the first has ended. A rank that is still there after some seconds has found what rank 0 has not, such as other
    options on one machine, and says it.
    """
    if env is None or speaks_for_all(env):
        return True
    if env.launcher_speaks:
        return False
    time.sleep(_WAIT + env.local_rank * _APART)
    return True
