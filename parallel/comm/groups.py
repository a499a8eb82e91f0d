"""Process groups: the store where ranks meet, gloo for headers, and what carries tensors on this kind of device.

Tensors on GPUs go over NCCL, over one communicator for each direction between two ranks: on a shared one a receive that
waits would hold up the sends behind it. Where ranks share a GPU, which NCCL does not do, they go through host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.comm.channel import GlooWire, Wire
from parallel.comm.device_wires import HostWire, NcclWire
from parallel.health.timeouts import Timeouts
from parallel.ranks.environment import RankEnv
from parallel.topology.mesh import Edge, Mesh

_SERVED = 20.0
_IDLE = timedelta(days=365)
"""Receives are posted ahead and may wait for long; that peers are alive is the monitor's business."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Open process groups."""

    cp: dist.ProcessGroup | None  # of the ranks of this stage; None if it has one rank
    wires: dict[Edge, Wire]  # what carries tensors on each edge of this rank
    device: torch.device  # of this rank
    through_host: bool  # tensors on the device go through host memory


def pick_device(env: RankEnv) -> torch.device:
    """The GPU of an env, or the CPU where there is none; ranks share GPUs if there are more of them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", env.local_rank % count) if count else torch.device("cpu")


def connect(env: RankEnv, timeout: float) -> dist.Store:
    """A connection of its own to the rendezvous store, under a name of this attempt."""
    # A launcher's store is there before its ranks are; where it is not, the launcher has gone.
    patience = min(timeout, _SERVED) if env.launcher_serves else timeout
    store = dist.TCPStore(
        env.host, env.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience)
    )
    store.set_timeout(timedelta(seconds=timeout))
    return dist.PrefixStore(f"flowcache/{env.attempt}", store)


def serve_store(env: RankEnv, timeout: float) -> dist.Store | None:
    """Serve the rendezvous store, where that is this rank's task; it lives as long as the result."""
    if env.launcher_serves or env.rank:
        return None
    return dist.TCPStore(env.host, env.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))


@contextmanager
def open_groups(env: RankEnv, mesh: Mesh, timeouts: Timeouts, device: torch.device) -> Iterator[Groups]:
    """Open all process groups; every rank must do so at the same time."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    nccl = 0 < gpus and env.local_world_size <= gpus
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo", store=connect(env, timeouts.first), rank=env.rank, world_size=env.world_size, timeout=_IDLE
    )
    backend = "nccl" if nccl else "gloo"
    limit = timedelta(seconds=timeouts.first)
    cp = None
    if mesh.layout.cp > 1:
        for stage in range(mesh.layout.pp):
            group = dist.new_group(
                mesh.ranks_of(stage), backend=backend, timeout=limit, device_id=device if nccl else None
            )
            cp = group if stage == mesh.stage else cp
    wires: dict[Edge, Wire] = {}
    for edge in mesh.edges():
        group = None
        if nccl:
            pair = [edge.source, edge.target]
            group = dist.new_group(pair, backend="nccl", timeout=_IDLE, device_id=device)
        if mesh.rank in (edge.source, edge.target):
            wires[edge] = _wire(edge, mesh, device, group)
    yield Groups(cp=cp, wires=wires, device=device, through_host=device.type == "cuda" and not nccl)
    # Only after a clean end: tearing down while a peer hangs can hang as well.
    dist.barrier()
    dist.destroy_process_group()


def _wire(edge: Edge, mesh: Mesh, device: torch.device, group: dist.ProcessGroup | None) -> Wire:
    peer = edge.target if edge.source == mesh.rank else edge.source
    if group is not None:
        wire = NcclWire(peer, group, device)
        wire.join(sends=edge.source == mesh.rank)
        return wire
    return HostWire(GlooWire(peer)) if device.type == "cuda" else GlooWire(peer)
