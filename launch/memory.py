"""Whether videos fit into this machine's memory, said before anything is loaded. A rough lower bound, and what is free.

It counts keys and values, and what one pass through a layer works with; weights and the autoencoder come on top.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from engine.kv.size import KVSettings, plan_kv
from engine.request import Request
from engine.schedule import Schedule
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.sampling import MagiSampling
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes

_STREAMS = 4  # copies of the hidden states that a layer holds at once: input, normed, attention's, output
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def bytes_needed(config: MagiConfig, request: Request, kv: KVSettings, layout: Layout, split: str | None) -> int:
    """Bytes that a video takes on the rank that holds most layers, at least; what it starts from is not counted."""
    model, sampling = config.model_config, MagiSampling(config=config, num_steps=request.num_steps)
    schedule = Schedule(first=0, chunks=request.chunks, num_steps=request.num_steps, window=sampling.window)
    tokens = config.chunk_tokens(request.height, request.width)
    geometry = model.kv_geometry(range(max(stage_sizes(config, layout.pp, split))), torch.device("cpu"))
    held = plan_kv(sampling, schedule, kv, chunk_tokens=tokens).nbytes(geometry) // layout.cp
    width = _STREAMS * model.hidden_size + model.ffn_hidden_size
    return held + math.ceil(tokens * width * model.dtype.itemsize / layout.cp)


def free_bytes() -> int | None:
    """Bytes of memory that this process may still take, swap included; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        free = sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def check_memory(what: str, needed: int) -> None:
    """See that the machine has so much memory.

    Raises:
        InputError: it has not; the text says both figures.
    """
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{what} needs {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            "ask for a smaller --height and --width, or a --kv-budget"
        )
