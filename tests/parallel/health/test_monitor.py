"""The watch of one rank over itself."""

import threading
import time

import pytest

from parallel.comm.store import StoreServer
from parallel.health.failure import GangError
from parallel.health.monitor import Monitor
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh
from parallel.ranks.environment import RankEnv


@pytest.fixture
def monitor():
    """The monitor of a gang of one rank; the test serves the store."""
    env = RankEnv(rank=0, world_size=1, local_rank=0, host="", port=0, launcher_serves=True)
    timeouts = Timeouts(silent=1.0, first=60.0, step=0.5, grace=5.0)
    monitor = Monitor(StoreServer("127.0.0.1").store, Mesh(layout=Layout(), rank=0), timeouts, env)
    monitor.start()
    yield monitor
    monitor.hand_over()
    assert not {"heartbeats", "monitor"} & {thread.name for thread in threading.enumerate()}


def failed(monitor):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        monitor.check()
        time.sleep(0.02)


def test_a_rank_that_comes_on_is_left_alone(monitor):
    for item in range(10):
        monitor.working(f"item {item}")
        time.sleep(0.1)
        monitor.check()


def test_a_rank_that_is_stuck_fails_the_gang(monitor):
    for item in range(9):
        monitor.working(f"item {item}")
    with pytest.raises(GangError, match=r"^rank 0 \(stage 0 of 1\) has not come on for 1 s at item 8$"):
        failed(monitor)


@pytest.mark.parametrize(("thread", "method"), [("monitor", "_open_processes"), ("heartbeats", "_beat")])
def test_a_thread_that_dies_of_anything_fails_the_gang(monitor, thread, method):
    watched = monitor if thread == "monitor" else monitor._heartbeats
    setattr(watched, method, lambda: 1 // 0)
    with pytest.raises(GangError, match=f"{thread}: ZeroDivisionError: "):
        failed(monitor)


def test_a_rank_that_waits_for_what_nobody_works_on_fails_the_gang(monitor):
    monitor.waiting()
    with monitor.expecting(2), pytest.raises(GangError, match="no rank works, though 2 items are under way"):
        failed(monitor)


def test_what_a_rank_reports_first_holds(monitor):
    assert monitor.fail("the first", status=2).message == "the first"
    assert monitor.fail("the second").message == "the first"
    with pytest.raises(GangError, match="the first") as caught:
        monitor.check()
    assert caught.value.failure.status == 2


def test_a_lost_connection_names_the_rank_and_any_other_error_itself(monitor):
    monitor.lost(0, ValueError("a header of no kind\nmore"))
    with pytest.raises(GangError, match=r"messages from or to rank 0: ValueError: a header of no kind$"):
        failed(monitor)
