"""Chunks, ticks and quanta of a video that is made in spans, counted through all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import Schedule
from engine.timetable import Timetable


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
