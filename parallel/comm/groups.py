"""Process groups: gloo for headers, and what carries tensors on this kind of device.

Tensors on GPUs go over NCCL, with one communicator for each direction between two ranks: on a shared one, a receive
that waits would hold up the sends behind it. Whether that is possible is decided once for all ranks, from what each has
published in the store, so that no two ranks differ.
"""

import hmac
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from engine.machine import boot_id
from parallel.comm.channel import GroupTransport, Link
from parallel.mesh import Edge, Mesh
from parallel.ranks.environment import RankEnv

Transfer = Literal["nccl", "host", "gloo"]
"""How tensors move: between GPUs, between GPUs through host memory, or between CPUs."""
_IDLE = timedelta(days=365)
"""Receives are posted ahead and may wait for long; whether peers are alive is the monitor's business."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Open process groups."""

    transfer: Transfer  # the same on all ranks
    cp: dist.ProcessGroup | None  # of the ranks of this stage; None if it has one rank
    links: dict[Edge, Link]  # how messages move on each edge of this rank, in the mesh's order
    device: torch.device  # of this rank


@contextmanager
def open_groups(env: RankEnv, mesh: Mesh, store: dist.Store, limit: float, device: torch.device) -> Iterator[Groups]:
    """Open all process groups; every rank must do so at the same time, in `limit` seconds.

    The connection to the store is theirs: a call of it may take long.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transfer = choose_transfer(exchange_devices(store, env.rank, env.world_size, device))
    dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size, timeout=_IDLE)
    links = _open_links(env, mesh, transfer, device)
    yield Groups(transfer=transfer, cp=_open_cp(mesh, transfer, limit, device), links=links, device=device)
    # Only after a clean end: tearing down while a peer hangs can hang as well.
    dist.barrier()
    dist.destroy_process_group()


def _open_cp(mesh: Mesh, transfer: Transfer, limit: float, device: torch.device) -> dist.ProcessGroup | None:
    own = None
    for stage in range(mesh.layout.pp) if mesh.layout.cp > 1 else ():
        group = _new_group(mesh.ranks_of(stage), transfer, timedelta(seconds=limit), device)
        own = group if stage == mesh.stage else own
    return own


def _open_links(env: RankEnv, mesh: Mesh, transfer: Transfer, device: torch.device) -> dict[Edge, Link]:
    """Every rank opens the communicators of all edges in the same order, so that no two ranks wait for each other."""
    links: dict[Edge, Link] = {}
    for edge in mesh.edges():
        pair = None if transfer != "nccl" else _new_group([edge.source, edge.target], transfer, _IDLE, device)
        if mesh.rank not in (edge.source, edge.target):
            continue
        peer = edge.target if edge.source == mesh.rank else edge.source
        payloads = None if pair is None else GroupTransport(peer, pair)
        if payloads is not None:
            _join(payloads, device, sends=edge.source == mesh.rank)
        key = hmac.digest(env.secret.encode(), f"{edge.source} to {edge.target}".encode(), "sha256")
        links[edge] = Link(peer=peer, key=key, headers=GroupTransport(peer), payloads=payloads, device=device)
    return links


def _new_group(ranks: list[int], transfer: Transfer, timeout: timedelta, device: torch.device) -> dist.ProcessGroup:
    """A group of some ranks. NCCL sets the communicator up at once, because the device is given."""
    backend, bound = ("nccl", device) if transfer == "nccl" else ("gloo", None)
    return dist.new_group(ranks, backend=backend, timeout=timeout, device_id=bound)


def _join(transport: GroupTransport, device: torch.device, *, sends: bool) -> None:
    """Connect both sides, which the first transfer does; it blocks the host, so both sides do it now."""
    one = torch.zeros(1, device=device)
    (transport.send(one, 0) if sends else transport.receive(one, 0)).wait()
    torch.cuda.synchronize(device)


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
    own = RankDevice(host=boot_id() or socket.gethostname(), gpu=gpu, nccl=dist.is_nccl_available())
    keys = [f"device/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(asdict(own)))
    return [RankDevice(**json.loads(raw)) for raw in store.multi_get(keys)]
