"""The C library's heap in processes that make videos. No torch in here: the command line imports it at once."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_APART = 4 << 20
"""Blocks of so many bytes are taken from the system one by one."""
_KEPT = 512 << 20
"""Free bytes at the end of the heap that are not given back."""


def settle_heap() -> bool:
    """Keep this process's heap from growing in a long run, and from being given back all the time.

    glibc takes large blocks from the system one by one, and gives them back when they are freed. But each time that
    such a block is freed it raises the size from which on it does so, up to 32 MB; activations then come from the
    heap, which gets holes and grows. A fixed size keeps them out of it.

    It also gives back what is free at the end of the heap, and has to ask for it again for the next layer: every page
    of it is then cleared again. That is 2 to 4 % of a small model's time. So some of it is kept.

    Returns:
        Whether the C library allows it.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _APART)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
