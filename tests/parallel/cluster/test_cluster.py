"""Videos on gangs of a local Ray cluster, undisturbed and disturbed."""

import os
import signal

import pytest

from models.errors import InputError
from parallel.cluster.controller import Controller
from parallel.cluster.messages import ChunkMade, GangLost, GangReady
from tests.parallel.cluster.helpers import check_same, make, order, settings
from tests.parallel.cluster.sources import POISON, SmallSource, alone, requests
from tests.parallel.small import one_thread, request

pytestmark = pytest.mark.slow


class Log:
    """What the engine has told, as plain values."""

    def __init__(self):
        self.entries = []

    def __call__(self, entry):
        self.entries.append(entry)

    def of(self, event):
        return [entry for entry in self.entries if entry["event"] == event]

    def since(self):
        kept, self.entries = self.entries, []
        return kept


@pytest.fixture(scope="module")
def log():
    return Log()


@pytest.fixture(scope="module")
def engine(cluster, log):
    one_thread()
    with Controller(settings(gangs=2, pp=2, source=SmallSource(layer_seconds=0.004)), log=log) as engine:
        begins = (event.gang for event in engine.run(lasting=True) if isinstance(event, GangReady))
        assert {next(begins), next(begins)} == {"gang-0", "gang-1"}  # or one makes the first videos alone
        begins.close()
        yield engine


def pid(engine, gang, rank):
    view = next(view for view in engine.gangs() if view.gang == gang)
    return view.ranks[rank].pid


def once(gang_of, chunk, action):
    """Does something when a gang has made its n-th chunk."""
    left = [chunk]

    def watch(event):
        if isinstance(event, ChunkMade) and left and gang_of(event):
            left[0] -= 1
            if not left[0]:
                left.clear()
                action()

    return watch


def test_four_videos_on_two_gangs_are_those_of_one_process(engine, log):
    wanted = requests(4)
    outcome = make(engine, [order(f"v{index}", one) for index, one in enumerate(wanted)])
    assert sorted(outcome.done) == ["v0", "v1", "v2", "v3"] and not outcome.failed
    for index, one in enumerate(wanted):
        check_same(outcome.latents[f"v{index}"], alone(one))
    assert {entry["gang"] for entry in log.of("ChunkMade")} == {"gang-0", "gang-1"}


def test_a_killed_rank_costs_nothing_but_time(engine, log, tmp_path):
    wanted = requests(3, chunks=5)
    log.since()
    watch = once(lambda event: True, 4, lambda: os.kill(pid(engine, "gang-0", 1), signal.SIGKILL))
    outcome = make(engine, [order(f"k{i}", one, folder=tmp_path) for i, one in enumerate(wanted)], watch)
    for index, one in enumerate(wanted):
        check_same(outcome.latents[f"k{index}"], alone(one))
    [lost] = [event for event in outcome.events if isinstance(event, GangLost)]
    assert lost.gang == "gang-0" and lost.videos and "rank 1" in lost.message
    quanta = [entry["quantum"] for entry in log.of("QuantumReady") if entry["video"] == lost.videos[0]]
    again = next(index for index, quantum in enumerate(quanta) if quanta[:index] and quantum <= quanta[index - 1])
    assert (
        quanta[again] >= quanta[again - 1] - 2
    )  # a checkpoint a quantum: that which ran, and one that was not yet whole


def test_a_stopped_rank_is_found_and_its_gang_started_again(engine, tmp_path):
    wanted = requests(2, chunks=5)
    watch = once(lambda event: True, 3, lambda: os.kill(pid(engine, "gang-1", 0), signal.SIGSTOP))
    stopped = pid(engine, "gang-1", 0)
    outcome = make(engine, [order(f"s{i}", one, folder=tmp_path) for i, one in enumerate(wanted)], watch)
    for index, one in enumerate(wanted):
        check_same(outcome.latents[f"s{index}"], alone(one))
    assert [event.gang for event in outcome.events if isinstance(event, GangLost)] == ["gang-1"]
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)


def test_a_gang_that_is_stopped_as_a_whole_is_found_by_the_controller(engine, tmp_path):
    """No rank is left to find it: the controller misses the heartbeats."""
    wanted = requests(2, chunks=5)
    stopped = [pid(engine, "gang-0", rank) for rank in range(2)]
    watch = once(lambda event: True, 3, lambda: [os.kill(one, signal.SIGSTOP) for one in stopped])
    outcome = make(engine, [order(f"w{i}", one, folder=tmp_path) for i, one in enumerate(wanted)], watch)
    for index, one in enumerate(wanted):
        check_same(outcome.latents[f"w{index}"], alone(one))
    [lost] = [event for event in outcome.events if isinstance(event, GangLost)]
    assert lost.gang == "gang-0" and "sign of life" in lost.message, lost.message
    for one in stopped:
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)


def test_a_video_that_breaks_gangs_is_set_aside_and_the_others_are_made(engine):
    good = requests(2)
    outcome = make(
        engine,
        [order("good-0", good[0]), order("bad", request(prompt=POISON)), order("good-1", good[1])],
    )
    assert outcome.failed.keys() == {"bad"} and "the caption is no number" in outcome.failed["bad"]
    check_same(outcome.latents["good-0"], alone(good[0]))
    check_same(outcome.latents["good-1"], alone(good[1]))


def test_a_video_that_cannot_be_made_is_refused_and_the_gang_goes_on(engine):
    outcome = make(engine, [order("wide", request(width=16, height=16)), order("good", request())])
    assert "good" in outcome.done


def test_what_the_cluster_has_no_room_for_is_refused_at_once(cluster):
    with pytest.raises(InputError, match="2 gangs of --pp 8 x --cp 1 need 16 CPUs; the cluster has .* CPUs on"):
        with Controller(settings(gangs=2, pp=8)):
            pass
