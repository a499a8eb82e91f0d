"""Spans of a trace."""

import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from models.errors import InputError
from parallel.trace.tracer import Tracer, merge_traces, shipped_events
from tests.engine.reuse.test_flags import item


def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def spans(lines):
    return [event for event in map(json.loads, lines) if event["ph"] == "X"]


def test_spans_of_all_ranks_make_one_trace(tmp_path):
    parts = []
    for rank in range(2):
        tracer = Tracer(rank, f"rank {rank}", wanted=True, about={"stage": rank})
        began = time.perf_counter()
        time.sleep(0.01)
        tracer.add("compute", began, item(3))
        tracer.add("wait", time.perf_counter())
        tracer.mark("reuse", request=0, tick=4, chunk=1, step=2)
        parts.append(tracer.lines())
    merge_traces(parts, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert [event["args"] for event in events if event["name"] == "process_name"] == [
        {"name": "rank 0", "stage": 0},
        {"name": "rank 1", "stage": 1},
    ]
    computed = [event for event in events if event.get("cat") == "compute"]
    assert [event["name"] for event in computed] == [f"denoise {item(3).chunk}"] * 2
    about = {"request": 0, "tick": item(3).tick, "chunk": item(3).chunk, "step": item(3).step}
    assert computed[0]["args"] == {**about, "what": "denoise", "returns": True}
    assert all(9e3 < event["dur"] < 1e6 for event in computed)
    assert abs(computed[1]["ts"] / 1e6 - time.time()) < 5
    assert [event["name"] for event in events if event.get("cat") == "reuse"] == ["reuse 1"] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]


def test_nothing_is_remembered_that_nobody_wants():
    tracer = Tracer(0, "rank 0", wanted=False)
    tracer.add("wait", time.perf_counter())
    tracer.mark("reuse", request=0, tick=0, chunk=0, step=0)
    tracer.name_track(2, "to rank 1")
    assert list(tracer.lines()) == []


def test_a_long_trace_is_shipped_in_blocks_and_let_go_of():
    """More than a block, told by two threads while it is being read."""
    tracer, where = Tracer(1, "rank 1", wanted=True), store()

    def tell():
        for _ in range(12000):
            tracer.add("wait", time.perf_counter())

    threads = [threading.Thread(target=tell) for _ in range(2)]
    for thread in threads:
        thread.start()
    read = len(spans(tracer.lines()))
    for thread in threads:
        thread.join()
    tracer.ship(where, 0)
    assert int(where.get("trace/0/1")) > 1 and where.num_keys() > 2
    assert read + len(spans(shipped_events(where, 0, 1))) == 24000
    assert not where.check(["trace/0/1/0"])
    tracer.add("compute", time.perf_counter(), item(3))
    tracer.ship(where, 1)
    assert [event["cat"] for event in spans(shipped_events(where, 1, 1))] == ["compute"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write the trace"):
        merge_traces([], tmp_path / "nowhere" / "trace.json")
