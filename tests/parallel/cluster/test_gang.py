"""A gang as the controller polls it, with ranks that are not there: nothing that was received is lost."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from models.errors import InputError
from parallel.cluster import gang as gang_module
from parallel.cluster.gang import Gang, GangBroken, GangState
from parallel.cluster.messages import ChunkMade, GangReady, RankStarted
from parallel.health.exit_codes import BAD_INPUT
from parallel.health.failure import Failure
from tests.parallel.cluster.helpers import settings

CHUNK = ChunkMade(video="a", index=0, frames=np.zeros(1, np.uint8), latents=np.zeros(1, np.float32))


class Ranks:
    """Two ranks: how they have ended, and what their heartbeats tell."""

    def __init__(self):
        self.ends, self.killed, self.latest = {}, [], {}
        self.failure, self.diagnosis = None, None

    def close(self, seconds):
        pass


@pytest.fixture
def ranks():
    return Ranks()


@pytest.fixture
def gang(monkeypatch, ranks):
    def wait(runs, **_):
        return [run for run in runs if run in ranks.ends], [run for run in runs if run not in ranks.ends]

    fake = SimpleNamespace(
        wait=wait,
        get=lambda run, timeout: ranks.ends[run],
        kill=lambda actor, no_restart: None,
    )
    monkeypatch.setattr(gang_module, "ray", fake)
    monkeypatch.setattr(gang_module, "kill_process", lambda pid, node, here: ranks.killed.append(pid))
    monkeypatch.setattr(gang_module, "Placement", lambda shape, strategy: SimpleNamespace(remove=lambda: None))
    news = threading.Event()
    made = Gang("gang-0", settings(), "PACK", news)
    made._ranks = [gang_module._Rank(SimpleNamespace(node="here"), news) for _ in range(2)]
    for number, rank in enumerate(made._ranks):
        rank.run, rank.connection = number, SimpleNamespace(close=lambda: None)
    made._heartbeats, made.state, made._began = ranks, GangState.STARTING, float("inf")
    yield made
    made.stop()


@pytest.mark.parametrize("how", ["heartbeats", "end"])
def test_events_that_come_with_a_failure_are_not_lost(gang, ranks, how):
    gang._ranks[0].inbox += [RankStarted(pid=11), [GangReady()], [CHUNK]]
    if how == "heartbeats":
        ranks.diagnosis = Failure(message="rank 1 has given no heartbeat", reporter=0)
    else:
        ranks.ends[1] = Failure(message="rank 1 has given no heartbeat", reporter=1)
    assert gang.poll() == [GangReady(), CHUNK]
    with pytest.raises(GangBroken, match="rank 1 has given no heartbeat"):
        gang.check()
    gang.stop()
    assert ranks.killed == [11]


def test_a_failure_is_raised_at_once(gang, ranks):
    assert gang.poll() == []
    gang.check()
    ranks.diagnosis = Failure(message="rank 1 hangs", reporter=0)
    with pytest.raises(GangBroken, match="rank 1 hangs"):
        gang.check()


def test_a_reported_failure_waits_for_what_the_ranks_still_send(gang, ranks, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gang_module.time, "monotonic", lambda: now[0])
    ranks.failure = Failure(message="rank 1: it broke", reporter=1)
    gang.check()
    now[0] += 1.0
    gang._ranks[0].inbox.append([CHUNK])
    assert gang.poll() == [CHUNK]
    gang.check()
    now[0] += 2.0
    with pytest.raises(GangBroken, match="it broke"):
        gang.check()


@pytest.mark.parametrize("ready", [False, True])
def test_bad_input_ends_everything_as_new_ranks_would_end_in_the_same_way(gang, ranks, ready):
    gang._ranks[0].inbox += [[GangReady()]] * ready
    gang.poll()
    gang.check()
    ranks.ends[0] = Failure(message="no such weights", status=BAD_INPUT, reporter=0)
    gang._ends_at = 0.0  # it looks at them twice a second
    with pytest.raises(InputError, match="no such weights"):
        gang.check()


def test_a_connection_that_ends_with_an_error_breaks_the_gang(gang, ranks):
    gang._ranks[1].end(ValueError("this is no message"))
    with pytest.raises(GangBroken, match="rank 1.*its connection: this is no message"):
        gang.check()


def test_a_gang_that_does_not_come_up_is_broken(gang):
    gang._began = -1000.0
    with pytest.raises(GangBroken, match="have not met within 120 s"):
        gang.check()
