"""Long videos of a family whose positions have an end: span after span, as one video."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint.files import CheckpointConfig
from engine.engine import Engine
from engine.executor import NotFinite
from engine.kv.layout import KVSettings
from engine.record import NOT_ACTIVE, Recorder, RunRecord
from engine.request import timetable
from engine.reuse.policy import ReuseSettings
from launch.plots.record import distance_figure, kv_figure, reuse_figure, reuse_table
from models.errors import InputError
from tests.engine.test_engine import HeldGate
from tests.models.wan.small import small_pipeline
from tests.parallel.small import one_thread, request

ROOT = Path(__file__).parent.parent.parent
GROUPS = {"chunk_width": 2, "stagger": 2, "window_frames": 8, "overlap_frames": 2}
REUSE = ReuseSettings(policy="flowcache", threshold=1.1, warmup_steps=2, distance="condition", clean_pass=False)


def engine():
    one_thread()
    return Engine(small_pipeline(**GROUPS), reuse=REUSE)


def latents(made, **changes):
    return [chunk.latents for chunk in made.generate(request(num_steps=6, **changes), decode=False)]


def test_a_long_video_begins_as_a_short_one_and_goes_on_from_its_end():
    """Four groups, then three more for each span; each goes on from the last group of the span before."""
    short, long, longer = (latents(engine(), chunks=chunks) for chunks in (4, 7, 9))
    assert [len(made) for made in (short, long, longer)] == [4, 7, 9]
    for a, b, c in zip(short, long, longer, strict=False):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(long, longer, strict=False))
    # Noise of the second span is its own: the same place in the window does not give the same latents.
    assert not torch.equal(long[4], long[1])


def test_it_is_counted_as_one_video_whatever_is_made_beside_it():
    made, told = engine(), []
    long, other = request(num_steps=6, chunks=8), request(num_steps=6, chunks=3, seed=9)
    numbers = [made.submit(long, on_progress=told.append), made.submit(other)]
    found = {number: [] for number in numbers}
    while made.in_flight:
        for result in made.step():
            found[result.video].append(result.chunk)
    assert [chunk.index for chunk in found[numbers[0]]] == list(range(8))
    assert all(chunk.frames is not None for chunk in found[numbers[0]])
    for chunk, alone in zip(found[numbers[0]], latents(engine(), chunks=8), strict=True):
        assert torch.equal(chunk.latents, alone)
    assert [one.tick for one in told] == list(range(1, told[-1].ticks + 1))
    assert told[-1].chunks_done == told[-1].chunks == 8 and told[-1].steps_done == 8 * 6
    assert len({one.kv_bytes for one in told}) <= 2  # the last span may be shorter


def test_a_later_prompt_counts_the_chunks_of_the_whole_video():
    plain, changed = latents(engine(), chunks=9), latents(engine(), chunks=9, script=((6, "another thing"),))
    same = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert same[:6] == [True] * 6 and not same[6] and not same[8]


@pytest.mark.parametrize(("quantum", "first"), [(2, 2), (5, 4), (6, 4), (7, 5)])
def test_a_new_prompt_of_any_span_is_that_of_the_later_ones(quantum, first):
    made, chunks, gate = engine(), [], HeldGate(quantum)
    table = timetable(made._pipeline.sampling(6), 9, 0)
    assert table.begun(quantum) <= first < table.begun(quantum + 1) or table.begun(quantum) == first
    number = made.submit(request(num_steps=6, chunks=9, script=((7, "a third"),)), gate=gate, decode=False)
    while made.running(number):
        chunks += [result.chunk.latents for result in made.step()]
        if gate.asked and not gate.allowed:
            made.change_prompt(number, first, "another thing", made.reader.read_prompt("another thing"))
            gate.allowed = True
    whole = latents(engine(), chunks=9, script=((first, "another thing"), (7, "a third")))
    assert all(torch.equal(a, b) for a, b in zip(chunks, whole, strict=True))


@pytest.mark.parametrize("groups", [{}, {"stagger": 0}, {"overlap_frames": 6}], ids=["", "in step", "wide overlap"])
def test_it_goes_on_from_a_checkpoint_before_any_quantum(tmp_path, monkeypatch, groups):
    """Also from one between two spans; a span that makes fewer chunks than it hands over hands on what it was given."""
    monkeypatch.setattr("tests.engine.test_spans.GROUPS", {**GROUPS, **groups})
    chunks = 6 if "overlap_frames" in groups else 9
    wanted, whole = request(num_steps=6, chunks=chunks), latents(engine(), chunks=chunks)
    made, seen = engine(), set()
    number = made.submit(made.reader.read(wanted, CheckpointConfig(folder=tmp_path / "all", every=1)), decode=False)
    while made.running(number):
        made.step()
        for place in tmp_path.glob("all/*/manifest.json"):
            if place.parent.name not in seen:
                seen.add(place.parent.name)
                shutil.copytree(place.parent, tmp_path / str(len(seen)) / place.parent.name)
    quanta = {int(name.split("-")[1]) for name in seen}
    table = timetable(made._pipeline.sampling(6), wanted.chunks, 0)
    assert quanta == set(range(1, table.quanta))  # those before a later span's first quantum are there too
    for place in range(1, len(seen) + 1, 1 if len(seen) < 4 else 3):
        again = engine()
        found = again.reader.read(wanted, CheckpointConfig(folder=tmp_path / str(place), every=1))
        rest = [chunk.latents for chunk in again.generate(found, decode=False)]
        assert found.found is not None and len(rest) == chunks - found.first
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[found.first :], strict=True))


def test_its_record_has_all_spans(tmp_path):
    made, recorder, told = engine(), Recorder(), []
    list(made.generate(request(num_steps=6, chunks=9), told.append, recorder, decode=False))
    recorder.finish({"prompt": "a cat"}).save(tmp_path)
    record = RunRecord.load(tmp_path)
    table = record.schedule
    assert [(span.first, span.chunks) for span in table.spans] == [(0, 4), (1, 4), (1, 3)]
    assert record.decisions.shape == (9, 6) and (record.decisions != NOT_ACTIVE).all()
    assert table.ticks == told[-1].ticks == len(record.tick_items) and record.tick_seconds.all()
    assert record.computed_fraction == pytest.approx(told[-1].computed_fraction)
    assert (np.count_nonzero(record.flags != NOT_ACTIVE, axis=0) == 6).all()
    # The schedule of conditions is one table: every chunk of every span takes the same decisions.
    assert (record.decisions == record.decisions[0]).all() and len(reuse_table(record)) == 8
    assert {chunk for chunk, _, _ in record.held} == {0, 1, 2, 4, 5, 7}
    for draw in (reuse_figure, distance_figure):
        draw(record).savefig(tmp_path / "drawn.png")
    (shares,) = kv_figure(record).axes[0].images
    # Two columns without a chunk that leaves the window: there a span ends and the next one fills its window.
    assert shares.get_array().mask.all(axis=0).tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 3 + [False]
    last, alone = record.of_span(2), Recorder()
    assert last.schedule.spans[0] == table.spans[2] and (last.decisions == record.decisions[7:]).all()
    assert last.held[:, :2].tolist() == [[1, 0], [1, 1]]
    list(engine().generate(request(num_steps=6, chunks=4), None, alone, decode=False))
    first, short = record.of_span(0), alone.finish({})
    for name in ("span", "decisions", "changes", "tick_items", "fill", "held"):
        assert np.array_equal(getattr(first, name), getattr(short, name), equal_nan=True)


def test_what_is_not_finite_in_a_later_span_is_named_by_its_place_in_the_video():
    made = engine()
    read = made.reader.read(request(num_steps=6, chunks=7))

    def noise(span):
        usual = read.encoded.noise(span)
        return lambda chunk, shape, draw: usual(chunk, shape, draw) * (float("nan") if span and not draw else 1)

    with pytest.raises(NotFinite, match="at tick 12, chunk 4"):
        list(made.generate(replace(read, encoded=replace(read.encoded, noise=noise)), decode=False))


def test_of_a_prefix_the_last_whole_groups_count_and_a_shorter_one_is_refused():
    frames = torch.zeros(32, 32, 48, 3, dtype=torch.uint8)
    used, _ = engine()._pipeline.sampling(4, clean_pass=True, copy_pass=True).prefix(32)
    assert used < 32
    made = latents(engine(), prefix=frames), latents(engine(), prefix=frames[-used:])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    with pytest.raises(InputError, match="goes on from 5 frames and more, and 3 are given"):
        latents(engine(), prefix=frames[:3])


MEMORY = """
import gc, pathlib, tempfile
from tests.engine.test_spans import *
from benchmarks.common import rss
from engine.machine import settle_heap
from models.checkpoint import Loading
from models.wan.pipeline import WanPipeline, random_pipeline
from models.wan.vae import WanVaeConfig
gc.freeze()  # `rss` collects garbage
settle_heap()
one_thread()
small = small_pipeline(**GROUPS)
decoding = random_pipeline(small.config, Loading(), vae=WanVaeConfig(base_dim=2, dim_mult=(1, 1, 1, 1))).autoencoder
made = Engine(WanPipeline(small.config, small.model, decoding, small._encoder), reuse=REUSE)
folder, told, recorder = pathlib.Path(tempfile.mkdtemp()), [], Recorder()
wanted = request(num_steps=3, height=96, width=96, chunks=1 + 3 * 20)
read = made.reader.read(wanted, CheckpointConfig(folder=folder, every=3))
number, spans, frames = made.submit(read, on_progress=told.append, recorder=recorder), [], 0
while made.running(number):
    frames += sum(chunk.chunk.frames.nbytes for chunk in made.step())
    if (video := made._videos.get(number)) is None or video.course.number < len(spans):
        continue
    files = [path for path in folder.rglob("*.safetensors") if (path.parent / "manifest.json").exists()]
    spans.append({
        "kv": told[-1].kv_bytes if told else 0,
        "course": sum(part.nbytes for part in video.course.state().values()),
        "decoder": sum(part.nbytes for part in made._decoder.state(number).values()),
        "checkpoint": max((path.stat().st_size // 1000 for path in files), default=0),
        "files": len(list(folder.glob("*"))),
        "resident": rss(),
    })
arrays = ("span", "decisions", "changes", "tick_seconds", "tick_items", "fill", "held")
record = sum(getattr(recorder.finish({}), name).nbytes for name in arrays)
print(json.dumps({"spans": spans, "frames": frames, "record": record}))
"""


@pytest.mark.slow
def test_twenty_spans_take_the_memory_of_four():
    """With frames, a record and checkpoints: only the record grows, by some bytes for each step of each chunk."""
    ran = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    made = json.loads(ran.stdout)
    resident = [span.pop("resident") for span in made["spans"]]
    fourth, last, allowed = made["spans"][4], made["spans"][-1], resident[4] // 100
    assert len(resident) == 20 and made["frames"] == (8 * (1 + 3 * 20) - 3) * 3 * 96**2
    assert last == fourth and all(fourth.values())
    # The least of some, as files are being written at one moment and not at another.
    assert min(resident[15:]) - min(resident[2:7]) <= allowed
    # It would be seen if each span left behind its keys and values, or its frames.
    assert 12 * fourth["kv"] > allowed and made["frames"] // 20 * 12 > allowed
    assert made["record"] < 200 * (1 + 3 * 20)


def test_four_steps_attend_to_a_range_that_is_held_and_no_further():
    """Self-Forcing has no end: buffers hold what is attended to, however long the video is."""
    one_thread()
    pipeline = small_pipeline(method="self-forcing", chunk_width=2, window_frames=6, overlap_frames=2)
    for budget in (None, 1):
        sizes = []
        for chunks in (5, 9):
            told = []
            made = Engine(pipeline, kv=KVSettings(budget=budget))
            found = list(made.generate(request(num_steps=4, chunks=chunks), told.append, decode=False))
            assert len(found) == chunks
            sizes.append({one.kv_bytes for one in told})
        assert sizes[0] == sizes[1] and len(sizes[0]) == 1
