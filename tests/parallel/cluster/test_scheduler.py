"""The scheduler's rules, one by one, in simulated time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from models.errors import InputError
from parallel.cluster.scheduler import Admit, GangSize, Permit, RequestState, Scheduler
from tests.parallel.cluster.simulation import WINDOW, World, size

ONE = GangSize(slots=WINDOW, kv_bytes=100)
TWO = GangSize(slots=2 * WINDOW, kv_bytes=100)


def world(size: GangSize, gangs: int = 1, *, share: int = 8) -> World:
    made = World(size, gangs, share=share)
    for name in made.gangs:
        made.up(name)
    return made


def permits(plan: list[Admit | Permit]) -> list[Permit]:
    return [one for one in plan if isinstance(one, Permit)]


def places(plan: list[Admit | Permit]) -> dict[str, str]:
    return {one.request: one.gang for one in plan if isinstance(one, Admit)}


def rounds(made: World, count: int) -> None:
    for _ in range(count):
        made.decide()
        for request in made.resident():
            made.step(request)


def test_equal_requests_share_a_gang_evenly():
    made = world(ONE)
    for name in ("a", "b"):
        made.submit(name, chunks=20)
    rounds(made, 60)
    shares = Counter(one.request for one in permits(made.plan))
    assert shares["a"] + shares["b"] > 15 and abs(shares["a"] - shares["b"]) <= 1


def test_a_newcomer_shares_from_now_on_and_does_not_catch_up_first():
    made = world(ONE)
    made.submit("old", chunks=100)
    rounds(made, 40)
    before = len(made.plan)
    made.submit("new", chunks=100)
    rounds(made, 60)
    shares = Counter(one.request for one in permits(made.plan[before:]))
    assert shares["old"] > 5 and abs(shares["old"] - shares["new"]) <= 2


def test_an_urgent_late_request_overtakes_at_the_next_border():
    made = world(ONE)
    for name in ("a", "b"):
        made.submit(name, chunks=30)
    rounds(made, 30)
    before = len(made.plan)
    made.submit("urgent", chunks=2, priority=1)
    rounds(made, 30)
    after = [one.request for one in permits(made.plan[before:])]
    start = after.index("urgent")
    assert start <= 2  # the quanta that were granted before it was ready
    own = [index for index, name in enumerate(after) if name == "urgent"]
    assert (
        len(own) == 5 and own[-1] - own[0] <= 5
    )  # all of its quanta, but for the one that is due to who waits longest


def test_a_request_of_low_priority_gets_its_share_of_quanta():
    made = world(ONE, share=4)
    made.submit("low", chunks=30, priority=-5)
    rounds(made, 3)
    for number in range(2):
        made.submit(f"high {number}", chunks=90)
    rounds(made, 150)
    shares = Counter(one.request for one in permits(made.plan))
    total = sum(shares.values())
    assert total / 20 <= shares["low"] <= total / 4


def test_a_request_of_low_priority_is_admitted_in_the_end():
    made = world(GangSize(slots=WINDOW, kv_bytes=10), share=3)
    made.submit("low", chunks=1, priority=-5)
    made.submit("high 0", chunks=1)
    order = []
    for number in range(1, 8):  # always one of higher priority in the queue
        made.submit(f"high {number}", chunks=1)
        while len(order) < number:
            order += [one.request for one in made.decide() if isinstance(one, Admit)]
            for request in made.resident():
                made.step(request)
    assert order.index("low") == 2


def test_new_requests_are_spread_evenly():
    made = world(TWO, 3)
    for number in range(6):
        made.submit(f"video {number}")
    made.decide()
    assert Counter(places(made.plan).values()) == {"gang 0": 2, "gang 1": 2, "gang 2": 2}


def test_the_emptier_memory_is_taken_where_slots_are_equal():
    made = world(ONE, 2)
    for name, kv_bytes in (("a", 60), ("b", 20), ("c", 20)):
        made.submit(name, kv_bytes=kv_bytes)
    made.decide()
    assert places(made.plan) == {"a": "gang 0", "b": "gang 1", "c": "gang 1"}


def test_memory_limits_who_is_admitted_and_none_slips_past():
    made = world(GangSize(slots=4 * WINDOW, kv_bytes=100))
    for name, kv_bytes in (("a", 60), ("b", 60), ("small", 10)):
        made.submit(name, kv_bytes=kv_bytes)
    made.decide()
    assert places(made.plan) == {"a": "gang 0"}
    made.run()
    assert list(places(made.plan)) == ["a", "b", "small"]


def test_one_gang_does_not_hoard_what_another_could_make():
    made = World(ONE, 2)
    made.up("gang 0")
    for number in range(10):
        made.submit(f"video {number}")
    made.decide()
    assert len(places(made.plan)) == 2  # memory would do for ten
    made.up("gang 1")
    made.decide()
    assert Counter(places(made.plan).values()) == {"gang 0": 2, "gang 1": 2}
    made.submit("urgent", priority=1)
    assert [one.request for one in made.decide()] == ["urgent"]  # who goes before all others is let in


def test_a_video_that_goes_on_needs_no_free_slots_of_others():
    made = world(ONE)
    made.submit("a", chunks=6)
    made.decide()
    for _ in range(4):  # announce, then end, up to the full window
        made.step("a")
        made.decide()
        made.step("a")
        granted = made.decide()
        assert granted == [] or granted[0].request == "a"
    assert made.gangs["gang 0"].held["a"].granted


def test_a_quantum_is_granted_ahead_of_its_time_when_nobody_else_is_next():
    made = world(ONE)
    made.submit("a", chunks=8)
    made.decide()
    for quantum in range(6):
        made.step("a")  # announces while the quantum before runs
        assert [one.quantum for one in made.decide()] == [quantum]
        if quantum:
            made.gangs["gang 0"].held["a"].granted.pop(0)
            made.scheduler.quantum_done("a", "gang 0", quantum - 1)
    assert made.scheduler._gangs["gang 0"].slots_busy == WINDOW


def test_a_lost_gangs_requests_go_on_elsewhere_and_keep_their_age():
    made = world(ONE, 2)
    made.submit("a", chunks=10)
    rounds(made, 12)
    assert places(made.plan)["a"] == "gang 0"
    made.gangs["gang 0"].held["a"].granted.clear()
    made.checkpoint("a")
    for number in range(3):
        made.submit(f"later {number}", chunks=1)
    made.down("gang 0")
    entry = made.scheduler.entry("a")
    assert (entry.state, entry.gang) == (RequestState.QUEUED, None)
    assert made.decide()[0] == Admit(request="a", gang="gang 1")
    made.run()
    assert made.ended["a"] is RequestState.DONE


def test_events_that_come_too_late_are_ignored():
    made = world(TWO)
    made.submit("a", chunks=5)
    rounds(made, 4)
    made.down("gang 0")
    scheduler = made.scheduler
    scheduler.quantum_ready("a", "gang 0", 2)
    scheduler.quantum_done("a", "gang 0", 1)
    scheduler.request_done("a", "gang 0")
    entry = scheduler.entry("a")
    assert (entry.state, entry.ready, entry.done) == (RequestState.QUEUED, None, None)
    assert scheduler.gang_down("gang 0") == []
    scheduler.cancel("a")
    scheduler.quantum_ready("a", "gang 0", 2)
    scheduler.cancel("a")


def test_a_request_that_has_ended_leaves_nothing_but_its_count():
    made = world(ONE)
    for number in range(3):
        made.submit(f"video {number}", chunks=1)
    made.cancel("video 2")
    made.run()
    assert not made.scheduler._entries and not made.scheduler._gangs["gang 0"].residents
    standings = made.scheduler.figures().states
    assert standings[RequestState.DONE] == 2 and standings[RequestState.CANCELLED] == 1
    with pytest.raises(KeyError):
        made.scheduler.entry("video 0")


def test_a_request_goes_on_where_its_gang_says():
    made = world(ONE)
    made.scheduler.submit("a", size(chunks=5))
    made.scheduler.decide()
    made.scheduler.quantum_ready("a", "gang 0", 3)
    assert [one.quantum for one in permits(made.scheduler.decide())] == [3]
    assert made.scheduler.entry("a").done == 3


def test_blame_falls_on_the_one_that_is_named():
    made = world(TWO)
    for name in ("bad", "good"):
        made.submit(name)
    for _ in range(2):
        made.decide()
        made.down("gang 0", {"bad": "rank 1: layer 3 is not finite"})
        made.up("gang 0")
    assert made.ended == {"bad": RequestState.QUARANTINED}
    assert made.state("good") is RequestState.QUEUED
    made.run()
    assert made.ended["good"] is RequestState.DONE


def test_a_request_that_is_blamed_for_ever_other_reasons_is_set_aside():
    made = world(TWO)
    made.submit("bad")
    for number in range(4):
        assert "bad" not in made.ended
        made.decide()
        made.down("gang 0", {"bad": f"reason {number}"})
        made.up("gang 0")
    assert made.ended == {"bad": RequestState.QUARANTINED}


def test_a_request_that_kills_every_gang_is_found_and_harms_no_other_for_long():
    made = world(TWO, 2)
    names = ["killer", *(f"good {number}" for number in range(5))]
    for name in names:
        made.submit(name, chunks=6)
    losses = 0

    def runs_quantum_3(held):
        return held is not None and held.granted[:1] == [3]

    for _ in range(400):
        if made.scheduler.idle:
            break
        made.decide()
        for request in made.resident():
            if request in made.resident():
                made.step(request)
                for name in [name for name, gang in made.gangs.items() if runs_quantum_3(gang.held.get("killer"))]:
                    made.down(name)
                    made.up(name)
                    losses += 1
    assert made.ended.pop("killer") is RequestState.QUARANTINED
    assert set(made.ended.values()) == {RequestState.DONE} and len(made.ended) == 5
    assert losses == 4


def waits_for_an_empty_gang() -> Scheduler:
    """A suspect is queued; gang 0, where it was, is down, and gang 1 has two videos."""
    scheduler = Scheduler(ONE)
    for name in ("gang 0", "gang 1"):
        scheduler.gang_up(name)
    scheduler.submit("suspect", size())
    for _ in range(2):
        assert places(scheduler.decide()) == {"suspect": "gang 0"}
        scheduler.quantum_ready("suspect", "gang 0", 0)
        assert len(scheduler.decide()) == 1
        if not scheduler.entry("suspect").losses:
            scheduler.gang_down("gang 0")
            scheduler.gang_up("gang 0")
    for name in ("a", "b", "c"):
        scheduler.submit(name, size())
    where = places(scheduler.decide())
    assert Counter(where.values()) == {"gang 0": 1, "gang 1": 2}
    scheduler.cancel(next(name for name, gang in where.items() if gang == "gang 0"))
    scheduler.gang_down("gang 0")
    assert scheduler.entry("suspect").isolated
    scheduler.submit("urgent", size(), priority=5)
    return scheduler


def test_a_gang_is_emptied_for_a_suspect():
    scheduler = waits_for_an_empty_gang()
    there = list(scheduler._gangs["gang 1"].residents)
    assert len(there) == 2
    for name in there:
        assert scheduler.decide() == []
        scheduler.request_done(name, "gang 1")
    assert places(scheduler.decide()) == {"suspect": "gang 1"}
    assert scheduler.decide() == []  # it is alone
    scheduler.request_done("suspect", "gang 1")
    assert places(scheduler.decide()) == {"urgent": "gang 1"}


def test_a_suspect_takes_an_emptier_gang_that_comes_up_and_frees_the_other():
    scheduler = waits_for_an_empty_gang()
    assert scheduler.decide() == []
    scheduler.gang_up("gang 0")
    assert places(scheduler.decide()) == {"suspect": "gang 0", "urgent": "gang 1"}


def test_a_suspect_that_is_cancelled_or_whose_gang_dies_holds_up_nobody():
    scheduler = waits_for_an_empty_gang()
    assert scheduler.decide() == []
    scheduler.cancel("suspect")
    assert places(scheduler.decide()) == {"urgent": "gang 1"}
    scheduler = waits_for_an_empty_gang()
    assert scheduler.decide() == []
    scheduler.gang_down("gang 1")
    scheduler.gang_up("gang 0")
    assert places(scheduler.decide()) == {"suspect": "gang 0"}
    scheduler.gang_up("gang 1")
    assert places(scheduler.decide())["urgent"] == "gang 1"


@pytest.mark.parametrize("running", [True, False])
def test_only_a_request_that_runs_and_gets_no_further_is_suspected(running):
    scheduler = Scheduler(ONE)
    scheduler.submit("a", size(chunks=9))
    for life in range(11):
        scheduler.gang_up("gang 0")
        for quantum in range(life + 1 if running else 2):  # one further in every life, or waiting at a boundary
            scheduler.decide()
            scheduler.quantum_ready("a", "gang 0", quantum)
            scheduler.decide()
            if quantum < life or not running:
                scheduler.quantum_done("a", "gang 0", quantum)
        [entry] = scheduler.gang_down("gang 0")
        assert (entry.state, entry.isolated) == (RequestState.QUEUED, False)


def test_refused_at_once():
    made = world(ONE)
    with pytest.raises(InputError, match="request big needs 4 window slots and 0.0 MB .* at most: ask for a smaller"):
        made.submit("big", chunks=4, kv_bytes=101)
    made.submit("fits", kv_bytes=100)
    with pytest.raises(InputError, match="there is a request fits already"):
        made.submit("fits")


def test_what_cannot_be_is_an_error():
    made = world(ONE)
    made.submit("a")
    made.decide()
    with pytest.raises(ValueError, match="quantum 0 is reported as done"):
        made.scheduler.quantum_done("a", "gang 0", 0)
    made.scheduler.quantum_ready("a", "gang 0", 0)
    with pytest.raises(ValueError, match="quantum 2 was announced, 1 comes next"):
        made.scheduler.quantum_ready("a", "gang 0", 2)
    with pytest.raises(ValueError, match="gang 0 is up already"):
        made.scheduler.gang_up("gang 0")


def test_utilisation_is_the_busy_share_of_the_slots():
    made = world(TWO)
    made.submit("a", chunks=8)
    made.decide()
    made.scheduler.quantum_ready("a", "gang 0", 4)
    made.scheduler.decide()  # four slots of eight
    assert made.scheduler.figures().utilisation == {"gang 0": 0.5}
    made.scheduler.gang_down("gang 0")
    assert made.scheduler.figures().utilisation == {"gang 0": None}


def test_it_imports_neither_torch_nor_ray():
    code = "import sys, parallel.cluster.scheduler; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
