"""Joining a cluster and starting one: the one that is started here leaves the cores to the ranks."""

import os
import socket
import sys
import threading
import time

import pytest
import ray
import torch

from launch.backends.ray import ray_cluster
from models.errors import InputError


def _standing() -> tuple[int, int]:
    return os.nice(0), os.sched_getscheduler(0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other policies")
def test_workers_are_not_put_last_and_nobody_breaks_in_on_who_computes(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = _standing()
    with ray_cluster(cpus=2):
        policy = before[1] if torch.cuda.is_available() else os.SCHED_BATCH
        assert ray.get(ray.remote(_standing).remote(), timeout=60) == (before[0], policy)
    assert _standing() == before


def _refuse(address, expected):
    began = time.monotonic()
    with pytest.raises(InputError, match=f"cannot join the Ray cluster at {address}: .*{expected}"):
        with ray_cluster(cpus=1, address=address):
            pass
    assert time.monotonic() - began < 15


def test_an_address_that_refuses_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    _refuse(f"127.0.0.1:{port}", "refused")
    _refuse(f"ray://127.0.0.1:{port}", "refused")


@pytest.mark.slow
def test_an_address_that_takes_connections_and_never_answers_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        _refuse(f"127.0.0.1:{server.getsockname()[1]}", "has not answered within 6 s")


def test_an_address_where_something_else_answers_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as caller:
                caller.recv(100)
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        _refuse(f"127.0.0.1:{server.getsockname()[1]}", "no Ray cluster")
        thread.join(5)


def test_a_port_that_is_no_number_is_one_line():
    _refuse("127.0.0.1:x", "invalid literal")
