"""The controller with gangs that are not there: what it hands out, what it sends, and what it keeps."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from parallel.cluster.controller import ClusterLost, Controller
from parallel.cluster.gang import GangBroken, GangState
from parallel.cluster.messages import (
    Admitted,
    CancelVideo,
    ChunkMade,
    ChunkTaken,
    GangDown,
    GangLost,
    GangReady,
    Restarted,
    VideoDone,
    VideoFailed,
    VideoOrder,
)
from tests.parallel.cluster.helpers import order, settings
from tests.parallel.small import request


class FakeGang:
    """A gang that answers with what a test has put down."""

    name, attempt, failed_starts, state = "gang-0", 0, 0, GangState.UP

    def __init__(self):
        self.rounds, self.sent, self.stops = deque([[GangReady()]]), [], 0
        self.head = True

    def poll(self):
        events = self.rounds.popleft() if self.rounds else []
        if isinstance(events, Exception):
            raise events
        return events

    def check(self):
        pass

    def send(self, command):
        self.sent.append(command)

    def stop(self):
        self.stops += 1

    def restart(self):
        self.attempt += 1
        self.rounds.appendleft([GangReady()])

    def give_up(self, *, head=True):
        self.state = GangState.DOWN


@pytest.fixture
def gang():
    return FakeGang()


@pytest.fixture
def controller(gang, monkeypatch):
    monkeypatch.setattr("parallel.cluster.controller.head_answers", lambda: gang.head)
    made = Controller(settings(gangs=1, max_restarts=2))
    made._gangs = {"gang-0": gang}
    made._news.set()  # nothing is waited for
    made._news.clear = lambda: None
    return made


def chunk(index, video="a"):
    return ChunkMade(video=video, index=index, frames=np.zeros(1, np.uint8), latents=np.zeros(1, np.float32))


DONE = VideoDone(video="a", computed=1.0, kv_bytes=0)
ADMITTED = Admitted(video="a", number=7, first=0)


def test_a_chunk_counts_as_stored_when_the_next_event_is_asked_for(controller, gang):
    controller.submit(order("a", request(chunks=1)))
    gang.rounds += [[], [ADMITTED, chunk(0)], [DONE]]
    events = controller.run()
    while not isinstance(next(events), ChunkMade):
        pass
    assert not any(isinstance(command, ChunkTaken) for command in gang.sent)
    assert isinstance(next(events), VideoDone)
    assert gang.sent[-1] == ChunkTaken(video="a", index=0)


def test_a_lost_gang_begins_again_where_the_caller_is_and_no_chunk_comes_twice(controller, gang):
    controller.submit(order("a", request(chunks=3)))
    gang.rounds += [[], [ADMITTED, chunk(0), chunk(1)], GangBroken("rank 1 has died")]
    events, seen = controller.run(), []
    for event in events:
        seen.append(event)
        if isinstance(event, Restarted):
            gang.rounds += [[], [ADMITTED, chunk(1), chunk(2)], [DONE]]
    assert [event.index for event in seen if isinstance(event, ChunkMade)] == [0, 1, 2]
    [lost] = [event for event in seen if isinstance(event, GangLost)]
    assert (lost.message, lost.videos, gang.stops) == ("rank 1 has died", ("a",), 1)
    assert [command.stored for command in gang.sent if isinstance(command, VideoOrder)] == [0, 2]
    assert ChunkTaken(video="a", index=1) in gang.sent


def test_a_chunk_that_is_still_to_be_confirmed_does_not_count_as_stored(controller, gang):
    """Not even for the gang that goes on with the video, nor when that makes the chunk again."""
    controller.submit(replace(order("a", request(chunks=2)), confirmed=True))
    gang.rounds += [[], [ADMITTED, chunk(0), chunk(1)], GangBroken("a rank is gone"), [], [ADMITTED, chunk(0)], []]
    gang.rounds += [[chunk(1)], [DONE]]
    indices = []
    for event in controller.run():
        if isinstance(event, ChunkMade):
            indices.append(event.index)
        if isinstance(event, GangLost):
            controller.stored("a", 1)
    assert indices == [0, 1]
    assert [command.stored for command in gang.sent if isinstance(command, VideoOrder)] == [0, 1]
    assert {command.index for command in gang.sent if isinstance(command, ChunkTaken)} == {0}


def test_a_video_that_has_ended_leaves_nothing_behind(controller, gang):
    for last in (DONE, VideoFailed(video="a", message="too wide"), None):
        controller.submit(order("a", request(chunks=1)))
        gang.rounds += [[], [ADMITTED]] + ([] if last is None else [[last]])
        for event in controller.run():
            if last is None and isinstance(event, Admitted):
                controller.cancel("a")
        assert not controller._videos and not controller._out
    assert gang.sent[-1] == CancelVideo(video="a")


def test_no_event_follows_of_a_cancelled_video(controller, gang):
    controller.submit(order("a", request(chunks=3)))
    gang.rounds += [[], [ADMITTED, chunk(0), chunk(1), chunk(2)], [chunk(3)]]
    seen = []
    for event in controller.run():
        seen.append(event)
        if isinstance(event, ChunkMade):
            controller.cancel("a")
            controller.cancel("a")
    assert [type(event) for event in seen] == [GangReady, Admitted, ChunkMade]


def test_a_video_that_a_failure_names_twice_is_set_aside(controller, gang):
    controller.submit(order("bad", request()))
    message = "rank 1 (stage 1): request 7, tick 0, chunk 0 (conditional): ValueError: the caption is no number"
    seen = []
    for event in controller.run():
        seen.append(event)
        if isinstance(event, GangReady):
            gang.rounds += [[], [Admitted(video="bad", number=7, first=0)], GangBroken(message)]
    [failed] = [event for event in seen if isinstance(event, VideoFailed)]
    assert (failed.video, failed.message) == ("bad", "ValueError: the caption is no number")
    assert controller.restarts == 2


def test_of_videos_that_run_out_of_memory_the_largest_is_set_aside(controller, gang):
    large, small = request(height=64), request()
    controller.submit(order("large", large))
    controller.submit(order("small", small))
    admitted = [replace(ADMITTED, video=video) for video in ("large", "small")]
    for _ in range(2):
        gang.rounds += [[], admitted, GangBroken("rank 0 has died: its node has run out of memory")]
    gang.rounds += [[], [admitted[1], chunk(0, "small")], [replace(DONE, video="small")]]
    events = list(controller.run())
    [failed] = [event for event in events if isinstance(event, VideoFailed)]
    assert failed.video == "large" and "out of memory" in failed.message and "--height" in failed.message
    assert [event.video for event in events if isinstance(event, VideoDone)] == ["small"]


def test_without_its_head_a_cluster_is_given_up_before_ray_hangs(controller, gang, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("parallel.cluster.controller.time.monotonic", lambda: now[0])
    controller._answered = 0.0
    controller.submit(order("a", request(chunks=1)))
    gang.head, gang.rounds = False, deque([[]] * 100)
    with pytest.raises(ClusterLost, match="head of the Ray cluster"):
        for now[0] in range(100):
            controller._round()
    assert now[0] == 31


def test_without_restarts_left_the_rest_fails(controller, gang):
    controller.submit(order("a", request()))
    seen = []
    for event in controller.run():
        seen.append(event)
        if isinstance(event, GangReady):
            gang.rounds += [[], [ADMITTED], GangBroken("rank 0 has died")]
    [down], [failed] = ([event for event in seen if isinstance(event, kind)] for kind in (GangDown, VideoFailed))
    assert down.message == "rank 0 has died (2 restarts, and no more are allowed)"
    assert failed == VideoFailed(video="a", message=f"no gang is left: {down.message}")


def test_a_gang_that_leaves_out_a_chunk_is_broken(controller, gang):
    controller.submit(order("a", request(chunks=2)))
    gang.rounds += [[], [ADMITTED, chunk(1)]]
    events = controller.run()
    lost = next(event for event in events if isinstance(event, GangLost))
    assert lost.message == "gang-0 has left out chunk 0 of a"
