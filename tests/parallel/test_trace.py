"""Spans of a trace."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.video import WorkItem
from models.errors import InputError
from models.protocols import Pass, PassCondition
from parallel.comm.store import StoreServer
from parallel.mesh import Layout, Mesh
from parallel.trace import KEPT_DIGESTS, DeviceTimer, RankCounters, Tracer, merge_traces, shipped_events

_CONDITION = PassCondition(times=(0.0,))
_PASS = Pass(name="denoise", caption="text", branch=0, isolated=False, weight=1.0, condition=_CONDITION)
ITEM = WorkItem(request=0, tick=3, chunk=1, step=2, chunks_left=0, what=_PASS, keys_from=None, before=())
LATER = replace(ITEM, span=(20, 4))  # of a span that begins with tick 20 and chunk 4 of its video


def mesh_of(rank):
    return Mesh(layout=Layout(pp=2), rank=rank)


def spans(lines):
    return [event for event in map(json.loads, lines) if event["ph"] == "X"]


def test_spans_of_all_ranks_make_one_trace(tmp_path):
    parts = []
    for rank in range(2):
        tracer = Tracer(mesh_of(rank), wanted=True)
        began = time.perf_counter()
        time.sleep(0.01)
        tracer.add("compute", began, LATER)
        tracer.add("wait", time.perf_counter())
        tracer.mark("reuse", request=0, tick=4, chunk=1, step=2)
        parts.append(tracer.lines())
    merge_traces(parts, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert [event["args"] for event in events if event["name"] == "process_name"] == [
        {"name": f"rank {rank} (stage {rank} of 2)", "stage": rank, "cp_rank": 0} for rank in range(2)
    ]
    computed = [event for event in events if event.get("cat") == "compute"]
    assert [event["name"] for event in computed] == ["denoise 5"] * 2
    about = {"request": 0, "tick": 23, "chunk": 5, "step": ITEM.step}
    assert computed[0]["args"] == {**about, "what": "denoise", "returns": True}
    assert all(9e3 < event["dur"] < 1e6 for event in computed)
    assert abs(computed[1]["ts"] / 1e6 - time.time()) < 5
    assert [event["name"] for event in events if event.get("cat") == "reuse"] == ["reuse 1"] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]


def test_nothing_is_recorded_that_nobody_wants():
    tracer = Tracer(mesh_of(0), wanted=False)
    tracer.add("wait", time.perf_counter())
    tracer.mark("reuse", request=0, tick=0, chunk=0, step=0)
    tracer.name_track(2, "to rank 1")
    assert list(tracer.lines()) == []


def test_a_long_trace_is_shipped_in_blocks_and_deleted():
    """More than a block, recorded by two threads while it is being read."""
    tracer, where = Tracer(mesh_of(1), wanted=True), StoreServer("127.0.0.1").store

    def record():
        for _ in range(12000):
            tracer.add("wait", time.perf_counter())

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    read = len(spans(tracer.lines()))
    for thread in threads:
        thread.join()
    tracer.ship(where, 0)
    assert int(where.get("trace/0/1")) > 1
    assert read + len(spans(shipped_events(where, 0, 1))) == 24000
    assert not where.check(["trace/0/1/0"])
    tracer.add("compute", time.perf_counter(), ITEM)
    tracer.ship(where, 1)
    assert [event["cat"] for event in spans(shipped_events(where, 1, 1))] == ["compute"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write the trace"):
        merge_traces([], tmp_path / "nowhere" / "trace.json")


class Stream:
    """A device's stream whose kernels take the time that is given, and an event of it as torch has them."""

    def __init__(self):
        self.launched, self.passed, self.waited = 0.0, 0.0, 0

    def event(self):
        stream = self

        class Event:
            def record(self):
                self.at = stream.launched

            def query(self):
                return self.at <= stream.passed

            def synchronize(self):
                stream.waited += not self.query()
                stream.passed = max(stream.passed, self.at)

            def elapsed_time(self, end):
                assert self.query() and end.query()
                return (end.at - self.at) * 1e3

        return Event()


def test_counters_do_not_grow_with_the_requests_that_were_served():
    counters = RankCounters(rank=0, stage=0, cp_rank=0, layers=(0, 2))
    for request in range(3 * KEPT_DIGESTS):
        counters.finished(request, request.to_bytes(8))
    assert list(counters.digests) == [str(request) for request in range(2 * KEPT_DIGESTS, 3 * KEPT_DIGESTS)]
    assert counters.digests["191"] == f"{191:016x}"


def test_spans_of_a_device_come_late_and_in_order_and_nobody_waits_for_them():
    """The device is far behind the thread that launches: a span is known once the device has passed its end."""
    stream, seen = Stream(), []
    timer = DeviceTimer(torch.device("cuda"), stream.event)
    began = time.perf_counter()
    for number in range(4):
        with timer.measure(lambda start, end, number=number: seen.append((number, start, end))):
            stream.launched += 10.0
        stream.launched += 1.0
        if number == 2:
            stream.passed = 21.0  # of two kernels and what lies between
    assert [number for number, *_ in seen] == [0, 1] and not stream.waited
    assert timer.seconds() == pytest.approx(40.0)
    assert [number for number, *_ in seen] == [0, 1, 2, 3]
    for number, start, end in seen:
        assert start - began == pytest.approx(11.0 * number, abs=0.1)
        assert end - start == pytest.approx(10.0)


def test_a_span_of_the_cpu_is_known_at_once():
    timer, seen = DeviceTimer(torch.device("cpu")), []
    began = time.perf_counter()
    with timer.measure(lambda start, end: seen.append((start, end))):
        time.sleep(0.02)
    [(start, end)] = seen
    assert began <= start <= end - 0.02 <= time.perf_counter()
    assert timer.seconds() == end - start


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_span_of_a_gpu_ends_when_its_kernels_do():
    timer, seen = DeviceTimer(torch.device("cuda")), []
    with timer.measure():
        torch.cuda._sleep(1000)  # a context, and the reference
    timer.seconds()
    launched = time.perf_counter()
    with timer.measure(lambda start, end: seen.append((start, end))):
        torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
    assert time.perf_counter() - launched < 0.05 and not seen  # the launch did not wait
    torch.cuda.synchronize()
    passed = time.perf_counter()
    timer.seconds()
    [(start, end)] = seen
    assert abs(start - launched) < 0.02 and abs(end - passed) < 0.02


def test_no_traced_rank_waits_for_its_whole_device():
    for room in ("", "ranks"):
        for path in (Path(__file__).parents[2] / "parallel" / room).glob("*.py"):
            assert "cuda.synchronize" not in path.read_text(), path


FULL = """
import resource, sys, time
from models.errors import InputError
from parallel.mesh import Layout, Mesh
from parallel.trace import Tracer
tracer = Tracer(Mesh(layout=Layout(), rank=0), wanted=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    while True:
        tracer.add("compute", time.perf_counter())
except InputError as error:
    print(error)
"""


def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith(f"cannot write the trace to {tmp_path}: no space left there"), done.stderr
    assert "name another folder by TMPDIR" in done.stdout
