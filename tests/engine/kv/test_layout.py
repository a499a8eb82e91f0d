"""Bookkeeping of KV rows under any order of admissions and retirements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.layout import KVLayout


@given(
    chunk_tokens=st.integers(1, 8),
    clean=st.integers(0, 4),
    window=st.integers(1, 4),
    moves=st.lists(st.booleans(), max_size=60),
)
def test_slices_never_overlap_and_the_window_is_never_dropped(chunk_tokens, clean, window, moves):
    layout = KVLayout(chunk_tokens=chunk_tokens, clean_tokens=clean * chunk_tokens, window=window, chunks=100)
    entered, retired = 0, 0
    for enter in moves:
        if enter and entered - retired < window:
            layout.enter(entered)
            entered += 1
        elif entered > retired:
            excess = layout.retire(retired)
            retired += 1
            layout.drop_oldest(excess)
        assert layout.window_chunks == list(range(retired, entered))
        assert layout.used_rows <= layout.capacity
        assert layout.clean_rows <= layout.clean_tokens
        held = [layout.rows(chunk) for chunk in (*layout.clean_chunks, *layout.window_chunks)]
        assert all(rows.stop - rows.start == chunk_tokens for rows in held)
        edges = [0] + [rows.stop for rows in held]
        assert [rows.start for rows in held] == edges[:-1]
        assert edges[-1] == layout.used_rows


def test_what_was_dropped_cannot_be_asked_for():
    layout = KVLayout(chunk_tokens=2, clean_tokens=2, window=1, chunks=9)
    for chunk in range(2):
        layout.enter(chunk)
        layout.drop_oldest(layout.retire(chunk))
    layout.enter(2)
    with pytest.raises(KeyError):
        layout.span(0, 2)
    assert layout.span(1, 2) == slice(0, 4)


def test_chunks_enter_in_order_and_only_into_free_slots():
    layout = KVLayout(chunk_tokens=2, clean_tokens=0, window=2, chunks=9)
    layout.enter(3)
    with pytest.raises(ValueError, match="cannot follow"):
        layout.enter(5)
    layout.enter(4)
    with pytest.raises(ValueError, match="holds"):
        layout.enter(5)
    with pytest.raises(ValueError, match="cannot retire"):
        layout.retire(4)


def test_first_chunks_stay_where_a_sink_is_wanted():
    layout = KVLayout(chunk_tokens=2, clean_tokens=6, window=1, chunks=99, sink_tokens=2)
    for chunk in range(8):
        layout.enter(chunk)
        layout.drop_oldest(layout.retire(chunk))
    assert layout.clean == [(0, 2), (6, 2), (7, 2)]
    layout.enter(8)
    assert layout.rows(6) == slice(2, 4) and layout.span(None, 8) == slice(0, 8)
