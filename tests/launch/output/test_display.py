"""What is shown of videos and batches: shares, clocks, bars, lines, tables and the summary."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from engine.progress import Progress
from engine.schedule import Schedule
from launch.output.display import BatchDisplay, Display, Row, State, clock, render, summary


def _event(tick: int, *, done: int = 0) -> Progress:
    chunks, num_steps = 3, 8
    ticks = list(Schedule(first=0, chunks=chunks, num_steps=num_steps, window=4))
    return Progress(
        tick=tick,
        ticks=len(ticks),
        chunks_done=done,
        chunks=chunks,
        step=2,
        num_steps=num_steps,
        steps_done=sum(len(one.active) for one in ticks[:tick]),
        computed_fraction=0.625,
        kv_fill=0.5,
        kv_bytes=1000,
    )


def test_clock() -> None:
    assert [clock(0), clock(9.6), clock(61), clock(3600 + 62)] == ["0:00", "0:10", "1:01", "1:01:02"]


def test_plain_lines_are_few_and_say_what_is_done() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream)) as display:
        display.phase("loading")
        for tick in range(1, 13):
            display.update(_event(tick, done=3 if tick == 12 else 0))
    first, second, last = stream.getvalue().splitlines()  # the ticks between came at once and are left out
    assert first == "loading"
    assert second.startswith("chunks 0/3, step 2/8, 4%, 62% computed, KV 50% full, ") and second.endswith(" left")
    assert last == "chunks 3/3, step 2/8, 100%, 62% computed, KV 50% full, 0:00 left"


def test_the_live_bar_shows_chunks_step_and_time_left() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, force_terminal=True, width=80, color_system=None)) as display:
        display.phase("loading")
        display.update(_event(12, done=3))
    shown = stream.getvalue()
    assert "chunks 3/3  step 2/8" in shown and "100%  62% computed, KV 50% full  0:00 left" in shown


def test_a_pipe_gets_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display.phase("loading")
    assert capfd.readouterr().err == "loading\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    streams = [io.StringIO(), io.StringIO()]
    one, many = (Console(file=stream, force_terminal=True, width=100) for stream in streams)
    with Display(one) as display, BatchDisplay(many) as table:
        display.update(_event(12, done=3))
        table.update([row(1, State.RUNNING, gang="gang 0")])
    assert streams[0].getvalue().startswith("chunks 3/3, step 2/8, 100%, ")
    assert streams[1].getvalue() == "line 1 (video 1): running on gang 0\n"


def test_several_videos_have_a_line_each() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream)) as display:
        for video, name in enumerate(("00-a", "01-b")):
            display.begin(video, name)
            display.update(_event(1), video)
        display.update(_event(2), 1)  # too soon after the one before
        display.end(0, "00-a is complete")
    first, second, last = stream.getvalue().splitlines()
    assert first.startswith("00-a: chunks 0/3, ") and second.startswith("01-b: chunks 0/3, ")
    assert last == "00-a is complete"


def test_several_videos_have_a_bar_each() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, force_terminal=True, width=100, color_system=None)) as display:
        display.phase("loading")
        for video, name in enumerate(("00-a", "01-b")):
            display.begin(video, name)
            display.update(_event(4 + video, done=video), video)
        display.end(0, "00-a is complete")
    shown = stream.getvalue()
    assert "00-a  chunks 0/3" in shown and "01-b  chunks 1/3" in shown and "00-a is complete" in shown
    last = shown[shown.rindex("\x1b[2K\u280b") :]  # the bars as they were drawn last
    assert "01-b" in last and "00-a" not in last


# ---- the table of a batch


def row(line: int, state: State = State.QUEUED, **changes: object) -> Row:
    return Row(**{"line": line, "title": f"video {line}", "state": state, "chunks": 8, **changes})


def shown(rows: list[Row], *, height: int = 24, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(render(rows, height=height))
    return capture.get().splitlines()


MIXED = [
    row(1, State.DONE, chunks_done=8, computed=0.5, gang="gang 0"),
    row(2, State.RUNNING, chunks_done=3, computed=0.625, gang="gang 1", seconds_left=75, restarts=1),
    row(3, State.QUEUED),
    row(4, State.FAILED, chunks_done=2, computed=0.25, error="no space left", restarts=2),
    row(5, State.RESTARTING, chunks_done=2),
    row(6, State.KEPT, chunks_done=8),
]


def test_the_table_says_all_of_a_video() -> None:
    lines = shown(MIXED, width=140)
    running = lines[1]
    for part in ("2", "video 2", "running (restart 1)", "3/8", "gang 1", "62%", "1:15"):
        assert part in running
    assert lines[0].split() == ["Line", "Video", "State", "Chunks", "Gang", "Computed", "Left"]
    assert "video 4: no space left" in "".join(lines)
    assert lines[-1].strip() == "6 videos: 1 running, 1 restarting, 1 failed, 1 queued, 1 done, 1 there already"


def test_those_that_run_come_first_and_the_last_line_counts_the_rest() -> None:
    rows = [row(line) for line in range(1, 100)] + [row(200, State.RUNNING), row(100, State.RUNNING)]
    lines = shown(rows, height=8)
    assert len(lines) == 7
    assert [line.split()[0] for line in lines[1:-1]] == ["100", "200", "1", "2", "3"]
    assert lines[-1].strip() == "101 videos: 2 running, 99 queued; 96 not shown"


@settings(deadline=None)
@given(
    count=st.integers(0, 40),
    height=st.integers(3, 30),
    width=st.integers(30, 160),
    title=st.text(max_size=200),
    state=st.sampled_from(State),
)
def test_it_never_has_more_lines_than_the_terminal(
    count: int, height: int, width: int, title: str, state: State
) -> None:
    rows = [row(line, state, title=title, error=title, gang=title, seconds_left=1e6) for line in range(count)]
    assert len(shown(rows, height=height, width=width)) <= height - 1


def test_what_looks_like_markup_or_moves_the_cursor_is_shown_as_text() -> None:
    lines = shown([row(1, State.RUNNING, title="[red]a[/] \x1b[2J\nb :smile:")], width=140)
    assert "[red]a[/] [2J b :smile:" in lines[1]


def test_a_terminal_gets_a_table() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=10, color_system=None)
    with BatchDisplay(console) as display:
        display.update([row(line, State.RUNNING) for line in range(30)])
        display.update(MIXED)
    assert "running (restart 1)" in stream.getvalue() and "6 videos: 1 running" in stream.getvalue()


def test_without_a_terminal_lines_say_what_is_new() -> None:
    stream, time = io.StringIO(), [0.0]
    with BatchDisplay(Console(file=stream, width=40), now=lambda: time[0]) as display:
        display.update([row(1), row(2), row(3, State.KEPT, chunks_done=8)])
        running = [row(1, State.RUNNING, gang="gang 0"), row(2)]
        display.update(running)
        display.update(running)  # nothing is new
        time[0] = 11.0
        display.update([row(1, State.RUNNING, gang="gang 0", chunks_done=2), row(2)])
        display.update([row(1, State.RESTARTING, chunks_done=2), row(2)])
        display.update([row(1, State.DONE, chunks_done=8, computed=0.5), row(2, State.FAILED, error="no\nspace")])
    assert stream.getvalue().splitlines() == [
        "line 3 (video 3): there already",
        "line 1 (video 1): running on gang 0",
        "2 videos: 1 running, 1 queued; 2 of 16 chunks",
        "line 1 (video 1): restarting from chunk 2",
        "line 1 (video 1): done, 8 chunks, 50% computed",
        "line 2 (video 2): failed: no space",
    ]


def test_a_pipe_gets_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with BatchDisplay() as display:
        display.update([row(1, State.RUNNING, gang="gang 0")])
    assert capfd.readouterr().err == "line 1 (video 1): running on gang 0\n"


def test_the_summary_counts_costs_and_names_what_failed() -> None:
    assert summary(MIXED, seconds=150, restarts=2).splitlines() == [
        "6 videos: 1 running, 1 restarting, 1 failed, 1 queued, 1 done, 1 there already; 15 chunks in 2:30, "
        "10.00 s per chunk, 49% of the steps computed, gangs started again 2 times",
        "line 4 (video 4): failed: no space left",
    ]
    assert summary([], seconds=0, restarts=0) == "0 videos; 0 chunks in 0:00"
    assert summary([], seconds=0, restarts=1) == "0 videos; 0 chunks in 0:00, a gang started again"
