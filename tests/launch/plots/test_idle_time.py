"""Where idle time goes, on traces that were made up so that the answer is known. Times are in tenths of a second."""

import pytest

from launch.plots.idle_time import Cause, analyse


def ranks(stages, cp=1):
    place = [(stage, cp_rank) for stage in range(stages) for cp_rank in range(cp)]
    return [
        {"ph": "M", "name": "process_name", "pid": n, "args": {"name": "", "stage": stage, "cp_rank": cp_rank}}
        for n, (stage, cp_rank) in enumerate(place)
    ]


def span(kind, rank, began, ended, chunk=0, tick=0, returns=True):
    event = {
        "ph": "X",
        "name": kind,
        "cat": kind,
        "pid": rank,
        "tid": 0,
        "ts": began * 1e5,
        "dur": (ended - began) * 1e5,
    }
    if kind != "wait":
        about = {"request": 0, "tick": tick, "chunk": chunk, "step": tick, "what": "denoise", "returns": returns}
        event["args"] = about
    return event


def shares(events):
    use = analyse(events)
    return {
        rank.rank: (round(10 * rank.busy, 6), *(round(10 * rank.idle_seconds(cause), 6) for cause in Cause))
        for rank in use.ranks
    }


def test_nothing_computed_is_nothing_to_explain():
    assert analyse(ranks(2)) is None


def test_one_chunk_waits_for_itself_and_for_messages():
    """Each item takes 10 on each of 2 stages and 2 on its way."""
    events = [
        *ranks(2),
        span("compute", 0, 0, 10, tick=0),
        span("wait", 1, 0, 12),
        span("compute", 1, 12, 22, tick=0),
        span("wait", 0, 10, 24),
        span("compute", 0, 24, 34, tick=1),
        span("wait", 1, 22, 36),
        span("compute", 1, 36, 46, tick=1),
    ]
    # Rank 0: in transit 10-12 and 22-24; its velocity was computed at once 12-22; nothing left to do 34-46.
    # Rank 1: in transit 10-12, 22-24 and 34-36; computed at once 0-10 and 24-34.
    assert shares(events) == {0: (20, 22, 4, 0), 1: (20, 20, 6, 0)}


def test_a_slow_first_stage_keeps_the_last_one_waiting():
    """Two chunks; an item takes 20 on the first stage and 10 on the second, messages take no time."""
    events, now = ranks(2), 0
    for tick in range(2):
        for chunk in range(2):
            events += [
                span("compute", 0, now, now + 20, chunk, tick),
                span("compute", 1, now + 20, now + 30, chunk, tick),
            ]
            now += 20
    events += [span("wait", 1, began, began + (20 if not began else 10)) for began in (0, 30, 50, 70)]
    # The first 20 are the way of the first item; after that the last stage waits 10 for each of three items.
    assert shares(events) == {0: (80, 10, 0, 0), 1: (40, 20, 0, 30)}


def test_a_slow_last_stage_keeps_the_first_one_waiting():
    """Two chunks; an item takes 10 on the first stage and 20 on the second."""
    events = [
        *ranks(2),
        span("compute", 0, 0, 10, 0, 0),
        span("compute", 0, 10, 20, 1, 0),
        span("compute", 1, 10, 30, 0, 0),
        span("wait", 1, 0, 10),
        span("wait", 0, 20, 30),
        span("compute", 0, 30, 40, 0, 1),
        span("compute", 1, 30, 50, 1, 0),
        span("wait", 0, 40, 50),
        span("compute", 0, 50, 60, 1, 1),
        span("compute", 1, 50, 70, 0, 1),
        span("compute", 1, 70, 90, 1, 1),
    ]
    # 20-30: chunk 0 is computed at the last stage without delay. 40-50: chunk 1 had to wait there for chunk 0.
    assert shares(events) == {0: (40, 10 + 30, 0, 10), 1: (80, 10, 0, 0)}


def test_a_message_that_lies_before_a_busy_stage_is_not_under_way():
    """Three stages; the middle one is slow, so that the last one waits for items that were held up there."""
    events = [
        *ranks(3),
        span("compute", 0, 0, 10, 0, 0),
        span("compute", 0, 10, 20, 1, 0),
        span("wait", 1, 0, 10),
        span("compute", 1, 10, 40, 0, 0),
        span("compute", 1, 40, 70, 1, 0),
        span("wait", 2, 0, 40),
        span("compute", 2, 40, 50, 0, 0),
        span("wait", 2, 50, 71),
        span("compute", 2, 71, 81, 1, 0),
    ]
    assert shares(events)[2] == (20, 40, 1, 20)


def test_other_ranks_of_the_first_stage_wait_for_the_leader():
    events = [
        *ranks(1, cp=2),
        span("compute", 0, 0, 10, 0, 0),
        span("wait", 1, 0, 1),
        span("compute", 1, 1, 10, 0, 0),
        span("compute", 0, 15, 25, 0, 1),  # the leader was busy with something else, not with an item
        span("wait", 1, 11, 16),
        span("compute", 1, 16, 25, 0, 1),
    ]
    use = analyse(events)
    assert [round(10 * rank.other, 6) for rank in use.ranks] == [5, 1]
    assert shares(events)[1][2] == pytest.approx(1 + 1 + 4)  # in transit from the leader, and back from it


def test_the_change_of_the_kv_before_an_item_is_work():
    events = [*ranks(1), span("compress", 0, 0, 4), span("compute", 0, 4, 10)]
    assert shares(events) == {0: (10, 0, 0, 0)}


def test_times_add_up():
    events = [
        *ranks(2),
        span("compute", 0, 3, 10, 0, 0),
        span("wait", 1, 2, 12),
        span("compute", 1, 13, 22, 0, 0),
        span("wait", 0, 11, 24),
        span("compute", 0, 25, 34, 0, 1),
        span("wait", 1, 23, 36),
        span("compute", 1, 37, 46, 0, 1),
    ]
    use = analyse(events)
    for rank in use.ranks:
        idle = sum(rank.idle_seconds(cause) for cause in Cause)
        assert rank.busy + rank.other + idle == pytest.approx(use.ended - use.began)
        assert all(before.ended <= after.began + 1e-9 for before, after in zip(rank.idle, rank.idle[1:]))
