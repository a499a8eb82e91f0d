"""The desk of a gang's lead, with a real engine on a gang of one rank."""

import threading
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from parallel.cluster.command_loop import CommandLoop
from parallel.cluster.messages import (
    Admitted,
    CancelVideo,
    ChunkMade,
    ChunksHeard,
    ChunkTaken,
    Finish,
    GangReady,
    PermitQuantum,
    Progressed,
    QuantumDone,
    QuantumReady,
    VideoDone,
    VideoJob,
)
from parallel.health.timeouts import Timeouts
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import open_gang
from parallel.topology.mesh import Layout, Mesh
from tests.parallel.cluster.sources import SmallSource
from tests.parallel.small import request

MOST_WAITING = 8


class Desk:
    """A driver that grants every quantum at once."""

    def __init__(self):
        self.told = []
        self.lead = CommandLoop(self.hear)

    def hear(self, events):
        self.told.append(events)
        for event in events:
            if isinstance(event, QuantumReady):
                self.lead.obey(PermitQuantum(video=event.video, quantum=event.quantum))

    def all(self, kind):
        return [event for events in list(self.told) for event in events if isinstance(event, kind)]


@contextmanager
def running():
    desk, failures = Desk(), []

    def work():
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}
        env = RankEnv(**place, host="127.0.0.1", port=store.port, launcher_serves=True)
        layout = Layout(pp=1)
        try:
            with open_gang(env, layout, timeouts=Timeouts(silent=30.0)) as gang:
                pipeline = SmallSource().lead(Mesh(layout=layout, rank=0), "cpu")
                with gang.lead(pipeline) as (engine, _):
                    desk.lead.run(engine, lambda made: made.num_steps // 4)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        until(lambda: desk.all(GangReady), "the gang is not ready")
        yield desk
    finally:
        desk.lead.obey(ChunksHeard(count=1000))
        desk.lead.obey(Finish())
        thread.join(20)
    assert not thread.is_alive() and not failures


def until(condition, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_no_more_is_made_than_the_driver_can_take():
    """A driver that is busy writing files is not buried in chunks; the lead waits, and goes on when it is heard."""
    with running() as desk:
        desk.lead.obey(VideoJob(video="long", request=request(chunks=20)))
        until(lambda: len(desk.all(ChunkMade)) >= MOST_WAITING, "it makes nothing")
        time.sleep(1.0)
        waiting = len(desk.all(ChunkMade))
        assert MOST_WAITING <= waiting <= MOST_WAITING + 4  # those that the same step has finished
        desk.lead.obey(ChunksHeard(count=waiting))
        until(lambda: len(desk.all(ChunkMade)) > waiting, "it does not go on")
        desk.lead.obey(ChunksHeard(count=20))
        until(lambda: desk.all(VideoDone), "it does not end")
        assert [chunk.index for chunk in desk.all(ChunkMade)] == list(range(20))


def test_what_nobody_waits_for_goes_with_what_comes_next():
    """Every message costs the ranks time: with one video, a finished quantum is told with the next chunk or quantum."""
    with running() as desk:
        desk.lead.obey(VideoJob(video="one", request=request(chunks=6)))
        until(lambda: desk.all(VideoDone), "it does not end")
        assert len(desk.all(Admitted)) == 1
        assert len(desk.all(Progressed)) == len(desk.all(QuantumDone)) > 0
        for events in desk.told:
            assert not isinstance(events[-1], QuantumDone | Progressed), "a message of its own"


def test_a_cancelled_video_ends_and_the_next_is_made():
    with running() as desk:
        desk.lead.obey(VideoJob(video="unwanted", request=request(chunks=20)))
        until(lambda: desk.all(ChunkMade), "it makes nothing")
        desk.lead.obey(ChunkTaken(video="unwanted", index=0))
        desk.lead.obey(CancelVideo(video="unwanted"))
        desk.lead.obey(ChunksHeard(count=100))
        desk.lead.obey(VideoJob(video="wanted", request=request(chunks=2)))
        until(lambda: desk.all(VideoDone), "it does not end")
        assert [done.video for done in desk.all(VideoDone)] == ["wanted"]


def test_commands_for_videos_that_are_gone_are_ignored():
    with running() as desk:
        for command in (
            PermitQuantum(video="gone", quantum=3),
            ChunkTaken(video="gone", index=1),
            CancelVideo(video="gone"),
        ):
            desk.lead.obey(command)
        desk.lead.obey(VideoJob(video="here", request=request(chunks=1)))
        until(lambda: desk.all(VideoDone), "it does not end")
