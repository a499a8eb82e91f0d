"""Spans of a trace."""

import json
import time

import pytest

from models.errors import InputError
from parallel.timeline import Timeline, merge_traces
from tests.parallel.test_flags import item


def test_spans_of_all_ranks_make_one_trace(tmp_path):
    parts = []
    for rank in range(2):
        timeline = Timeline(rank, f"rank {rank}", wanted=True)
        began = time.perf_counter()
        time.sleep(0.01)
        timeline.add("compute", began, item(3))
        timeline.add("wait", time.perf_counter())
        parts.append(timeline.events)
    merge_traces(parts, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    computed = [event for event in events if event.get("cat") == "compute"]
    assert [event["name"] for event in computed] == [f"denoise {item(3).chunk}"] * 2
    assert computed[0]["args"] == {"request": 0, "tick": item(3).tick, "chunk": item(3).chunk, "step": item(3).step}
    assert all(9e3 < event["dur"] < 1e6 for event in computed)
    assert abs(computed[1]["ts"] / 1e6 - time.time()) < 5


def test_nothing_is_remembered_that_nobody_wants():
    timeline = Timeline(0, "rank 0", wanted=False)
    timeline.add("wait", time.perf_counter())
    assert timeline.events == ()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write the trace"):
        merge_traces([], tmp_path / "nowhere" / "trace.json")
