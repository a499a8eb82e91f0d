"""The order of work with results that come late, in one process: what `Engine` makes, bit for bit."""

from collections import deque

import pytest
import torch

from engine.cache import CacheSettings
from engine.engine import Engine
from engine.executor import Admission, LocalExecutor
from engine.kv import KVSettings
from engine.prepare import encode, prepare
from engine.record import RunTrace
from engine.request import Prefix
from parallel.order import WorkOrder
from tests.parallel.small import SmallPipeline, one_thread, request, small_config

FLOWCACHE = {"policy": "flowcache", "threshold": 0.1, "warmup_steps": 2}
CASES = {
    "plain": {},
    "guided": {"config": {"guided": True}},
    "window 1": {"config": {"window": 1}},
    "one step per stage": {"request": {"num_steps": 4}, "config": {"num_steps": 4}},
    "flowcache": {"cache": {**FLOWCACHE, "clean_forward": False}},
    "flowcache, renewed": {"cache": {**FLOWCACHE, "threshold": 0.3}, "config": {"guided": True}},
    "flowcache, one step per stage": {
        "cache": {**FLOWCACHE, "warmup_steps": 1, "clean_forward": False},
        "request": {"num_steps": 4},
        "config": {"num_steps": 4},
    },
    "teacache": {"cache": {"policy": "teacache", "threshold": 0.1, "warmup_steps": 3}},
    "budget": {"budget": 1, "config": {"ranges": ()}},
    "budget, guided, flowcache": {
        "budget": 2,
        "config": {"guided": True},
        "cache": {**FLOWCACHE, "clean_forward": False},
    },
    "image": {"prefix": 1},
    "clip": {"prefix": 32, "config": {"guided": True}},
}


class Recording(LocalExecutor):
    def __init__(self, model):
        super().__init__(model)
        self.items = []

    def run(self, work):
        self.items.append(work.item)
        return super().run(work)


def build(case):
    one_thread()
    pipeline = SmallPipeline(small_config(2, **case.get("config", {})))
    changes = {"chunks": 6, **case.get("request", {})}
    if "prefix" in case:
        changes["prefix"] = Prefix(frames=torch.zeros(case["prefix"], 32, 48, 3, dtype=torch.uint8))
    return pipeline, request(**changes), CacheSettings(**case.get("cache", {})), KVSettings(budget=case.get("budget"))


def delayed(case, latency, *, barrier=False):
    """Run with results that are taken in only after `latency` others were given out, or when nothing else is ready."""
    pipeline, wanted, cache, kv = build(case)
    prepared = prepare(pipeline, wanted, encode(pipeline, wanted), number=0, cache=cache, kv=kv, observe=True)
    executor = Recording(pipeline.model)
    held = prepared.kv.allocate(pipeline.model.kv, pipeline.attention)
    executor.admit(0, Admission(kv=held, captions=prepared.captions, grid=prepared.run.grid))
    decisions, made, ticks, overlap = [], [], [], 0
    order = WorkOrder(prepared.run, barrier=barrier, on_decision=lambda seen, what: decisions.append((seen, what)))
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
            assert not order.ready(), "nothing is under way and nothing may begin"
        made += order.finished()
        ticks += order.ticks_done()
    return [latents for _, latents in made], executor.items, decisions, ticks, overlap


@pytest.mark.parametrize("latency", [1, 3, 100])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_late_results_change_nothing(case, latency):
    pipeline, wanted, cache, kv = build(case)
    executor, trace = Recording(pipeline.model), RunTrace()
    expected = [chunk.latents for chunk in Engine(pipeline, cache, kv, executor).generate(wanted, trace=trace)]
    made, items, decisions, ticks, _ = delayed(case, latency)
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a, b)
    assert items == executor.items
    record = trace.finish({})
    assert [tick.tick.index for tick in ticks] == list(range(len(record.flags)))
    assert [tick.items for tick in ticks] == record.tick_items.tolist()
    for seen, decision in decisions:
        assert record.flags[seen.tick, seen.chunk] == decision.value
    if cache.policy != "none":
        assert 0 < record.computed_fraction < 1


def test_ticks_overlap_unless_there_is_a_barrier():
    *_, overlap = delayed(CASES["plain"], 100)
    assert overlap == 2
    made, *_, overlap = delayed(CASES["plain"], 100, barrier=True)
    assert overlap == 1
    free, *_ = delayed(CASES["plain"], 100)
    assert all(torch.equal(a, b) for a, b in zip(made, free, strict=True))
