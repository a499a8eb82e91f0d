"""The store where ranks meet: values for all who know the secret, and nothing for anybody else."""

import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from models.errors import InputError
from parallel.comm.sockets import interface_address, interface_of
from parallel.comm.store import StoreError, StoreServer, connect, connect_store, meet
from parallel.health.failure import Failure, read_failure, report_failure
from parallel.mesh import Layout
from parallel.ranks.environment import RankEnv
from parallel.ranks.spawn import run_ranks
from tests.parallel.strangers import garbage, listening, reaches, told
from tests.ports import free_ports

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def server():
    made = StoreServer("127.0.0.1")
    yield made
    made.close()


def client(server, timeout=10.0):
    return connect_store(server.address, patience=5.0, timeout=timeout)


def test_what_one_sets_the_others_get(server):
    one, other = client(server), client(server)
    one.set("a", bytes(range(256)))
    one.set("b", "text")
    assert other.get("a") == bytes(range(256)) and other.multi_get(["b", "a"])[0] == b"text"
    assert other.check(["a", "b"]) and not other.check(["a", "c"])
    assert (one.add("n", 2), other.add("n", 3), server.store.get("n")) == (2, 5, b"5")
    assert other.delete_key("b") and not one.delete_key("b") and not one.check(["b"])
    assert one.clone().get("a") == other.get("a")


def test_the_first_report_holds(server):
    first, second = Failure(message="the first", reporter=1), Failure(message="the second", reporter=0)
    assert report_failure(client(server), first) == first
    assert report_failure(server.store, second) == first
    assert read_failure(client(server)) == first


def test_a_value_is_waited_for_and_a_missing_one_is_named(server):
    waits, sets = client(server), client(server)
    timer = threading.Timer(0.2, sets.set, ("late", "here"))
    timer.start()
    assert waits.get("late") == b"here"
    with pytest.raises(StoreError, match="never: not come in 0 s"):
        client(server, timeout=0.1).wait(["late", "never"])
    short = client(server, timeout=0.1)
    with pytest.raises(RuntimeError, match="never: not come"):
        dist.PrefixStore("through/pytorch", short).get("never")


def test_a_connection_that_is_made_while_a_store_closes_ends_with_it():
    for _ in range(100):
        server = StoreServer("127.0.0.1")
        asked = client(server)
        server.close()
        with pytest.raises(StoreError, match="closed its connections"):
            asked.check(["a"])


def test_a_store_that_is_closed_is_an_error_at_once(server):
    other = client(server, timeout=60.0)
    timer = threading.Timer(0.2, server.close)
    timer.start()
    with pytest.raises(StoreError, match="closed its connections"):
        other.get("never")


def test_a_store_that_is_not_there_yet_is_waited_for():
    [port] = free_ports(1)
    made = []
    timer = threading.Timer(0.3, lambda: made.append(StoreServer("127.0.0.1", "s", port=port)))
    timer.start()
    env = RankEnv(rank=1, world_size=2, local_rank=1, host="127.0.0.1", port=port, secret="s", one_machine=True)
    nobody, address = meet(env, None, 5.0)
    assert nobody is None
    connect(env, address, 5.0).set("a", "b")
    assert made[0].store.get("a") == b"b"
    made[0].close()


@linux
def test_a_stranger_gets_nothing_and_changes_nothing(server):
    """From another address of this machine: no value, no sign that there are any, and nobody is held up."""
    server.store.set("key", "what nobody else must know")
    port = server.address.port
    assert not reaches("127.0.0.2", port)
    for sent in garbage():
        answer = told(port, sent)
        assert len(answer) < 100 and b"nobody else" not in answer  # the challenge, whose answer needs the secret
    began = time.monotonic()
    for wrong in ("", server.address.secret[:-1]):
        with pytest.raises(StoreError, match="does not know this run's secret"):
            connect_store(replace(server.address, secret=wrong), patience=60.0, timeout=1.0)
    assert client(server).get("key") == b"what nobody else must know"
    assert time.monotonic() - began < 30  # of twice the minute that it would be tried for
    assert server.store.get("key") == b"what nobody else must know"


