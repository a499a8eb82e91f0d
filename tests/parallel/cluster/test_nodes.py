"""A node of the cluster goes away: its gang's video goes on from its checkpoint on another node."""

import pytest

from parallel.cluster.controller import Controller
from parallel.cluster.messages import ChunkMade, GangLost
from tests.parallel.cluster.making import check_same, make, order, settings
from tests.parallel.cluster.sources import SmallSource, alone, requests
from tests.parallel.small import one_thread

pytestmark = pytest.mark.slow


def test_a_lost_node_costs_its_gang_and_no_video(cluster, tmp_path):
    one_thread()
    nodes = [cluster.add_node(num_cpus=6, object_store_memory=80 * 2**20)]  # the head, with 4, has no room for it
    cluster.wait_for_nodes()
    told = []
    [wanted] = requests(1, chunks=6)
    source = SmallSource(layer_seconds=0.01)
    with Controller(settings(gangs=1, cpus=3, source=source), log=told.append) as engine:

        def watch(event):
            if isinstance(event, ChunkMade) and event.index == 1 and len(nodes) == 1:
                nodes.append(cluster.add_node(num_cpus=6, object_store_memory=80 * 2**20))
                cluster.remove_node(nodes[0], allow_graceful=False)

        outcome = make(engine, [order("n", wanted, folder=tmp_path)], watch)
        [view] = engine.gangs()
    cluster.remove_node(nodes[1])
    losses = [event for event in outcome.events if isinstance(event, GangLost)]
    assert len(losses) == view.attempt == 1, losses
    check_same(outcome.latents["n"], alone(wanted))
    again = [entry["first"] for entry in told if entry["event"] == "Admitted"]
    assert again[0] == 0 and again[1] > 0
