"""Copies from a device to the host: into pinned memory, begun on the current stream, and waited for once for many."""

from __future__ import annotations

import torch
from torch import Tensor


def begin_host_copy(part: Tensor) -> Tensor:
    """A contiguous copy on the CPU; from a GPU it is whole only after `finish_host_copies`.

    Kernels that are launched later on the current stream may change `part` and do not change the copy.
    """
    if part.device.type != "cuda":
        return part.detach().to("cpu", copy=True).contiguous()
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return host.copy_(part.detach(), non_blocking=True)


def finish_host_copies(device: torch.device) -> None:
    """Wait for the copies that were begun on a device's current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
