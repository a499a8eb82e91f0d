"""The order of work with results that come late, in one process: what `Engine` makes, bit for bit."""

import json
from collections import Counter, deque
from functools import cache

import pytest
import torch

from engine.checkpoint.contents import Contents, pack_run, pack_shard, unpack_run, unpack_shard
from engine.executor import Stage
from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.order import WorkOrder
from engine.request import encode, prepare
from engine.reuse.policy import Decision, ReuseSettings
from tests.engine.reference import reference_latents
from tests.models.wan.small import small_pipeline
from tests.parallel.small import SmallPipeline, one_thread, request, small_config

FLOWCACHE = {"policy": "flowcache", "threshold": 0.1, "warmup_steps": 2}
BY_CONDITION = {
    "policy": "flowcache", "threshold": 1.1, "warmup_steps": 2, "distance": "condition", "clean_pass": False
}  # fmt: skip
GROUPS = {"chunk_width": 2, "stagger": 3, "window_frames": 8, "overlap_frames": 2}
FOUR_STEPS = {"method": "self-forcing", "chunk_width": 2, "window_frames": 6, "overlap_frames": 2}
TEN = {"num_steps": 10, "chunks": 4}
CASES = {
    "plain": {},
    "guided": {"config": {"guided": True}},
    "window 1": {"config": {"window": 1}},
    "one step per stage": {"request": {"num_steps": 4}, "config": {"num_steps": 4}},
    "flowcache": {"cache": {**FLOWCACHE, "clean_pass": False}},
    "flowcache, renewed": {"cache": {**FLOWCACHE, "threshold": 0.3}, "config": {"guided": True}},
    "flowcache, one step per stage": {
        "cache": {**FLOWCACHE, "warmup_steps": 1, "clean_pass": False},
        "request": {"num_steps": 4},
        "config": {"num_steps": 4},
    },
    "teacache": {"cache": {"policy": "teacache", "threshold": 0.1, "warmup_steps": 3}},
    "budget": {"budget": 1, "config": {"ranges": ()}},
    "budget, guided, flowcache": {"budget": 2, "config": {"guided": True}, "cache": {**FLOWCACHE, "clean_pass": False}},
    "budget, guided, offload": {"budget": 1, "config": {"guided": True}, "offload": True},
    "guided, window 2": {"config": {"guided": True, "window": 2}},
    "guided, offload": {"config": {"guided": True}, "offload": True},
    "image": {"prefix": 1},
    "groups": {"wan": GROUPS, "request": TEN},
    "groups, in step": {"wan": {**GROUPS, "stagger": 0}, "request": TEN},
    "groups, clip": {"wan": GROUPS, "request": {**TEN, "chunks": 3}, "prefix": 8, "cache": {"clean_pass": False}},
    "groups, flowcache": {"wan": GROUPS, "request": TEN, "cache": BY_CONDITION},
    "groups, flowcache, renewed": {"wan": GROUPS, "request": TEN, "cache": {**BY_CONDITION, "clean_pass": True}},
    "groups, extrapolated": {"wan": GROUPS, "request": TEN, "cache": {**BY_CONDITION, "reuse": "extrapolate"}},
    "groups, budget": {"wan": GROUPS, "request": TEN, "cache": BY_CONDITION, "budget": 1, "asks": "next"},
    "four steps": {"wan": FOUR_STEPS, "request": {"num_steps": 4}},
    "four steps, budget": {"wan": FOUR_STEPS, "request": {"num_steps": 4}, "budget": 1},
    "clip": {"prefix": 32, "config": {"guided": True}},
}


class Recording(Stage):
    def __init__(self, model, attention):
        super().__init__(model, attention)
        self.items = []

    def run(self, work):
        self.items.append(work.item)
        self.change(work.item)
        return self.velocity(work.item, self.forward(work.item, self.embed(work.x)))


