"""The plan of failures, its options, the list of processes, and one small run with a failure."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.chaos.__main__ import run
from benchmarks.chaos.faults import GANG_KINDS, Kind, marked, parse_kinds, plan_faults, processes_of, survivors
from benchmarks.common import run_command
from models.errors import InputError

ALL = GANG_KINDS


def test_a_plan_has_everything_and_is_the_same_again():
    plan = plan_faults(20, ALL, seed=0)
    assert plan == plan_faults(20, ALL, seed=0) != plan_faults(20, ALL, seed=1)
    kinds = Counter(one.kind for one in plan)
    assert kinds == {Kind.RANK: 9, Kind.GANG: 8, Kind.NODE: 3}
    stopped = [one for one in plan if one.how is signal.SIGSTOP]
    assert len(stopped) == 4 and all(one.kind is not Kind.NODE for one in stopped)
    assert sum(one.hasty for one in plan) == 4 and not plan[0].hasty


@pytest.mark.parametrize("seed", range(20))
def test_no_two_in_a_row_are_hasty(seed):
    plan = plan_faults(12, ALL, seed)
    assert len(plan) == 12 and any(one.hasty for one in plan)
    assert not any(one.hasty and other.hasty for one, other in zip(plan, plan[1:], strict=False))


@pytest.mark.parametrize(
    ("count", "kinds", "nodes"), [(1, ALL, 0), (2, ALL, 1), (3, (Kind.NODE,), 3), (5, (Kind.GANG,), 0)]
)
def test_small_plans(count, kinds, nodes):
    plan = plan_faults(count, kinds, 0)
    assert len(plan) == count and sum(one.kind is Kind.NODE for one in plan) == nodes


def test_kinds_are_names():
    assert parse_kinds("node, rank") == (Kind.RANK, Kind.NODE)
    with pytest.raises(InputError, match="'rack' cannot fail here"):
        parse_kinds("rank,rack")


def test_bad_input_is_one_line(tmp_path, capsys):
    cases = (
        (["--kinds", "rack"], "choose from rank, gang, node, driver, part, checkpoint, disk, gcs, generate, service,"),
        (["--failures", "0"], "failures"),
    )
    for arguments, said in cases:
        assert run_command(run, "chaos", [*arguments, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("chaos: error: ") and error.count("\n") == 1 and said in error


def test_marked_processes_are_found_and_so_are_their_children():
    wait = "import sys; sys.stdin.read()"
    spawn = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}])"
    with marked() as mark:
        parent = subprocess.Popen([sys.executable, "-c", spawn], stdin=subprocess.PIPE)
    unmarked = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE)
    try:
        for _ in range(100):
            found = processes_of(mark)
            if len(found) == 2:
                break
            signal.sigtimedwait([], 0.1)
        assert len(found) == 2 and parent.pid in found
        assert unmarked.pid not in found and os.getpid() not in found
        assert survivors(mark, 0.3) == found
        parent.kill()  # its child is nobody's, and still ours
        parent.wait()
        assert list(survivors(mark, 0.3)) == [pid for pid in found if pid != parent.pid]
    finally:
        for process in (parent, unmarked):
            process.stdin.close()
            process.kill()
            process.wait()
    assert survivors(mark, 10) == {}


@pytest.mark.slow
def test_a_small_batch_survives_a_failure(tmp_path):
    pytest.importorskip("ray")
    arguments = f"--failures 1 --kinds rank --limit 250 --quick --videos 2 --out {tmp_path}".split()
    command = [sys.executable, "-m", "benchmarks.chaos", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=320)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    text = (tmp_path / "chaos.md").read_text()
    assert "FAIL" not in text and "SIGKILL" in text
    assert len((tmp_path / "chaos.csv").read_text().splitlines()) == 2
