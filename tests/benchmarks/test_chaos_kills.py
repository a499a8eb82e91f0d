"""SIGKILL at random times: what is held against each kind, and a small run."""

import subprocess
import sys

import pytest

from benchmarks.chaos.faults import Kind
from benchmarks.chaos.kills import Kills


def kills(found="frames", hits=1, left=(), streamed=1):
    one = Kills(kind=Kind.SERVICE_RANK, wanted=1, streams=1, streamed=streamed, left=list(left))
    for _ in range(hits):
        one.hit(0.5, "rank 1 of 2", 3)
    one.add("frames", "frames")
    one.add(found, "frames")
    return one


def test_each_figure_fails_for_itself():
    assert kills().verdict.passed and kills().rows[0]["done"] == 3
    bad = ({"found": None}, {"found": "others"}, {"hits": 0}, {"left": ["raylet"]}, {"streamed": 0})
    assert not [changes for changes in bad if kills(**changes).verdict.passed]


@pytest.mark.slow
def test_a_video_survives_a_kill_of_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.chaos", "--kinds", "generate", "--kills", "1"]
    ended = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, check=False, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    text = (tmp_path / "chaos_kills.md").read_text()
    assert text.count("PASS") == 1 and "1 kills, " in text and "FAIL" not in text
