"""Other processes of this machine, and the pipe that wakes a thread on SIGTERM.

A process is held by a file descriptor of the kernel, so that its number, once given to another process, cannot be
mistaken for it.
"""

import os
import select
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

from engine.machine import runs


class LocalProcess:
    """A process of this machine, which lives or has ended a moment ago."""

    def __init__(self, pid: int) -> None:
        self._pid, self._gone = pid, False
        self._descriptor: int | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone = True
        except (AttributeError, OSError):
            pass  # an old kernel, or another system: the pid has to do

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        if not self._gone and self._descriptor is not None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            self._gone = bool(poll.poll(0))
        elif not self._gone:
            self._gone = not runs(self._pid)
        return self._gone

    @property
    def stopped(self) -> bool:
        """Whether it was stopped (SIGSTOP) and not continued."""
        with suppress(OSError):
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(") ")[2].startswith("T") and not self.gone
        return False

    def end(self) -> None:
        """End it at once, also if it is stopped."""
        with suppress(ProcessLookupError, PermissionError):
            if self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            elif not self.gone:
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the file descriptor."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor, self._gone = None, True


def descendants(pid: int) -> set[int]:
    """All processes that a process has started, and those in turn; none where there is no /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = set[int](), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


class WakeupPipe:
    """Wakes a thread by `notify`, and on SIGTERM if it was made in the main thread and SIGTERM has no handler."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handles = False
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        other = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
            return
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # the pipe has been written already
        self._handles = True

    def notify(self) -> None:
        """Wake the thread that waits."""
        with suppress(OSError):  # the pipe is full, so the thread wakes anyway; or the pipe is closed
            self._writer.send(b"\0")

    def wait(self, seconds: float) -> set[int]:
        """Wait for a wake-up, at most so many seconds; returns the signals that have come."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return set(self._reader.recv(4096)) - {0} if poll.poll(1000 * seconds) else set()

    def close(self) -> None:
        """Close the pipe and restore SIGTERM; to be called in the thread that made it."""
        if self._handles:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._reader.close()
        self._writer.close()
