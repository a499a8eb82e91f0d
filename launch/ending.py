"""How a command ends before its work is done: signals, failures of ranks, and which process says so, once.

While there is nothing to clean up (imports, checks, loading) a signal ends the process at once: an exception in the
middle of that could be swallowed, or leave half a module behind. Later a signal unwinds what is being done. Nothing
heavy is imported here, since `launch/__main__.py` does so first of all.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from parallel.ranks.environment import RankEnv

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AGAIN = 1.0  # seconds after a signal, from which on another one does not wait for the clean-up
_IMPORT = 0.02  # seconds between two looks whether an import has ended
_WAIT, _APART = 5.0, 0.5  # seconds
_Way = Literal["end", "unwind", "defer"]


class CommandFailed(Exception):  # noqa: N818 - it may be an interrupt
    """The ranks have ended, with an exit status and a line, which is shown by the process that has `shown_here`."""

    def __init__(self, text: str, *, status: int, shown_here: bool) -> None:
        super().__init__(text)
        self.status, self.shown_here = status, shown_here


class _Handler:
    """What a signal does: end the process at once, unwind it by an exception, or nothing for the moment."""

    def __init__(self) -> None:
        self.way: _Way = "end"
        self.speaks = True  # whether this process says that it was stopped
        self.received: int | None = None  # the first signal
        self.raised = False
        self._at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
        elif number != signal.SIGALRM and now - self._at > _AGAIN:
            self._end()
        if not self.raised and self.way != "defer":
            self.stop(frame)

    def stop(self, frame: FrameType | None = None) -> None:
        """Do what is to be done if a signal has come; `frame` is what the process was about."""
        if self.received is None:
            return
        if self.way == "end":
            self._end()
        if _imports(frame):  # asked again when it has ended
            signal.signal(signal.SIGALRM, self)
            signal.setitimer(signal.ITIMER_REAL, _IMPORT)
            return
        self.raised = True
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self.received)

    def _end(self) -> None:
        assert self.received is not None
        if self.speaks:
            with suppress(OSError):
                clear = b"\r\x1b[K\x1b[?25h" if os.isatty(2) else b""  # a bar, which hides the cursor
                os.write(2, clear + b"flowcache: stopped\n")
        os._exit(128 + self.received)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def handle_signals() -> None:
    """From now on Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and SIGQUIT end this process with 128 + their number.

    A signal that whoever started the process has had ignored, as nohup does, stays ignored.
    """
    handler = _Handler()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def handle_as_rank(env: RankEnv | None) -> None:
    """Once it is known which rank this is: it learns of all signals but Ctrl-C from its gang, which finds out why."""
    handler = _handler()
    if handler is None or env is None:
        return
    handler.speaks = speaks_for_all(env)
    for number in _SIGNALS[1:]:
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.SIG_DFL)


def stopped_by() -> int | None:
    """The signal that should end this process, if one has come."""
    handler = _handler()
    return None if handler is None else handler.received


def check_signals() -> None:
    """Raise if a signal came that should have ended this process; to be called in every long loop.

    A library may have swallowed the exception that unwinds it.
    """
    if (handler := _handler()) is not None:
        handler.stop()


def unwinding_signals() -> AbstractContextManager[None]:
    """Within, there is something to clean up: a signal raises an exception, so that every context does so."""
    return _way("unwind")


def deferred_signals() -> AbstractContextManager[None]:
    """Within, a signal interrupts nothing, as libraries could not bear it: `check_signals` raises, and the end does."""
    return _way("defer")


@contextmanager
def _way(way: _Way) -> Iterator[None]:
    handler = _handler()
    if handler is None:
        yield
        return
    before, handler.way = handler.way, way
    try:
        yield
    finally:
        handler.way = before
        if not handler.raised:
            handler.stop()


def _handler() -> _Handler | None:
    found = (signal.getsignal(number) for number in _SIGNALS)
    return next((one for one in found if isinstance(one, _Handler)), None)


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
