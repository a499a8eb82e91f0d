"""The machine that this process runs on: its name, its other processes, and the heap of its C library.

No torch in here: the command line imports it at once.
"""

import ctypes
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_APART = 4 << 20  # blocks of so many bytes are taken from the system one by one
_KEPT = 512 << 20  # free bytes at the end of the heap that are not given back


def boot_id() -> str:
    """The kernel's identifier of this boot, the same in all containers of a machine; empty where there is none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def this_machine() -> str:
    """A name that all processes share which can see each other: of the machine, or of a container on it."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot_id()}/{namespace}"


def runs(pid: int) -> bool:
    """Whether a process of that number runs here, be it another one that was given the number since."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return False
    return True


def settle_heap() -> bool:
    """Keep this process's heap from growing in a long run, and from being given back all the time; False if it cannot.

    glibc takes large blocks from the system one by one, and gives them back when they are freed. But each time that
    such a block is freed it raises the size from which on it does so, up to 32 MB; activations then come from the
    heap, which gets holes and grows. A fixed size keeps them out of it.

    It also gives back what is free at the end of the heap, and has to ask for it again for the next layer: every page
    of it is then cleared again. That is 2 to 4 % of a small model's time. So some of it is kept.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _APART)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
