"""Memory of a process, and functions run in a process of their own so that their memory can be told apart.

Resident memory is what counts; on Linux the peak can be set back, elsewhere it is that of the whole process.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec, TypeVar

from models.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")
_STATUS = Path("/proc/self/status")


def in_fresh_process(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a function of a module in a new Python process and hand back what it returns.

    Raises:
        InputError: the process was killed, most likely because memory ran out; or what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise InputError("a measurement's process was killed, likely for want of memory: measure less") from None


def rss() -> int:
    """Resident bytes of this process now; memory that was freed is given back to the system first where it can be."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return _status("VmRSS") or peak_rss()


def peak_rss() -> int:
    """Highest resident bytes of this process, since `reset_peak` where that works."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _maxrss_unit()


def reset_peak() -> bool:
    """Set the peak back to what is resident now; tells whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _maxrss_unit() -> int:
    return 1 if os.uname().sysname == "Darwin" else 1024
