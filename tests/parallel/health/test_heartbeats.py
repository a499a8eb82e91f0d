"""The health of a gang as a process sees it that is none of its ranks."""

import time

import pytest

from parallel.comm.store import StoreServer, connect_store
from parallel.health.failure import Failure, report_failure
from parallel.health.hang_detector import Heartbeat
from parallel.health.heartbeats import Heartbeats
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh
from tests.waiting import until

TIMES = Timeouts(silent=0.8, first=60.0, step=0.8, grace=0.1)


def connected(address):
    return connect_store(address, patience=10.0, timeout=10.0)


class Rank:
    """Heartbeats of one rank, as its monitor sends them."""

    def __init__(self, address, rank):
        self.count, self.doing, self.machine = 0, "", "here"
        self.thread = Heartbeats(connected(address), Mesh(layout=Layout(pp=2), rank=rank), TIMES, beat=self.beat)
        self.thread.start()

    def beat(self):
        self.count += 1
        return Heartbeat(
            count=self.count, items=9, doing=self.doing, last="x", limit=TIMES.step, pid=7, machine=self.machine
        )


@pytest.fixture
def gang():
    """The reader, the two ranks and the store of a gang."""
    store = StoreServer("127.0.0.1")
    ranks = [Rank(store.address, rank) for rank in range(2)]
    reader = Heartbeats(connected(store.address), Mesh(layout=Layout(pp=2), rank=0), TIMES)
    reader.start()
    yield reader, ranks, store.address
    for thread in (reader, *(rank.thread for rank in ranks)):
        thread.close(5)
    store.close()


def first(reader, seconds=10):
    deadline = time.monotonic() + seconds
    while (found := reader.failure or reader.diagnosis) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_a_healthy_gang_is_seen_and_nothing_is_found(gang):
    reader, _, _ = gang
    assert first(reader, 1.5) is None
    assert [reader.latest[rank].pid for rank in range(2)] == [7, 7]


def test_what_a_rank_has_reported_is_read(gang):
    reader, _, address = gang
    failure = Failure(message="rank 1 has gone", status=1, reporter=0, hung=(1,))
    report_failure(connected(address), failure)
    assert first(reader) == failure


def test_a_silent_rank_is_named(gang):
    reader, ranks, _ = gang
    assert first(reader, 0.5) is None
    ranks[1].thread.close(5)
    found = first(reader)
    assert found.hung == (1,) and found.message.startswith("rank 1 (stage 1 of 2) has given no sign of life for 1 s")


def test_a_stuck_rank_is_named(gang):
    reader, ranks, _ = gang
    ranks[1].doing = "an item"
    assert first(reader).message == "rank 1 (stage 1 of 2) has not come on for 1 s at an item"


def test_a_rank_that_has_left_is_not_missed(gang):
    reader, ranks, _ = gang
    for rank in ranks:
        rank.thread.leave()
    assert first(reader, 1.5) is None
    assert dict(reader.latest) == {0: None, 1: None}


def test_a_thread_that_dies_of_anything_fails_the_gang(gang):
    """Not of a RuntimeError alone, which a store raises: here the heartbeat cannot be written as JSON."""
    reader, ranks, _ = gang
    ranks[1].machine = object()
    assert first(reader).message.startswith("rank 1: heartbeats: TypeError: Object of type object is not JSON")


def test_a_store_that_is_gone_is_said():
    store = StoreServer("127.0.0.1")
    reader = Heartbeats(connected(store.address), Mesh(layout=Layout(pp=2), rank=0), TIMES)
    reader.start()
    store.close()
    until(lambda: reader.lost)
    assert reader.failure is None
    reader.close(5)
