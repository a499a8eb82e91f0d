"""Records: what happened, in proportion to the video, and damage that is named."""

from dataclasses import fields

import numpy as np
import pytest

from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.record import NOT_ACTIVE, Recorder, RunRecord
from engine.reuse.policy import ReuseSettings
from engine.schedule import Schedule, Timetable
from models.errors import InputError
from tests.engine.tiny import TinyPipeline, request, tiny_config

FLOWCACHE = ReuseSettings(policy="flowcache", threshold=0.05, warmup_steps=2, clean_pass=False)


def test_a_record_is_what_happened_and_survives_the_disk(tmp_path):
    trace, progress = Recorder(), []
    engine = Engine(TinyPipeline(tiny_config()), reuse=FLOWCACHE, kv=KVSettings(budget=2))
    list(engine.generate(request(chunks=6), on_progress=progress.append, recorder=trace))
    trace.finish({"prompt": "a thing"}).save(tmp_path / "run")
    record = RunRecord.load(tmp_path / "run")
    assert record.settings["prompt"] == "a thing"
    active = record.flags != NOT_ACTIVE
    assert active.sum() == 6 * 8
    assert progress[-1].computed_fraction == pytest.approx(record.computed_fraction)
    assert progress[-1].tick == progress[-1].ticks == len(record.flags)
    assert progress[-1].chunks_done == 6
    assert [one.steps_done for one in progress] == active.sum(axis=1).cumsum().tolist()
    assert sorted(p.chunks_done for p in progress) == [p.chunks_done for p in progress]
    # After chunk 4 retired, two chunks' worth of tokens live on, whole as long as nothing had to go.
    assert record.kept[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert record.kept[4].sum() == pytest.approx(2)
    assert ((record.fill > 0) & (record.fill <= 1)).all()


def test_a_record_grows_in_proportion_to_the_video():
    sizes = []
    for chunks in (50, 100, 200):
        trace = Recorder()
        trace.begin(Timetable(spans=(Schedule(first=0, chunks=chunks, num_steps=8, window=4),)))
        for chunk in range(chunks - 1):
            trace.retired(chunk, np.eye(chunk + 1)[chunk])
        record = trace.finish({})
        arrays = (getattr(record, field.name) for field in fields(record))
        sizes.append(sum(array.nbytes for array in arrays if isinstance(array, np.ndarray)))
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)


def test_what_was_kept_is_noted_when_it_is_so_though_whole_ticks_are_reused():
    """A chunk retires with the next item; with much reuse some ticks have none."""
    everything = ReuseSettings(policy="flowcache", threshold=1e9, warmup_steps=1)
    trace = Recorder()
    engine = Engine(TinyPipeline(tiny_config()), reuse=everything, kv=KVSettings(budget=2))
    list(engine.generate(request(chunks=6), recorder=trace))
    record = trace.finish({})
    assert (record.tick_items == 0).any()
    assert [row.sum() for row in record.kept[:5]] == pytest.approx([1, 2, 2, 2, 2])


def test_a_damaged_record_is_named(tmp_path):
    with pytest.raises(InputError, match="record.json is missing"):
        RunRecord.load(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    (tmp_path / "record.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="damaged"):
        RunRecord.load(tmp_path)
