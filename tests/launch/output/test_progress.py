"""Progress: shares and clocks, and what both displays say of events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engine.progress import Progress
from engine.schedule import Schedule
from launch.output.progress import Display, steps_done
from launch.output.terminal import clock


def _event(tick: int, *, chunks: int = 3, num_steps: int = 8, window: int = 4, done: int = 0) -> Progress:
    ticks = (chunks + window - 1) * num_steps // window
    return Progress(
        tick=tick,
        ticks=ticks,
        chunks_done=done,
        chunks=chunks,
        step=2,
        num_steps=num_steps,
        items_done=tick,
        computed_fraction=0.625,
        kv_fill=0.5,
        kv_bytes=1000,
    )


@pytest.mark.parametrize(("chunks", "num_steps", "window"), [(1, 8, 4), (3, 8, 4), (9, 12, 4), (5, 4, 1), (7, 6, 3)])
def test_steps_done_are_those_of_the_schedule(chunks: int, num_steps: int, window: int) -> None:
    done = 0
    for tick in Schedule(first=0, chunks=chunks, num_steps=num_steps, window=window):
        done += len(tick.active)
        event = _event(tick.index + 1, chunks=chunks, num_steps=num_steps, window=window)
        assert steps_done(event) == done
    assert done == chunks * num_steps


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
