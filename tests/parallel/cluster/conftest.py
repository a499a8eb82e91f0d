"""One local cluster for all tests: a head node, to which a test may add others."""

import pytest

from tests.parallel.forked import ray_workers


@pytest.fixture(scope="session")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    store = 80 * 2**20
    system = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}  # a lost node is known after 3 s
    system["prestart_worker_first_driver"] = False  # ranks, with variables of their own, can use none
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "object_store_memory": store,
            "include_dashboard": False,
            "_system_config": system,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_workers().items():
            patch.setenv(name, value)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()
