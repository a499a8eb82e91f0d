"""Wakes a thread: when somebody rings, or when the process is told to stop (SIGTERM).

A launcher sends SIGTERM to all ranks as soon as one has ended. That must not end a rank which is about to tell what has
happened, so the signal only rings. Python runs handlers in the main thread, which may be stuck: the number comes
through a socket that the interpreter writes to at once.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
from contextlib import suppress
from types import FrameType

__all__ = ["Bell"]


class Bell:
    """Rings by itself on SIGTERM if it was made in the main thread and nobody else has a handler."""

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)
        self._handles = False
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        other = signal.set_wakeup_fd(self._outside.fileno(), warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
            return
        signal.signal(signal.SIGTERM, _only_ring)
        self._handles = True

    def ring(self) -> None:
        """Wake who waits."""
        with suppress(OSError):  # full, so it rings already; or closed
            self._outside.send(b"\0")

    def wait(self, seconds: float) -> set[int]:
        """Wait until it rings, at most some seconds; the signals that have come."""
        poll = select.poll()
        poll.register(self._inside, select.POLLIN)
        return set(self._inside.recv(4096)) - {0} if poll.poll(1000 * seconds) else set()

    def close(self) -> None:
        """Handle signals no more; to be called where it was made."""
        if self._handles:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._inside.close()
        self._outside.close()


def _only_ring(number: int, frame: FrameType | None) -> None:
    """The bell has rung already."""
