"""The cluster that is started here leaves the cores to those that compute."""

import os
import sys

import pytest
import ray
import torch

from launch.ray_cluster import ray_cluster


def _standing() -> tuple[int, int]:
    return os.nice(0), os.sched_getscheduler(0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other policies")
def test_workers_are_not_put_last_and_nobody_breaks_in_on_who_computes(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = _standing()
    with ray_cluster(cpus=2):
        policy = before[1] if torch.cuda.is_available() else os.SCHED_BATCH
        assert ray.get(ray.remote(_standing).remote(), timeout=60) == (before[0], policy)
    assert _standing() == before
