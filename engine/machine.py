"""The machine that this process runs on: its name, and whether other processes of it run. No torch in here."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


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
