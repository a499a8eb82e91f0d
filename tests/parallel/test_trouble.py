"""When a rank fails, hangs or is killed, all end soon, and one line names it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.failure import GangError
from parallel.local import run_ranks
from parallel.mesh import Layout
from tests.parallel.ranks import command, run

ROOT = Path(__file__).parent.parent.parent
SHORT = {"silent": 8.0, "first": 60.0, "step": 8.0, "grace": 2.0}
LONG = [{"chunks": 200, "height": 64, "width": 64}]


def gone(pids):
    def alive(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"

    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


def pids(tmp_path, count):
    return [int((tmp_path / f"out.pt.{rank}").read_text()) for rank in range(count)]


@pytest.mark.parametrize(
    ("action", "layout", "rank", "message"),
    [
        (
            "raise",
            {"pp": 3},
            1,
            r"^rank 1 \(stage 1 of 3\): request 0, tick \d+, chunk \d+ \(\w+\): ValueError: a matrix",
        ),
        ("raise", {"pp": 2, "cp": 2}, 3, r"^rank 3 \(stage 1 of 2, cp 1 of 2\): request 0, tick \d+, chunk \d+"),
        ("raise", {"pp": 2}, 0, r"^rank 0 \(stage 0 of 2\): request 0, tick \d+, chunk \d+ \(\w+\): ValueError"),
        ("input", {"pp": 2}, 1, r"^the weights have gone for a walk$"),
        (
            "flip",
            {"pp": 2},
            1,
            r"^rank 1 .*tick \d+, chunk \d+.*: FlagMismatch: the reuse flags differ from the head's",
        ),
        ("kill", {"pp": 3}, 1, r"^rank 1 \(stage 1 of 3\) has gone: it has closed its connections$"),
        ("kill", {"cp": 2}, 1, r"^rank 1 \(stage 0 of 1, cp 1 of 2\) has gone: it has closed its connections$"),
        ("kill", {"pp": 2}, 0, r"^rank 0 \(stage 0 of 2\) has gone: it has closed its connections$"),
        (
            "stop",
            {"pp": 3},
            1,
            r"^rank 1 \(stage 1 of 3\) has given no sign of life for \d+ s (at|after) request 0, tick",
        ),
        ("stop", {"pp": 2}, 0, r"^rank 0 \(stage 0 of 2\) has given no sign of life"),
        (
            "sleep",
            {"pp": 2},
            1,
            r"^rank 1 \(stage 1 of 2\) has not come on for \d+ s at request 0, tick \d+, chunk \d+",
        ),
    ],
)
def test_one_bad_rank_ends_all_and_is_named(tmp_path, action, layout, rank, message):
    count = layout.get("pp", 1) * layout.get("cp", 1)
    calls = 200 if action == "stop" else 20  # so that there was a beat since work began
    with pytest.raises(GangError, match=message) as caught:
        run(tmp_path, "trouble", **layout, action=action, rank=rank, calls=calls, timeouts=SHORT, requests=LONG)
    assert caught.value.failure.status == (2 if action == "input" else 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.pt").exists()
    assert gone(pids(tmp_path, count))


LAUNCHER = """
import sys
from parallel.failure import GangError
from parallel.local import run_ranks
from parallel.mesh import Layout
from tests.parallel.ranks import command
try:
    run_ranks(command("trouble", sys.argv[1], {values}), Layout(pp=2), threads=1)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_rank_outlives_its_launcher(tmp_path, sent, status):
    """Ctrl-C, and a launcher that cannot do anything any more."""
    values = {"layout": {"pp": 2}, "action": "none", "rank": -1, "timeouts": SHORT, "requests": LONG}
    code = LAUNCHER.replace("{values}", repr(values))
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out.pt")],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background test run ignores it
    )
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"out.pt.{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        found = pids(tmp_path, 2)
        launcher.send_signal(sent)
        assert launcher.wait(20) == status
        assert gone(found)
    finally:
        launcher.kill()


def test_a_wrong_number_of_ranks_is_one_clear_line(tmp_path):
    values = {"layout": {"pp": 3}}
    with pytest.raises(GangError, match="ended with status 2"):
        run_ranks(command("videos", tmp_path / "out.pt", values), Layout(pp=2), threads=1)
