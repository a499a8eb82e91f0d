"""The picture of a run on ranks keeps its rows readable, however many items and whatever else there is to name."""

import json
import warnings

import pytest

from launch.plots import plot


def trace(ranks, items, decoding):
    """A made-up trace: items run through the stages one after another."""
    events = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in range(ranks)
    ]
    for index in range(items):
        for rank in range(ranks):
            args = {"request": 0, "tick": index // 4, "chunk": index % 12, "step": index % 16}
            args |= {"what": "denoise", "returns": True}
            span = {"ts": 1e6 + 1e4 * (index + rank), "dur": 9e3, "args": args}
            events.append({"ph": "X", "cat": "compute", "name": "denoise", "pid": rank, "tid": 0, **span})
    if decoding:
        events.append({"ph": "X", "cat": "decode", "name": "decode", "pid": 0, "tid": 1, "ts": 1.1e6, "dur": 3e5})
    return {"traceEvents": events}


@pytest.mark.parametrize(("ranks", "items", "decoding"), [(2, 209, True), (1, 3, False), (8, 400, True)])
def test_the_picture_is_drawn_without_a_complaint(tmp_path, ranks, items, decoding):
    (tmp_path / "trace.json").write_text(json.dumps(trace(ranks, items, decoding)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = plot("pipeline", tmp_path, tmp_path / "pipeline.png")
    assert (tmp_path / "pipeline.png").stat().st_size > 10_000
    assert f"{items} items in" in text
