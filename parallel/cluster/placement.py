"""Where the ranks of gangs run: whether the cluster has the resources, and which rank gets which place.

A bundle holds one pipeline stage, so that the ranks of a context-parallel group, which talk most, never run on
different machines. A gang that fits on one node is kept there.
"""

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from models.errors import InputError
from parallel.health.timeouts import HEAD_ANSWERS_SECONDS
from parallel.mesh import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class GangShape:
    """What a gang needs."""

    layout: Layout  # of its ranks
    gpus: bool  # each rank gets a GPU
    cpus: int = 1  # of each rank

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of a stage."""
        cp = float(self.layout.cp)
        return {"CPU": self.cpus * cp} | ({"GPU": cp} if self.gpus else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of one rank."""

    bundle: int  # of the placement group
    node: str  # id
    local_rank: int  # among the gang's ranks of that node


def alive_nodes() -> dict[str, dict[str, float]]:
    """Resources of the nodes that are up, by id."""
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def kill_process(pid: int, node: str, *, here: bool = False) -> None:
    """End a process of a node for certain, also one that is stopped and does not listen to Ray.

    With `here`, for a cluster that is gone, only if the node is this one.
    It stands in this file because the other node has to import it: that takes no torch.
    """
    if node == ray.get_runtime_context().get_node_id():
        _kill(pid)
    elif not here:
        where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def cluster_has_gpus() -> bool:
    """Whether any node has a GPU."""
    return any(resources.get("GPU", 0) >= 1 for resources in alive_nodes().values())


def head_answers() -> bool:
    """Whether somebody takes connections at the head of the cluster; without it Ray's calls hang for a minute."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_ANSWERS_SECONDS):
        return True
    return False


def plan_strategies(nodes: Mapping[str, Mapping[str, float]], shape: GangShape, gangs: int) -> list[str]:
    """A Ray strategy for each gang, one after another: on one node that has the resources, over several otherwise.

    An InputError if they do not fit.
    """
    free = sorted((_bundles(resources, shape.bundle) for resources in nodes.values()), reverse=True)
    strategies = []
    for _ in range(gangs):
        fitting = [index for index, bundles in enumerate(free) if bundles >= shape.layout.pp]
        if fitting:
            free[min(fitting, key=lambda index: free[index])] -= shape.layout.pp  # leave large gaps to others
            strategies.append("STRICT_PACK")
            continue
        left = shape.layout.pp
        for index in sorted(range(len(free)), key=lambda index: -free[index]):
            taken = min(left, free[index])
            free[index] -= taken
            left -= taken
        if left:
            raise InputError(_too_large(nodes, shape, gangs))
        strategies.append("PACK")
    return strategies


def assign_places(bundle_nodes: Mapping[int, str], layout: Layout, *, first_node: str) -> list[Place]:
    """Places of the ranks in order, so that neighbouring stages share a node; those on `first_node` come first."""
    order = sorted(bundle_nodes, key=lambda bundle: (bundle_nodes[bundle] != first_node, bundle_nodes[bundle], bundle))
    nodes = [bundle_nodes[bundle] for bundle in order for _ in range(layout.cp)]
    places = []
    for rank, node in enumerate(nodes):
        places.append(Place(bundle=order[rank // layout.cp], node=node, local_rank=nodes[:rank].count(node)))
    return places


class Placement:
    """A placement group for a gang, by one of Ray's strategies."""

    def __init__(self, shape: GangShape, strategy: str) -> None:
        self._shape = shape
        self._group: PlacementGroup = placement_group([shape.bundle] * shape.layout.pp, strategy=strategy)
        self._nodes: set[str] = set()

    def places(self) -> list[Place] | None:
        """Places of the ranks in order; None while the cluster has not reserved them."""
        table: dict[str, Any] = placement_group_table(self._group)
        if table.get("state") != "CREATED":
            return None
        found = {int(bundle): str(node) for bundle, node in table["bundles_to_node_id"].items()}
        self._nodes = set(found.values())
        here = ray.get_runtime_context().get_node_id()
        return assign_places(found, self._shape.layout, first_node=here)

    def intact(self, nodes: Sequence[str]) -> bool:
        """Whether none of its nodes is gone, given those that are up."""
        return self._nodes <= set(nodes)

    def at(self, place: Place) -> PlacementGroupSchedulingStrategy:
        """Ray's strategy that starts an actor there."""
        return PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=place.bundle)

    def remove(self) -> None:
        """Give its resources back; what runs there ends."""
        remove_placement_group(self._group)


def _bundles(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Bundles that fit."""
    return min(int(resources.get(name, 0.0) // count) for name, count in bundle.items())


def _too_large(nodes: Mapping[str, Mapping[str, float]], shape: GangShape, gangs: int) -> str:
    layout = shape.layout
    kind = "GPU" if shape.gpus else "CPU"
    each = 1 if shape.gpus else shape.cpus
    asked = f"{gangs} gang{'s' * (gangs > 1)} of --pp {layout.pp} x --cp {layout.cp}"
    needs = f"{gangs * layout.world_size * each} {kind}s"
    if shape.gpus:
        needs += f" and {gangs * layout.world_size * shape.cpus} CPUs"
    if layout.cp > 1:
        needs += f", {layout.cp * each} of the {kind}s of each stage on one node"
    counts = [int(resources.get(kind, 0)) for resources in nodes.values()]
    cpus = sum(int(resources.get("CPU", 0)) for resources in nodes.values())
    has = f"{sum(counts)} {kind}s" + (f" and {cpus} CPUs" if shape.gpus else "")
    spread = f"{len(counts)} node{'s' * (len(counts) != 1)}"
    if len(counts) > 1:
        spread += f" ({', '.join(str(count) for count in sorted(counts, reverse=True))})"
    return f"{asked} need{'s' * (gangs == 1)} {needs}; the cluster has {has} on {spread}: ask for fewer, or add nodes"
