"""Many clients and slow readers: what each figure is held to, and a small run of the real service."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.common import run_command
from benchmarks.service.__main__ import run
from benchmarks.service.load import Load, Made
from benchmarks.service.readers import Readers
from tests.parallel.forked import ray_workers


def made(number, began, *, priority=0, created=0.0, status="completed"):
    return Made(number=number, priority=priority, status=status, created=created, began=began, frames=str(number))


GOOD = Load(
    wanted=3,
    made=(made(0, 5.0), made(1, 7.0), made(2, 3.0, priority=1)),
    seconds=2.0,
    chunks=3,
    videos=3,
    before=1000,
    after=1029,
    gangs=1,
)


def failed(load):
    return [one.name for one in load.verdicts if one.passed is False]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"made": GOOD.made[:2]}, "requests completed"),
        ({"made": (*GOOD.made[:2], replace(GOOD.made[2], status="failed"))}, "requests completed"),
        ({"chunks": 4}, "made once"),
        ({"videos": 2}, "made once"),
        ({"made": (*GOOD.made[:2], replace(GOOD.made[2], frames="1"))}, "made once"),
        ({"made": (made(0, 5.0), made(1, 3.0), made(2, 7.0, priority=1))}, "begun before a better one"),
        ({"after": 1031}, "memory after the first round and the last"),
    ],
)
def test_each_figure_fails_for_itself(changes, name):
    assert not failed(GOOD)
    assert name in failed(replace(GOOD, **changes))


def test_order_allows_for_the_oldest_and_for_what_came_late_or_began_at_once():
    first, better = made(0, 5.0), made(1, 6.5, priority=1)
    assert replace(GOOD, made=(first, better)).out_of_turn == (1, 0)  # the oldest of all that waited
    assert replace(GOOD, made=(made(2, 5.0), made(3, 9.0), better)).out_of_turn == (0, 1)
    assert replace(GOOD, made=(made(2, 5.0), replace(better, created=4.5))).out_of_turn == (0, 0)
    assert replace(GOOD, made=(made(2, 5.0), replace(better, began=5.9))).out_of_turn == (0, 0)


def test_readers_are_compared_within_pairs():
    pairs = ((1.0, 1.04), (2.0, 1.0), (1.0, 3.0))
    assert Readers(readers=20, pairs=pairs).verdicts[0].passed
    assert not Readers(readers=20, pairs=((1.0, 1.06), *pairs[1:])).verdicts[0].passed


def test_bad_input_is_one_line(tmp_path, capsys):
    assert run_command(run, "service", ["--requests", "7", "--clients", "4", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("service: error: --requests 7") and error.count("\n") == 1


@pytest.mark.slow
def test_a_small_run_loses_nothing(tmp_path):
    arguments = "--requests 8 --clients 4 --readers 2 --rounds 1 --seconds 2 --gangs 1".split()
    command = [sys.executable, "-m", "benchmarks.service", *arguments, "--out", str(tmp_path)]
    environment = {**os.environ, **ray_workers()}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr  # times of so small a run say nothing
    found = {one["name"]: one["passed"] for one in json.loads((tmp_path / "service.json").read_text())["verdicts"]}
    assert found["requests completed"] and found["made once"] and found["begun before a better one"], ended.stdout
    assert "2 slow readers" in (tmp_path / "service.md").read_text()
