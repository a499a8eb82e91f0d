"""The list of work items: its order, its key ranges, and that the KV layout can follow it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.layout import KVLayout, clean_chunks
from engine.reuse.policy import Policy, ReuseSettings
from engine.schedule import Schedule
from engine.video import Reuse, VideoRun, VideoShape, seeded_noise
from models.magi.sampling import MagiSampling
from models.wan.sampling.forcing import BlockSampling
from tests.engine.tiny import tiny_config

TOKENS = 3


def new_run(*, chunks, prefix_frames, window, num_steps, ranges, guided=False, compressed=False):
    config = tiny_config(guided=guided, window=window, ranges=ranges)
    sampling = MagiSampling(config=config, num_steps=num_steps)
    return run_of(sampling, chunks, prefix_frames, compressed=compressed)


def run_of(sampling, chunks, prefix_frames, *, compressed=False):
    shape = VideoShape(channels=1, prefix_frames=prefix_frames, height=1, width=1)
    first, steps, window = prefix_frames // sampling.chunk_width, sampling.num_steps, sampling.window
    schedule = Schedule(first=first, chunks=chunks, num_steps=steps, window=window, stagger=sampling.stagger)
    prefix = torch.zeros(1, 1, prefix_frames, 1, 1) if prefix_frames else None
    reuse = Reuse(policy=Policy(), memory=ReuseSettings().new_memory(), patches=lambda x: x, observe=False)
    noise, cpu = seeded_noise(0), torch.device("cpu")
    run = VideoRun(7, schedule, shape, sampling, noise, reuse, prefix=prefix, compressed=compressed, device=cpu)
    return run, sampling


def all_items(run):
    """Every work item of a video, with velocities of zero."""
    items = [work.item for work in run.prefix_work()]
    for tick in run.schedule:
        items += [work.item for work in run.begin(tick)]
        for seen, _ in run.decide(tick):
            work = run.open(tick, seen.chunk, seen.step)
            items += [one.item for one in work]
            run.close(seen.chunk, seen.step, [one.item.what for one in work], [torch.zeros_like(work[0].x)] * len(work))
        run.seal(tick)
        for chunk in tick.finishing:
            run.finish(chunk)
    return items


@st.composite
def videos(draw):
    window = draw(st.integers(1, 5))
    ranges = draw(st.sampled_from([(), (5, 4, 3, 2), (1, 1, 1, 1), (3, 3), (7, 2, 5, 1)]))
    parts = len(ranges) or 1
    steps = window * parts * draw(st.integers(1, 2))
    prefix = draw(st.sampled_from([0, 0, 1, 6, 8, 13, 30]))
    chunks = draw(st.integers(prefix // 6 + 1, prefix // 6 + 8))
    guided = draw(st.booleans())
    return {
        "chunks": chunks,
        "prefix_frames": prefix,
        "window": window,
        "num_steps": steps,
        "ranges": ranges,
        "guided": guided,
    }


@settings(deadline=None, max_examples=120)
@given(videos())
def test_the_layout_can_follow_any_order_with_the_rows_it_was_given(video):
    """Buffers are sized by what is ever attended: no item asks for rows that were dropped, none overflows."""
    follow(*new_run(**video))


@st.composite
def groups(draw):
    count, steps = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    sampling = BlockSampling(
        steps=steps,
        ar_step=draw(st.integers(0, 14)),
        block=2,
        frames=2 * count,
        key_range=draw(st.sampled_from([None, 0, 1, 2])),
        hides_prefix=draw(st.booleans()),
        clean_pass=draw(st.booleans()),
    )
    return run_of(sampling, count, 2 * draw(st.integers(0, count - 1)))


@settings(deadline=None, max_examples=120)
@given(groups())
def test_it_can_follow_groups_that_stand_anyhow(run_and_sampling):
    """Staggered by any number of steps, all in step, after given groups, with a range of finished ones or with all."""
    follow(*run_and_sampling)


def follow(run, sampling):
    """Carry the changes of the layout out; the items."""
    capacity = clean_chunks(run.schedule, sampling, None)
    layout = KVLayout(
        chunk_tokens=TOKENS, clean_tokens=capacity * TOKENS, window=sampling.window, chunks=run.schedule.chunks
    )
    items = all_items(run)
    for item in items:
        for op in item.before:
            if op.kind == "enter":
                layout.enter(op.chunk)
            elif op.kind == "retire":
                layout.drop_oldest(layout.retire(op.chunk))
            assert layout.used_rows <= layout.capacity
        if not item.what.isolated:
            rows = layout.span(item.keys_from, item.chunk)
            first = 0 if item.keys_from is None else item.keys_from
            assert rows.stop - rows.start == (item.chunk + 1 - first) * TOKENS
    return items


@settings(deadline=None, max_examples=80)
@given(videos())
def test_items_are_ordered_and_complete(video):
    run, sampling = new_run(**video)
    items = all_items(run)
    keys = [(item.tick, item.chunk) for item in items]
    assert keys == sorted(keys)
    stepped = {(item.chunk, item.step) for item in items if item.step is not None}
    first = run.schedule.first
    assert stepped == {(c, s) for c in range(first, video["chunks"]) for s in range(video["num_steps"])}
    # Each finished chunk but the last is renewed once, each given chunk is filled in once.
    renewed = [item.chunk for item in items if item.what.name == "clean"]
    assert renewed == list(range(video["chunks"] - 1))
    for item in items:
        if item.step is not None and not item.what.isolated and item.keys_from is not None:
            limit = video["ranges"][item.step // (video["num_steps"] // len(video["ranges"]))]
            assert item.keys_from == max(0, item.chunk + 1 - limit)


def test_key_ranges_of_the_worked_trace():
    """W = 4, N = 8, n = 4, ranges [5, 4, 3, 2]; (chunk, first key chunk) of stage 4 and 5 (specification 7.7)."""
    run, _ = new_run(chunks=4, prefix_frames=0, window=4, num_steps=8, ranges=(5, 4, 3, 2))
    items = [item for item in all_items(run) if not item.what.isolated]
    at = {tick: [(i.what.name, i.chunk, i.keys_from) for i in items if i.tick == tick] for tick in range(14)}
    assert at[8] == [("clean", 0, 0), ("denoise", 1, 0), ("denoise", 2, 0), ("denoise", 3, 0)]
    assert at[10] == [("clean", 1, 1), ("denoise", 2, 1), ("denoise", 3, 1)]
    assert at[12] == [("clean", 2, 2), ("denoise", 3, 2)]


def test_guidance_has_three_branches_and_leaves_out_what_counts_for_nothing():
    run, sampling = new_run(chunks=2, prefix_frames=0, window=2, num_steps=8, ranges=(2, 2), guided=True)
    items = all_items(run)
    young = [item.what.name for item in items if item.tick == 0]
    assert young == ["context_free", "null", "text"]
    # t >= 0.3 for the only chunk that is left: its velocity is the null branch's, and nobody reads the text branch.
    last = [item.what for item in items if item.tick == run.schedule.ticks - 1]
    assert [what.name for what in last] == ["null"]
    assert last[0].weight == pytest.approx(1)
    weights = {item.what.name: item.what.weight for item in items if item.tick == 0}
    assert weights == pytest.approx({"context_free": -0.5, "null": -6.0, "text": 7.5})
    assert sampling.branches == 2


def test_a_compressed_past_is_attended_to_whole():
    run, _ = new_run(chunks=6, prefix_frames=0, window=4, num_steps=8, ranges=(5, 4, 3, 2), compressed=True)
    for item in all_items(run):
        assert item.keys_from == (item.chunk if item.what.name == "clean" else None)
