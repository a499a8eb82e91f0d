"""The scheduler's rules, one by one, in simulated time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import Schedule
from models.errors import InputError
from parallel.cluster.queue import Admit, GangSize, Job, Permit, RequestState, plan_quanta
from parallel.cluster.scheduler import Scheduler
from tests.parallel.cluster.simulation import WINDOW, World, job

ONE = GangSize(slots=WINDOW, kv_bytes=100)
TWO = GangSize(slots=2 * WINDOW, kv_bytes=100)


def world(*sizes: GangSize, share: int = 8, fruitless: int = 4, seed: int = 0) -> World:
    names = [f"gang {number}" for number in range(len(sizes))]
    made = World(dict(zip(names, sizes)), share=share, fruitless=fruitless, seed=seed)
    for name in names:
        made.up(name)
    return made


def grants(plan: list[Admit | Permit]) -> list[Permit]:
    return [one for one in plan if isinstance(one, Permit)]


def places(plan: list[Admit | Permit]) -> dict[str, str]:
    return {one.request: one.gang for one in plan if isinstance(one, Admit)}


def rounds(made: World, count: int) -> None:
    for _ in range(count):
        made.decide()
        made.now += 1.0
        for request in made.resident():
            made.step(request)


@given(first=st.integers(0, 3), made=st.integers(1, 7), window=st.integers(1, 5))
def test_quanta_are_the_stages_of_the_schedule(first, made, window):
    schedule = Schedule(first=first, chunks=first + made, num_steps=2 * window, window=window)
    quanta = plan_quanta(chunks=first + made, window=window, first=first)
    assert len(quanta) == schedule.quanta
    for index, quantum in enumerate(quanta):
        tick = schedule.tick(index * schedule.quantum_ticks)
        assert (quantum.chunk, quantum.slots) == (tick.entering, len(tick.active))


def test_equal_requests_share_a_gang_evenly():
    made = world(ONE)
    for name in ("a", "b"):
        made.submit(job(name, chunks=20))
    rounds(made, 60)
    shares = Counter(one.request for one in grants(made.plan))
    assert shares["a"] + shares["b"] > 15 and abs(shares["a"] - shares["b"]) <= 1


def test_a_newcomer_shares_from_now_on_and_does_not_catch_up_first():
    made = world(ONE)
    made.submit(job("old", chunks=100))
    rounds(made, 40)
    before = len(made.plan)
    made.submit(job("new", chunks=100))
    rounds(made, 60)
    shares = Counter(one.request for one in grants(made.plan[before:]))
    assert shares["old"] > 5 and abs(shares["old"] - shares["new"]) <= 2


def test_an_urgent_late_request_overtakes_at_the_next_border():
    made = world(ONE)
    for name in ("a", "b"):
        made.submit(job(name, chunks=30))
    rounds(made, 30)
    before = len(made.plan)
    made.submit(job("urgent", chunks=2, priority=1))
    rounds(made, 30)
    after = [one.request for one in grants(made.plan[before:])]
    start = after.index("urgent")
    assert start <= 2  # the quanta that were granted before it was ready
    own = [index for index, name in enumerate(after) if name == "urgent"]
    assert (
        len(own) == 5 and own[-1] - own[0] <= 5
    )  # all of its quanta, but for the one that is due to who waits longest


def test_a_request_of_low_priority_gets_its_share_of_quanta():
    made = world(ONE, share=4)
    made.submit(job("low", chunks=30, priority=-5))
    rounds(made, 3)
    for number in range(2):
        made.submit(job(f"high {number}", chunks=90))
    rounds(made, 150)
    shares = Counter(one.request for one in grants(made.plan))
    total = sum(shares.values())
    assert total / 20 <= shares["low"] <= total / 4


def test_a_request_of_low_priority_is_admitted_in_the_end():
    made = world(GangSize(slots=WINDOW, kv_bytes=10), share=3)
    made.submit(job("low", chunks=1, priority=-5))
    made.submit(job("high 0", chunks=1))
    order = []
    for number in range(1, 8):  # always one of higher priority in the queue
        made.submit(job(f"high {number}", chunks=1))
        while len(order) < number:
            order += [one.request for one in made.decide() if isinstance(one, Admit)]
            made.now += 1.0
            for request in made.resident():
                made.step(request)
    assert order.index("low") == 2


def test_new_requests_are_spread_evenly():
    made = world(TWO, TWO, TWO)
    for number in range(6):
        made.submit(job(f"video {number}"))
    made.decide()
    assert Counter(places(made.plan).values()) == {"gang 0": 2, "gang 1": 2, "gang 2": 2}


def test_the_emptier_memory_is_taken_where_slots_are_equal():
    made = world(ONE, GangSize(slots=WINDOW, kv_bytes=200))
    for name in ("a", "b", "c"):
        made.submit(job(name, kv_bytes=50))
        made.now += 1
    made.decide()
    assert places(made.plan) == {"a": "gang 0", "b": "gang 1", "c": "gang 1"}


def test_memory_limits_who_is_admitted_and_none_slips_past():
    made = world(GangSize(slots=4 * WINDOW, kv_bytes=100))
    for name, kv_bytes in (("a", 60), ("b", 60), ("small", 10)):
        made.submit(job(name, kv_bytes=kv_bytes))
        made.now += 1
    made.decide()
    assert places(made.plan) == {"a": "gang 0"}
    made.run()
    assert list(places(made.plan)) == ["a", "b", "small"]


def test_one_gang_does_not_hoard_what_another_could_make():
    made = World({"gang 0": ONE, "gang 1": ONE})
    made.up("gang 0")
    for number in range(10):
        made.submit(job(f"video {number}"))
    made.decide()
    assert len(places(made.plan)) == 2  # memory would do for ten
    made.up("gang 1")
    made.decide()
    assert Counter(places(made.plan).values()) == {"gang 0": 2, "gang 1": 2}
    made.submit(job("urgent", priority=1))
    assert [one.request for one in made.decide()] == ["urgent"]  # who goes before all others is let in


def test_a_video_that_goes_on_needs_no_free_slots_of_others():
    made = world(ONE)
    made.submit(job("a", chunks=6))
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
    made.submit(job("a", chunks=8))
    made.decide()
    for quantum in range(6):
        made.step("a")  # announces while the quantum before runs
        assert [(one.quantum, one.chunk) for one in made.decide()] == [(quantum, quantum)]
        if quantum:
            made.gangs["gang 0"].held["a"].granted.pop(0)
            made.scheduler.quantum_done("a", "gang 0", quantum - 1, made.now)
    assert made.scheduler.figures(made.now).gangs[0].slots_busy == WINDOW


def test_a_lost_gangs_requests_go_on_elsewhere_and_keep_their_age():
    made = world(ONE, GangSize(slots=WINDOW, kv_bytes=10))
    made.submit(job("a", chunks=10))
    rounds(made, 12)
    assert places(made.plan)["a"] == "gang 0"
    made.gangs["gang 0"].held["a"].granted.clear()
    made.scheduler.checkpointed("a", "gang 0", 3, made.now)
    made.checkpoints["a"] = 3
    for number in range(3):
        made.now += 1
        made.submit(job(f"later {number}", chunks=1))
    made.down("gang 0")
    view = made.scheduler.view("a")
    assert (view.standing, view.gang, view.quantum, view.restarts) == (RequestState.QUEUED, None, 3, 1)
    assert made.decide()[0] == Admit(request="a", gang="gang 1", resume_quantum=3)
    made.run()
    assert made.scheduler.view("a").standing is RequestState.DONE
    assert made.scheduler.figures(made.now).restarts == 1


def test_what_a_gang_says_too_late_is_ignored():
    made = world(TWO)
    made.submit(job("a", chunks=5))
    rounds(made, 4)
    made.down("gang 0")
    scheduler = made.scheduler
    scheduler.quantum_ready("a", "gang 0", 2, made.now)
    scheduler.quantum_done("a", "gang 0", 1, made.now)
    scheduler.checkpointed("a", "gang 0", 2, made.now)
    scheduler.request_failed("a", "gang 0", "late", made.now)
    scheduler.request_done("a", "gang 0", made.now)
    view = scheduler.view("a")
    assert (view.standing, view.quantum) == (RequestState.QUEUED, 0)
    assert scheduler.gang_down("gang 0", made.now) == []


def test_a_gang_may_go_on_from_an_older_checkpoint_than_was_known():
    made = world(ONE)
    made.submit(job("a", chunks=5, resume_quantum=3))
    assert made.decide() == [Admit(request="a", gang="gang 0", resume_quantum=3)]
    made.scheduler.quantum_ready("a", "gang 0", 1, made.now)
    assert [one.quantum for one in grants(made.scheduler.assignments(made.now))] == [1]
    assert made.scheduler.view("a").quantum == 1


def test_failing_twice_the_same_way_is_set_aside():
    made = world(ONE)
    made.submit(job("bad"))
    made.submit(job("good"))
    for reason in ("nan", "no space"):
        made.decide()
        made.fail("bad", reason)
        assert made.scheduler.view("bad").standing is RequestState.QUEUED
    made.decide()
    made.fail("bad", "nan")
    view = made.scheduler.view("bad")
    assert (view.standing, view.reason, view.restarts) == (RequestState.QUARANTINED, "nan", 2)
    made.run()
    assert made.scheduler.view("good").standing is RequestState.DONE


def test_blame_falls_on_the_one_that_is_named():
    made = world(TWO)
    for name in ("bad", "good"):
        made.submit(job(name))
    for _ in range(2):
        made.decide()
        made.down("gang 0", {"bad": "rank 1: layer 3 is not finite"})
        made.up("gang 0")
    assert made.scheduler.view("bad").standing is RequestState.QUARANTINED
    assert made.scheduler.view("good").standing is RequestState.QUEUED
    made.run()
    assert made.scheduler.view("good").standing is RequestState.DONE


def test_a_request_that_kills_every_gang_is_found_and_harms_no_other_for_long():
    made = world(TWO, TWO)
    names = ["killer", *(f"good {number}" for number in range(5))]
    for name in names:
        made.submit(job(name, chunks=6))
    losses = 0

    def runs_quantum_3(held):
        return held is not None and held.granted[:1] == [3]

    for _ in range(400):
        if made.scheduler.idle:
            break
        made.decide()
        made.now += 1.0
        for request in made.resident():
            if request in made.resident():
                made.step(request)
                for name in [name for name, gang in made.gangs.items() if runs_quantum_3(gang.held.get("killer"))]:
                    made.down(name)
                    made.up(name)
                    losses += 1
    standings = {name: made.scheduler.view(name).standing for name in names}
    assert standings.pop("killer") is RequestState.QUARANTINED
    assert set(standings.values()) == {RequestState.DONE}
    assert losses == 4


def waits_for_an_empty_gang() -> Scheduler:
    """A suspect is queued; gang 0, where it was, is down, and gang 1 has two videos."""
    scheduler = Scheduler(seed=0, gangs=[ONE])
    for name in ("gang 0", "gang 1"):
        scheduler.gang_up(name, ONE, 0.0)
    scheduler.submit(job("suspect"), 0.0)
    for _ in range(2):
        assert places(scheduler.assignments(0.0)) == {"suspect": "gang 0"}
        scheduler.quantum_ready("suspect", "gang 0", 0, 0.0)
        assert len(scheduler.assignments(0.0)) == 1
        if not scheduler.view("suspect").restarts:
            scheduler.gang_down("gang 0", 0.0)
            scheduler.gang_up("gang 0", ONE, 0.0)
    for name in ("a", "b", "c"):
        scheduler.submit(job(name), 0.0)
    where = places(scheduler.assignments(0.0))
    assert Counter(where.values()) == {"gang 0": 1, "gang 1": 2}
    scheduler.cancel(next(name for name, gang in where.items() if gang == "gang 0"), 0.0)
    scheduler.gang_down("gang 0", 0.0)
    assert scheduler.view("suspect").alone
    scheduler.submit(job("urgent", priority=5), 0.0)
    return scheduler


def test_a_gang_is_emptied_for_a_suspect():
    scheduler = waits_for_an_empty_gang()
    there = [name for name in ("a", "b", "c") if scheduler.view(name).gang == "gang 1"]
    assert len(there) == 2
    for name in there:
        assert scheduler.assignments(0.0) == []
        scheduler.request_done(name, "gang 1", 0.0)
    assert places(scheduler.assignments(0.0)) == {"suspect": "gang 1"}
    assert scheduler.assignments(0.0) == []  # it is alone
    scheduler.request_done("suspect", "gang 1", 0.0)
    assert places(scheduler.assignments(0.0)) == {"urgent": "gang 1"}


def test_a_suspect_takes_an_emptier_gang_that_comes_up_and_frees_the_other():
    scheduler = waits_for_an_empty_gang()
    assert scheduler.assignments(0.0) == []
    scheduler.gang_up("gang 0", ONE, 0.0)
    assert places(scheduler.assignments(0.0)) == {"suspect": "gang 0", "urgent": "gang 1"}


def test_a_suspect_that_is_cancelled_or_whose_gang_dies_holds_up_nobody():
    scheduler = waits_for_an_empty_gang()
    assert scheduler.assignments(0.0) == []
    scheduler.cancel("suspect", 0.0)
    assert places(scheduler.assignments(0.0)) == {"urgent": "gang 1"}
    scheduler = waits_for_an_empty_gang()
    assert scheduler.assignments(0.0) == []
    scheduler.gang_down("gang 1", 0.0)
    scheduler.gang_up("gang 0", ONE, 0.0)
    assert places(scheduler.assignments(0.0)) == {"suspect": "gang 0"}
    scheduler.gang_up("gang 1", ONE, 0.0)
    assert places(scheduler.assignments(0.0))["urgent"] == "gang 1"


@pytest.mark.parametrize("running", [True, False])
def test_only_who_runs_and_gets_no_further_is_suspected(running):
    scheduler = Scheduler(seed=0, gangs=[ONE])
    scheduler.submit(job("a", chunks=9), 0.0)
    for life in range(11):
        scheduler.gang_up("gang 0", ONE, 0.0)
        for quantum in range(life + 1 if running else 2):  # it gets one further in every life, or waits at a border
            scheduler.assignments(0.0)
            scheduler.quantum_ready("a", "gang 0", quantum, 0.0)
            scheduler.assignments(0.0)
            if quantum < life or not running:
                scheduler.quantum_done("a", "gang 0", quantum, 0.0)
        scheduler.gang_down("gang 0", 0.0)
        view = scheduler.view("a")
        assert (view.standing, view.alone, view.restarts) == (RequestState.QUEUED, False, life + 1)


def test_the_oldest_is_admitted_however_crowded_the_gang_is():
    made = world(GangSize(slots=WINDOW, kv_bytes=100), share=3)
    made.submit(job("low", chunks=4, priority=-1))
    for number in range(4):
        made.submit(job(f"high {number}", chunks=4))
    made.decide()
    assert len(places(made.plan)) == 3 and list(places(made.plan))[-1] == "low"


def test_fewer_quanta_so_far_go_before_having_been_ready_first():
    scheduler = Scheduler(seed=0, gangs=[ONE])
    scheduler.gang_up("gang 0", ONE, 0.0)
    for name in ("a", "b"):
        scheduler.submit(job(name, chunks=9, resume_quantum=3), 0.0)
    scheduler.assignments(0.0)
    for quantum in (3, 4):
        scheduler.quantum_ready("a", "gang 0", quantum, 1.0)
        assert len(scheduler.assignments(1.0)) == 1
    scheduler.quantum_done("a", "gang 0", 3, 2.0)
    scheduler.quantum_ready("a", "gang 0", 5, 2.0)
    scheduler.quantum_ready("b", "gang 0", 3, 3.0)
    assert scheduler.assignments(3.0) == []
    scheduler.quantum_done("a", "gang 0", 4, 4.0)
    assert [one.request for one in grants(scheduler.assignments(4.0))] == ["b"]


def test_refused_at_once():
    made = world(ONE, GangSize(slots=2, kv_bytes=1000))
    with pytest.raises(InputError, match="request big needs 4 window slots and 0.0 MB .* at most: ask for a smaller"):
        made.scheduler.submit(job("big", chunks=4, kv_bytes=101), 0.0)
    made.scheduler.submit(job("fits", kv_bytes=100), 0.0)
    with pytest.raises(InputError, match="there is a request fits already"):
        made.scheduler.submit(job("fits"), 0.0)
    with pytest.raises(InputError, match="cannot go on with quantum 9"):
        job("a", chunks=2, resume_quantum=9)
    with pytest.raises(InputError, match="no quanta at all"):
        Job(request="a", quanta=(), kv_bytes=1)
    with pytest.raises(InputError, match="must be 1 or more"):
        Scheduler(seed=0, gangs=[ONE], share=0)


def test_what_cannot_be_is_an_error():
    made = world(ONE)
    made.submit(job("a"))
    made.decide()
    with pytest.raises(ValueError, match="quantum 0 is said to be done"):
        made.scheduler.quantum_done("a", "gang 0", 0, 0.0)
    made.scheduler.quantum_ready("a", "gang 0", 0, 0.0)
    with pytest.raises(ValueError, match="quantum 2 was announced, 1 comes next"):
        made.scheduler.quantum_ready("a", "gang 0", 2, 0.0)
    with pytest.raises(ValueError, match="gang 0 is up already"):
        made.scheduler.gang_up("gang 0", ONE, 0.0)
    made.scheduler.assignments(5.0)
    with pytest.raises(ValueError, match="time goes backwards"):
        made.scheduler.assignments(4.0)


def test_a_queue_that_no_gang_can_serve_is_seen_in_the_figures():
    made = World({"gang 0": ONE, "gang 1": TWO})
    made.up("gang 0")
    made.scheduler.submit(Job(request="wide", quanta=plan_quanta(chunks=9, window=2 * WINDOW), kv_bytes=1), made.now)
    assert made.scheduler.assignments(made.now) == []
    figures = made.scheduler.figures(made.now)
    assert figures.queued == 1 and figures.unplaceable == ("wide",)
    made.up("gang 1")
    assert made.scheduler.figures(made.now).unplaceable == ()


def test_utilisation_is_the_busy_share_of_the_time_that_a_gang_is_up():
    made = World({"gang 0": TWO})
    made.now = 100.0
    made.up("gang 0")
    made.submit(job("a", chunks=8, resume_quantum=4))
    made.decide()
    made.scheduler.quantum_ready("a", "gang 0", 4, made.now)
    made.scheduler.assignments(made.now)  # four slots of eight
    made.now += 30
    made.scheduler.quantum_done("a", "gang 0", 4, made.now)
    made.now += 10
    assert made.scheduler.figures(made.now).gangs[0].utilisation == pytest.approx(30 * 4 / (40 * 8))
    made.scheduler.gang_down("gang 0", made.now)
    made.now += 1000
    assert made.scheduler.figures(made.now).gangs[0].utilisation == pytest.approx(30 * 4 / (40 * 8))


def test_lots_decide_only_between_equals_and_follow_the_seed():
    def order(seed):
        made = world(GangSize(slots=WINDOW, kv_bytes=10), seed=seed)
        for number in range(6):
            made.submit(job(f"video {number}", chunks=1))
        made.run()
        return list(places(made.plan))

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1


def test_it_imports_neither_torch_nor_ray():
    code = "import sys, parallel.cluster.scheduler; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
