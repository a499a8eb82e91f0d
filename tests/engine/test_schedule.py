"""The sliding-window schedule: any chunks, window, steps and offset."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import Schedule, Timetable
from models.errors import InputError


@st.composite
def schedules(draw):
    window, first, made = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.integers(1, 12))
    if draw(st.booleans()):
        return Schedule(first=first, chunks=first + made, num_steps=window * draw(st.integers(1, 5)), window=window)
    steps = draw(st.integers(1, 20))
    stagger = draw(st.integers(0, steps))
    window = -(-steps // stagger) if stagger else made
    return Schedule(first=first, chunks=first + made, num_steps=steps, window=window, stagger=stagger)


@given(schedules())
def test_each_chunk_gets_each_step_once_and_in_order(schedule):
    seen = {chunk: [] for chunk in range(schedule.first, schedule.chunks)}
    for tick in schedule:
        for chunk, step in tick.active:
            assert schedule.tick_of(chunk, step) == tick.index
            seen[chunk].append(step)
    assert all(steps == list(range(schedule.num_steps)) for steps in seen.values())


@given(schedules())
def test_a_window_holds_processes_one_stage_apart(schedule):
    for tick in schedule:
        assert 1 <= len(tick.active) <= schedule.window
        for (older, ahead), (younger, behind) in zip(tick.active, tick.active[1:], strict=False):
            assert younger == older + 1
            assert ahead - behind == (schedule.quantum_ticks if schedule.stagger else 0)


@given(schedules())
def test_chunks_enter_finish_and_retire_once_in_order(schedule):
    ticks = list(schedule)
    generated = list(range(schedule.first, schedule.chunks))
    assert len(ticks) == schedule.ticks
    assert [chunk for t in ticks for chunk in t.entering] == generated
    assert [chunk for t in ticks for chunk in t.finishing] == generated
    # The last chunk ends the video and is never renewed.
    retired = [chunk for t in ticks for chunk in t.retiring]
    assert retired == (generated[:-1] if schedule.stagger else [])
    finished = {chunk: t.index for t in ticks for chunk in t.finishing}
    for tick in ticks:
        assert all(finished[chunk] == tick.index - 1 for chunk in tick.retiring)


@given(schedules())
def test_quanta_partition_the_ticks(schedule):
    ticks = [tick for index in range(schedule.quanta) for tick in schedule.ticks_of_quantum(index)]
    assert ticks == list(range(schedule.ticks))


@given(schedules())
def test_a_quantum_begins_where_the_window_moves_and_takes_a_slot_for_each_active_chunk(schedule):
    entered = []
    for index in range(schedule.quanta):
        first, *rest = (schedule.tick(tick) for tick in schedule.ticks_of_quantum(index))
        assert schedule.slots(index) == max(len(tick.active) for tick in (first, *rest)) <= schedule.window
        assert not any(tick.entering for tick in rest)
        entered += first.entering
    assert entered == list(range(schedule.first, schedule.chunks))


@given(schedules(), st.sampled_from([-1, 0]))
def test_a_quantum_that_is_not_there_is_refused(schedule, which):
    with pytest.raises(IndexError, match="quantum"):
        schedule.slots(schedule.quanta if which == 0 else -1)


def test_number_of_ticks_of_the_published_run():
    """Ten chunks at 64 steps: p * (n + W - 1) forwards (specification 7.3)."""
    assert Schedule(first=0, chunks=10, num_steps=64, window=4).ticks == 16 * 13


def test_worked_trace_of_the_specification():
    """W = 4, N = 8, n = 4 (specification 7.7)."""
    active = [tick.active for tick in Schedule(first=0, chunks=4, num_steps=8, window=4)]
    assert active[0] == ((0, 0),)
    assert active[6] == ((0, 6), (1, 4), (2, 2), (3, 0))
    assert active[8] == ((1, 6), (2, 4), (3, 2))
    assert active[13] == ((3, 7),)


@pytest.mark.parametrize(
    ("first", "chunks", "num_steps", "window"), [(0, 4, 10, 4), (0, 4, 0, 4), (4, 4, 8, 4), (0, 0, 8, 4), (0, 4, 8, 0)]
)
def test_figures_that_make_no_schedule_are_refused(first, chunks, num_steps, window):
    with pytest.raises(InputError):
        Schedule(first=first, chunks=chunks, num_steps=num_steps, window=window)


@pytest.mark.parametrize(("stagger", "window"), [(9, 4), (1, 4), (0, 3)])
def test_a_stagger_that_leaves_gaps_or_does_not_fit_the_window_is_refused(stagger, window):
    with pytest.raises(InputError, match="ticks"):
        Schedule(first=0, chunks=5, num_steps=8, window=window, stagger=stagger)


def test_chunks_may_stand_closer_than_the_window_divides():
    """Twenty steps, three ticks apart: the window is not full when the video is short, and moves within a quantum."""
    schedule = Schedule(first=1, chunks=5, num_steps=20, window=7, stagger=3)
    assert schedule.ticks == 29 and [schedule.slots(quantum) for quantum in (0, 3, 9)] == [1, 4, 1]
    assert schedule.tick(19).finishing == (1,) and schedule.tick(20).retiring == (1,)
    assert schedule.tick(20).active == ((2, 17), (3, 14), (4, 11))


# ---- a video that is made in spans, counted through all of them


@st.composite
def tables(draw):
    steps, overlap = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    stagger = draw(st.integers(0, steps))
    spans = []
    for number in range(draw(st.integers(1, 4))):
        made = draw(st.integers(1, 5))
        first = overlap if number else draw(st.integers(0, 2))
        window = -(-steps // stagger) if stagger else made
        spans.append(Schedule(first=first, chunks=first + made, num_steps=steps, window=window, stagger=stagger))
    return Timetable(spans=tuple(spans))


@given(tables())
def test_every_chunk_and_tick_belongs_to_one_span(table):
    chunks, ticks = [], []
    for place, span in zip(table.places, table.spans, strict=False):
        for tick in span:
            ticks.append(place.tick + tick.index)
            for chunk, step in tick.active:
                assert table.tick_of(place.chunk + chunk, step) == place.tick + tick.index
            chunks += [place.chunk + chunk for chunk in tick.entering]
    assert chunks == list(range(table.first, table.chunks)) and ticks == list(range(table.ticks))


@given(tables())
def test_quanta_go_on_counting(table):
    ends, begun = [], 0
    for quantum in range(table.quanta):
        number, own = table.at(quantum)
        span = table.spans[number]
        assert table.slots(quantum) == span.slots(own) and table.begun(quantum) == begun
        begun += sum(len(span.tick(tick).entering) for tick in span.ticks_of_quantum(own))
        ends.append(table.places[number].tick + span.ticks_of_quantum(own)[-1] + 1)
    assert [table.ended(ticks) for ticks in ends] == list(range(table.quanta)) and ends[-1] == table.ticks
    assert all(table.ended(ticks) is None for ticks in range(1, table.ticks + 1) if ticks not in ends)
    for quantum in (-1, table.quanta):
        with pytest.raises(IndexError, match="quantum"):
            table.slots(quantum)


def test_a_longer_video_goes_on_within_the_last_span():
    spans = (Schedule(first=0, chunks=4, num_steps=6, window=3, stagger=2),)
    spans += (Schedule(first=1, chunks=2, num_steps=6, window=3, stagger=2),)
    table = Timetable(spans=spans)
    assert table.quanta == 6 + 3 and table.open_quantum(0) == 6 + 1
