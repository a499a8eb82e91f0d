"""Another process of this machine: whether it has ended, whether it is stopped, and how to end it.

A handle of the kernel stands for the process, so that a number that is given out again is not mistaken for it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType


def this_machine() -> str:
    """A name for all processes that can see each other: of a machine, or of a container on it."""
    name = socket.gethostname()
    with suppress(OSError):
        name += "/" + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        name += "/" + os.readlink("/proc/self/ns/pid")
    return name


class LocalProcess:
    """A process of this machine.

    Args:
        pid: its number; it must be alive, or have ended a moment ago.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._gone = pid, False
        self._handle: int | None = None
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone = True
        except (AttributeError, OSError):
            pass  # an old kernel, or another system: the number has to do

    @property
    def gone(self) -> bool:
        """It has ended."""
        if not self._gone and self._handle is not None:
            poll = select.poll()
            poll.register(self._handle, select.POLLIN)
            self._gone = bool(poll.poll(0))
        elif not self._gone:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                self._gone = True
        return self._gone

    @property
    def stopped(self) -> bool:
        """It is there, but does nothing until somebody lets it go on (SIGSTOP)."""
        with suppress(OSError):
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(") ")[2].startswith("T") and not self.gone
        return False

    def end(self) -> None:
        """End it at once; a stopped process ends, too."""
        with suppress(ProcessLookupError, PermissionError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            elif not self.gone:
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the handle."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle, self._gone = None, True


class WakeupPipe:
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

    def notify(self) -> None:
        """Wake the thread that waits."""
        with suppress(OSError):  # the pipe is full, so the thread wakes anyway; or the pipe is closed
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