def build(case):
    one_thread()
    of_magi = small_config(2, **case.get("config", {}))
    pipeline = small_pipeline(**case["wan"]) if "wan" in case else SmallPipeline(of_magi)
    changes = {"chunks": 6, **case.get("request", {})}
    if "prefix" in case:
        changes["prefix"] = torch.zeros(case["prefix"], 32, 48, 3, dtype=torch.uint8)
    selection = SelectionSettings(asks=case.get("asks", "last"))
    kv = KVSettings(budget=case.get("budget"), selection=selection, offload=case.get("offload", False))
    return pipeline, request(**changes), ReuseSettings(**case.get("cache", {})), kv


@cache
def plain_loop(name):
    """Latents, items and decisions of a case, made once."""
    return reference_latents(*build(CASES[name]))


def start(case, saved=None):
    """A run, its KV and where its work is carried out; `saved` are the contents of a checkpoint."""
    pipeline, wanted, reuse, kv = build(case)
    run, admission = prepare(pipeline, wanted, encode(pipeline, wanted), number=0, reuse=reuse, kv=kv, observe=True)
    executor = Recording(pipeline.model, pipeline.attention)
    executor.admit(admission)
    if saved is not None:
        state, shard = saved
        run.restore(unpack_run(state)[0])
        executor.kv(0).restore(unpack_shard(shard)[0])
    return run, executor.kv(0), executor


def carry_out(order, executor, latency):
    """Take results in only after `latency` others were given out, or when nothing else is ready."""
    made, ticks, overlap = [], [], 0
    under_way = deque()
    while not order.over:
        if len(under_way) < latency and order.ready():
            work = order.take()
            velocity = executor.run(work)
            if work.item.what.weight:
                under_way.append((work.item, velocity))
                overlap = max(overlap, len({item.tick for item, _ in under_way}))
        elif under_way:
            order.returned(*under_way.popleft())
        else:
            assert order.held or order.over, "nothing is under way and nothing may begin"
        made += order.finished()
        ticks += order.ticks_done()
    return [latents for _, latents in made], ticks, overlap


def delayed(case, latency, *, barrier=False):
    run, _, executor = start(case)
    decisions = []
    order = WorkOrder(run, barrier=barrier, on_decision=lambda seen, what: decisions.append((seen, what)))
    made, ticks, overlap = carry_out(order, executor, latency)
    return made, executor.items, decisions, ticks, overlap


@pytest.mark.parametrize("latency", [1, 100])  # 3 as well, where snapshots are taken
@pytest.mark.parametrize("name", CASES)
def test_late_results_change_nothing(name, latency):
    expected, expected_items, expected_decisions = plain_loop(name)
    made, items, decisions, ticks, _ = delayed(CASES[name], latency)
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a, b)
    assert items == expected_items
    assert {(seen.tick, seen.chunk): decision for seen, decision in decisions} == expected_decisions
    assert [tick.tick.index for tick in ticks] == list(range(len(ticks)))
    counts = Counter(item.tick for item in items)
    assert [tick.items for tick in ticks] == [counts[tick.tick.index] for tick in ticks]
    computed = [decision is Decision.COMPUTE for _, decision in decisions]
    assert sum(tick.computed for tick in ticks) == sum(computed)
    if ReuseSettings(**CASES[name].get("cache", {})).policy != "none":
        assert 0 < sum(computed) < len(computed)


def test_ticks_overlap_unless_there_is_a_barrier():
    *_, overlap = delayed(CASES["plain"], 100)
    assert overlap == 2
    made, *_, overlap = delayed(CASES["plain"], 100, barrier=True)
    assert overlap == 1
    free, *_ = delayed(CASES["plain"], 100)
    assert all(torch.equal(a, b) for a, b in zip(made, free, strict=True))


class Hesitant:
    """A gate that opens when it is asked for the third time."""

    def __init__(self, executor):
        self.executor, self.announced, self.opened, self.asked = executor, [], [], 0

    def announce(self, quantum):
        begun = max((item.tick for item in self.executor.items), default=-1)
        self.announced.append((quantum, begun))

    def open(self, quantum):
        assert quantum == self.announced[-1][0]
        assert all(item.tick < 2 * quantum for item in self.executor.items)
        self.asked += 1
        if self.asked % 3:
            return False
        self.opened.append(quantum)
        return True


