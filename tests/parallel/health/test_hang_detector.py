"""Which rank hangs, from heartbeats alone."""

from dataclasses import replace

import pytest

from parallel.health.hang_detector import HangDetector, Heartbeat
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout, Mesh

TIMES = Timeouts(silent=6.0, first=60.0, step=6.0, grace=2.0)
ITEM = "request 0, tick 3, chunk 1 (compute)"


def heartbeat(**changes):
    heartbeat = Heartbeat(count=0, items=9, doing="", last=ITEM, limit=TIMES.step, pid=1, machine="here")
    return replace(heartbeat, **changes)


def diagnosed(layout, heartbeats_at, seconds=100, expected=0, step=0.5):
    """The first diagnosis and when it came, of a detector that looks twice a second."""
    detector = HangDetector(Mesh(layout=layout, rank=0), TIMES)
    for look in range(int(seconds / step)):
        found = detector.look(heartbeats_at(look), step, expected)
        if found is not None:
            return found, look * step
    return None


def test_nobody_is_to_blame_as_long_as_all_come_on():
    layout = Layout(pp=3)
    assert diagnosed(layout, lambda look: {r: heartbeat(count=look, items=look, doing="x") for r in range(3)}) is None
    assert diagnosed(layout, lambda look: {r: heartbeat(count=look) for r in range(3)}) is None
    assert diagnosed(layout, lambda look: {0: heartbeat(count=look), 1: None, 2: None}) is None


def test_a_stopped_rank_is_named_before_those_that_wait_for_it():
    """Rank 1 stops in an exchange with rank 0, which is in the same item, and the leader waits for results."""

    def heartbeats(look):
        return {0: heartbeat(count=look, doing=ITEM), 1: heartbeat(count=min(look, 4), doing=ITEM)}

    found, seconds = diagnosed(Layout(cp=2), heartbeats, expected=3)
    assert found.hung == (1,)
    assert found.message.startswith("rank 1 (stage 0 of 1, cp 1 of 2) has given no sign of life for ")
    assert found.message.endswith(f"s at {ITEM}")
    assert 8 <= seconds <= 9


def test_a_stopped_rank_is_named_when_its_last_sign_of_life_was_idle():
    def heartbeats(look):
        return {rank: heartbeat(count=look if rank != 1 else min(look, 4)) for rank in range(3)}

    found, _ = diagnosed(Layout(pp=3), heartbeats, expected=3)
    assert found.hung == (1,)
    assert found.message.endswith(f"s after {ITEM}")


def test_a_machine_that_is_lost_takes_its_ranks_along():
    def heartbeats(look):
        return {rank: heartbeat(count=look if rank < 2 else min(look, 2 + rank)) for rank in range(4)}

    found, _ = diagnosed(Layout(pp=4), heartbeats)
    assert found.hung == (2, 3)
    assert found.message.startswith("rank 2 (stage 2 of 4) and rank 3 (stage 3 of 4) have given no sign of life")


@pytest.mark.parametrize(("limit", "after"), [(TIMES.step, 6), (TIMES.first, 60)])
def test_a_rank_that_is_stuck_in_an_item_is_named(limit, after):
    def heartbeats(look):
        return {0: heartbeat(count=look), 1: heartbeat(count=look, doing=ITEM, limit=limit)}

    found, seconds = diagnosed(Layout(pp=2), heartbeats, expected=1)
    assert found.message == f"rank 1 (stage 1 of 2) has not come on for {after} s at {ITEM}"
    assert found.hung == ()
    assert after <= seconds <= after + 1


def test_ranks_that_are_stuck_in_one_item_are_named_together():
    found, _ = diagnosed(Layout(cp=2), lambda look: {r: heartbeat(count=look, doing=ITEM) for r in range(2)})
    assert found.message.startswith("rank 0 (stage 0 of 1, cp 0 of 2) and rank 1 (stage 0 of 1, cp 1 of 2) have not")


def test_results_that_nobody_works_on_are_missed_only_by_who_waits_for_them():
    heartbeats = lambda look: {rank: heartbeat(count=look) for rank in range(2)}  # noqa: E731
    assert diagnosed(Layout(pp=2), heartbeats, expected=0) is None
    found, seconds = diagnosed(Layout(pp=2), heartbeats, expected=2)
    assert found.message == "no rank works, though 2 items are under way"
    assert 6 <= seconds <= 7


def test_a_rank_that_never_comes_is_named():
    found, seconds = diagnosed(Layout(pp=3), lambda look: {r: heartbeat(count=look, doing="starting") for r in (0, 2)})
    assert found.message == "rank 1 (stage 1 of 3) has not come within 60 s"
    assert 60 <= seconds <= 61
