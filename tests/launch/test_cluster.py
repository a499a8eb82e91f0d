"""Joining a cluster and starting one: the one that is started here leaves the cores to the ranks."""

import os
import signal
import socket
import sys
import threading
import time

import pytest
import ray
import torch

from launch.cluster import ray_cluster
from models.errors import InputError
from tests.launch.process import flowcache_process


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
    refused = pytest.raises(InputError, match=f"cannot join the Ray cluster at {address}: .*{expected}")
    with pytest.MonkeyPatch.context() as patch, refused:
        patch.setenv("RAY_ADDRESS", address)
        with ray_cluster(cpus=1):
            pass
    assert time.monotonic() - began < 30  # Ray by itself tries for a minute


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


def test_an_address_of_no_kind_is_one_line():
    _refuse("foo://bar", "Module: foo does not exist")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_wait_for_a_cluster_at_once(tmp_path, sent, status):
    """What answers there knows HTTP/2, and then says nothing more: Ray would wait for a minute, and see no signal."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle moving right", "chunks": 1}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        process = flowcache_process(tmp_path, "batch", "prompts.jsonl", extra={"RAY_ADDRESS": f"{host}:{port}"})
        server.settimeout(60)
        knocks, _ = server.accept()
        knocks.recv(100)
        knocks.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        while knocks.recv(100):
            pass  # until the command has heard enough, and asks Ray to join
        time.sleep(1.0)
        began = time.monotonic()
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (status, "flowcache: stopped\n")
    assert time.monotonic() - began < 25  # the same
