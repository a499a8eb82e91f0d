"""Which GPU a rank takes, and whether tensors go over NCCL or through host memory: decided once for all ranks."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from parallel.ranks.environment import RankEnv

Transfer = Literal["nccl", "host", "gloo"]
"""How tensors move: between GPUs, between GPUs through host memory, or between CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankDevice:
    """What a rank publishes of its device."""

    host: str  # boot identifier of its machine, the same in all containers of it
    gpu: str | None  # UUID of its GPU; None on a CPU
    nccl: bool  # its PyTorch has NCCL


def choose_transfer(devices: Sequence[RankDevice]) -> Transfer:
    """How tensors move, from the devices of all ranks: over NCCL if every rank has a GPU of its own.

    How many GPUs a process can see, and how many ranks a machine has, does not matter.
    """
    gpus = {(device.host, device.gpu) for device in devices if device.gpu is not None}
    if not gpus:
        return "gloo"
    own = len(gpus) == len(devices)
    return "nccl" if own and all(device.nccl for device in devices) else "host"


def pick_device(env: RankEnv) -> torch.device:
    """The GPU of an env, or the CPU where there is none; ranks share GPUs if there are more of them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", env.local_rank % count) if count else torch.device("cpu")


def exchange_devices(store: dist.Store, rank: int, world_size: int, device: torch.device) -> list[RankDevice]:
    """Publish this rank's device, and read those of all ranks once they are there."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    own = RankDevice(host=_host(), gpu=gpu, nccl=dist.is_nccl_available())
    keys = [f"device/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(asdict(own)))
    store.wait(keys)
    return [RankDevice(**json.loads(raw)) for raw in store.multi_get(keys)]


def _host() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
