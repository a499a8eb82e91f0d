"""Long videos: a real run with ranks, what it leaves, and what runs are held to."""

import json
from dataclasses import replace

import pytest

from benchmarks.common import run_command
from benchmarks.throughput.__main__ import Which, cases, run
from benchmarks.throughput.measure import RUNS, Case, Look, Minute, Run
from benchmarks.throughput.report import verdicts

CHUNKS = 120
MADE = Run(
    case=Case(chunks=CHUNKS),
    frames_per_chunk=24,
    video_fps=24,
    ready=1.0,
    chunk_seconds=[[2.0 + chunk for chunk in range(CHUNKS)]],
    computed=1.0,
    decode=0.1,
    busy=[],
    looks=[
        Look(
            chunks=at,
            seconds=at,
            host_bytes=400 * 2**20,
            device_bytes=0,
            kv_bytes=9,
            steps=16 * at,
            computed=8 * at,
            probe=0.01,
        )
        for at in range(10, CHUNKS, 10)
    ],
    minutes=[Minute(minute=1, sharpness=2.0, spread=0.9, colour=1.0, direction=1.0, shape=0.8, position=1.0)],
)


def test_a_run_that_does_not_change_passes():
    assert [one.passed for one in verdicts(MADE)] == [True] * 4
    assert verdicts(replace(MADE, case=Case(chunks=60))) == []


def later(**changes):
    return [look if look.chunks < 80 else replace(look, **changes) for look in MADE.looks]


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"looks": later(kv_bytes=10)}, 0),
        ({"looks": later(host_bytes=409 * 2**20)}, 1),
        ({"chunk_seconds": [[chunk + 0.06 * max(0, chunk - 90) for chunk in range(CHUNKS)]]}, 2),
        ({"minutes": [*MADE.minutes, replace(MADE.minutes[0], minute=2, shape=0.6)]}, 3),
    ],
)
def test_each_figure_fails_for_itself(changes, which):
    assert [one.passed for one in verdicts(replace(MADE, **changes))] == [at != which for at in range(4)]


def test_another_model_is_held_to_no_shape():
    unknown = [replace(MADE.minutes[0], shape=float("nan"))]
    assert [one.passed for one in verdicts(replace(MADE, minutes=unknown))] == [True] * 3


def test_a_machine_that_gives_less_in_the_end_is_not_held_against_the_video():
    slower = [[chunk + 0.06 * max(0, chunk - 90) for chunk in range(CHUNKS)]]
    late = [look if look.chunks < 100 else replace(look, probe=0.0106) for look in MADE.looks]
    assert [one.passed for one in verdicts(replace(MADE, chunk_seconds=slower, looks=late))] == [True] * 4


def test_a_chunk_of_which_more_is_computed_may_take_longer():
    slower = [[chunk + 0.06 * max(0, chunk - 90) for chunk in range(CHUNKS)]]
    late = [replace(look, computed=8 * look.chunks + 0.5 * max(0, look.chunks - 90)) for look in MADE.looks]
    assert [one.passed for one in verdicts(replace(MADE, chunk_seconds=slower, looks=late))] == [True] * 4


def test_a_video_that_ends_early_changes_no_bytes_of_those_in_flight():
    seconds = [[float(chunk) for chunk in range(CHUNKS)], [0.8 * chunk for chunk in range(CHUNKS)]]
    looks = []
    for at in range(10, CHUNKS, 5):
        chunks, kv = at + min(CHUNKS, int(at / 0.8)), 9 if at < 96 else 4
        looks.append(
            replace(MADE.looks[0], chunks=chunks, seconds=at, kv_bytes=kv, steps=16 * chunks, computed=8 * chunks)
        )
    assert verdicts(replace(MADE, case=replace(MADE.case, videos=2), chunk_seconds=seconds, looks=looks))[0].passed


def test_sets_begin_with_what_the_others_are_compared_with():
    base = Case(chunks=600, kv_budget=4)
    assert [one.cache for one in cases(Which.CACHES, base)] == ["none", "teacache", "flowcache-slow", "flowcache-fast"]
    standard = list(cases(Which.STANDARD, base))
    assert len({one.name for one in standard}) == len(standard) == 8
    passes = list(cases(Which.PASSES, base))
    assert [one.passes for one in passes[1:3]] == [
        ["with clean pass", "no copy pass"],
        ["no clean pass", "with copy pass"],
    ]
    assert len({one.name for one in passes}) == 4 and {one.cache for one in passes} == {"none"}
    assert (standard[0].cache, standard[0].kv_budget, standard[0].pp, standard[0].videos) == ("none", None, 1, 1)


@pytest.mark.slow
def test_two_videos_on_two_stages_are_measured_and_not_made_again(tmp_path, capfd):
    options = ["--minutes", "0.2", "--pp", "2", "--concurrency", "2", "--kv-budget", "1", "--out", str(tmp_path)]
    options += ["--seed", "5", "--no-clean-pass"]
    assert run_command(run, "throughput", [*options, "--steps", "4"]) == 0
    (path,) = tmp_path.glob("*.json")
    made = RUNS.validate_json(path.read_bytes())
    assert [len(video) for video in made.chunk_seconds] == [12, 12] and len(made.busy) == 2
    assert all(0 < share <= 1 for share in made.busy) and made.decode > 0 and made.commit and made.machine
    assert {look.chunks for look in made.looks} == {10, 20}
    assert all(0 < look.computed <= look.steps <= 2 * 12 * 4 for look in made.looks)
    assert all(look.host_bytes > 2 * 10**8 and look.kv_bytes > 0 for look in made.looks[:1])  # both ranks, both videos
    text = (tmp_path / "throughput.md").read_text()
    assert all(0.3 < minute.spread < 3 for minute in made.minutes)
    assert "## Drift" in text and "default, no clean pass, budget 1, pp 2, 2 videos, seed 5" in text
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
    capfd.readouterr()
    assert run_command(run, "throughput", [*options, "--steps", "4"]) == 0
    assert "taken from" in capfd.readouterr().err
    path.write_text(json.dumps({"case": 1}))
    assert run_command(run, "throughput", [*options, "--steps", "4"]) == 2
    assert "is no run of this benchmark" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cache", "sometimes"], "--cache: "),
        (["--pp", "7"], "stages"),
        (["--model", "nothing"], "nothing"),
        (["--launcher", "pigeon"], "--launcher: "),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is(tmp_path, capsys, options, said):
    assert run_command(run, "throughput", [*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("throughput: error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