@pytest.mark.parametrize("latency", [1, 100])
@pytest.mark.parametrize("name", ["plain", "flowcache, renewed", "teacache", "clip"])
def test_quanta_wait_for_their_gate_and_nothing_else_changes(name, latency):
    expected, items, _ = plain_loop(name)
    run, _, executor = start(CASES[name])
    gate = Hesitant(executor)
    order = WorkOrder(run, barrier=False, on_decision=lambda *_: None, gate=gate)
    assert [quantum for quantum, _ in gate.announced] == [0]
    made, *_ = carry_out(order, executor, latency)
    quanta = list(range(run.schedule.quanta))
    assert gate.opened == [quantum for quantum, _ in gate.announced] == quanta
    assert executor.items == items
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    for quantum, begun in gate.announced[1:]:  # the last tick of the quantum before has begun, and none of its work has
        assert begun < run.schedule.ticks_of_quantum(quantum).start - 1
    assert max(begun - run.schedule.ticks_of_quantum(quantum).start for quantum, begun in gate.announced[1:]) == -2


class Keeper:
    """Takes a snapshot before every quantum."""

    def __init__(self, run, held, order):
        self.run, self.held, self.order, self.saved, self.refusals = run, held, order, {}, 0

    def due(self, quantum):
        return quantum > 0

    def reached(self, quantum):
        self.refusals += 1
        if self.refusals % 2:
            return False
        share = pack_shard(self.held.state(), (bytes(8).hex(), 0), {})
        contents = [pack_run(self.run.state(), {}, {}), share]
        plain = [Contents(tensors=one.tensors, values=json.loads(json.dumps(one.values))) for one in contents]
        self.saved[quantum] = (plain, len(self.order()))
        return True


@pytest.mark.parametrize("name", CASES)
def test_a_video_goes_on_from_a_snapshot_bit_for_bit(name):
    """In fresh buffers, from before its second quantum, from its middle and from before its last quantum.

    They are in host memory if those of the snapshot were not, and the other way round.
    """
    case, (expected, items, _) = CASES[name], plain_loop(name)
    run, held, executor = start(case)
    keeper = Keeper(run, held, lambda: executor.items)
    made, *_ = carry_out(
        WorkOrder(run, barrier=False, on_decision=lambda *_: None, checkpointer=keeper), executor, latency=3
    )
    assert executor.items == items
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    quanta = run.schedule.quanta
    assert sorted(keeper.saved) == list(range(1, quanta))
    for quantum in {1, quanta // 2, quanta - 1} & set(keeper.saved):
        saved, given_out = keeper.saved[quantum]
        again, _, other = start({**case, "offload": not case.get("offload", False)}, saved)
        order = WorkOrder(again, barrier=False, on_decision=lambda *_: None, start=quantum)
        rest, *_ = carry_out(order, other, latency=3)
        assert other.items == items[given_out:]
        plan, begins = run.schedule, run.schedule.ticks_of_quantum(quantum).start
        done = sum(plan.tick_of(chunk, plan.num_steps) <= begins for chunk in range(plan.first, plan.chunks))
        assert len(rest) == len(expected) - done
        assert all(torch.equal(a, b) for a, b in zip(rest, expected[done:], strict=True))


def test_a_snapshot_does_not_grow_with_the_video():
    def sizes(chunks):
        case = {**CASES["budget, guided, flowcache"], "request": {"chunks": chunks}}
        run, held, executor = start(case)
        keeper = Keeper(run, held, lambda: executor.items)
        carry_out(WorkOrder(run, barrier=False, on_decision=lambda *_: None, checkpointer=keeper), executor, latency=3)
        return max(
            sum(part.nbytes for contents in saved for part in contents.tensors.values())
            for saved, _ in keeper.saved.values()
        )

    assert sizes(12) == sizes(8)