@linux
def test_a_client_of_pytorch_is_a_stranger(server):
    code = f"""
import torch.distributed as dist
from datetime import timedelta
store = dist.TCPStore("127.0.0.1", {server.address.port}, is_master=False, timeout=timedelta(seconds=1))
store.set("flowcache/0/failure", "I was here")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert ended.returncode != 0 and not server._values._values


def test_a_server_that_does_not_know_the_secret_is_not_talked_to():
    other = StoreServer("127.0.0.1")
    env = RankEnv(rank=1, world_size=2, local_rank=1, host="127.0.0.1", port=other.address.port, secret="mine")
    _, address = meet(replace(env, one_machine=True), None, 5.0)
    with pytest.raises(StoreError, match="secret"):
        connect(env, address, 60.0)
    other.close()


def test_ranks_on_several_machines_need_a_secret():
    env = RankEnv(rank=1, world_size=2, local_rank=0, host="192.0.2.7", port=1)
    with pytest.raises(InputError, match="need the same FLOWCACHE_SECRET"):
        meet(env, None, 1.0)


def torchrun_store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_under_torchrun_rank_0_serves_a_store_of_its_own():
    agent = torchrun_store()
    env = RankEnv(rank=0, world_size=2, local_rank=0, host="127.0.0.1", port=agent.port, torchrun=True, secret="s")
    server, at = meet(replace(env, one_machine=True), None, 5.0)
    nobody, same = meet(replace(env, one_machine=True, rank=1), None, 5.0)
    assert nobody is None and same == at == server.address
    connect(env, same, 5.0).set("a", "b")
    assert server.store.get("a") == b"b" and not agent.check(["a"])
    server.close()


def test_an_address_that_a_stranger_has_written_is_not_followed():
    agent = torchrun_store()
    agent.set("flowcache/0/store", '["[\\"127.0.0.1\\", 1]", "00"]')
    env = RankEnv(rank=1, world_size=2, local_rank=1, host="127.0.0.1", port=agent.port, torchrun=True, secret="s")
    with pytest.raises(InputError, match="was not written with this FLOWCACHE_SECRET"):
        meet(env, None, 5.0)


@linux
def test_an_interface_is_where_the_ranks_listen():
    """The one that is asked for, or all, on several machines; the loopback address on one."""
    assert interface_address("lo") == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    with pytest.raises(InputError, match="--interface eth77 has no IPv4 address on this machine, which has .*lo"):
        interface_address("eth77")
    env = RankEnv(rank=0, world_size=2, local_rank=0, host=socket.gethostname(), port=0, secret="s")
    for given, where in ((env, "0.0.0.0"), (replace(env, one_machine=True), "127.0.0.1")):
        server, _ = meet(given, None, 5.0)
        assert {host for host, port in listening(["self"]) if port == server.address.port} == {where}
        server.close()
    server, _ = meet(env, "lo", 5.0)
    assert ("127.0.0.1", server.address.port) in listening(["self"])
    server.close()


def test_a_secret_is_not_shown():
    env = RankEnv(rank=0, world_size=1, local_rank=0, host="h", port=1, secret="do not tell")
    assert "do not tell" not in repr(env) + repr(StoreServer("127.0.0.1", "do not tell").address)


GANG = """
import sys
from pathlib import Path
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import open_gang
from parallel.mesh import Layout
from tests.parallel.strangers import listening
with open_gang(RankEnv.from_environment(), Layout(pp=2, cp=1)) as gang:
    Path(sys.argv[1], f"{gang.mesh.rank}").write_text(" ".join(host for host, _ in listening(["self"])))
"""


@linux
@pytest.mark.slow
def test_ranks_of_one_machine_listen_at_the_loopback_address_alone(tmp_path):
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{GANG}", str(tmp_path)]
    run_ranks(command, Layout(pp=2, cp=1), threads=1)
    for rank in range(2):
        assert set((tmp_path / f"{rank}").read_text().split()) == {"127.0.0.1"}
