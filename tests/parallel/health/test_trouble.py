"""When a rank fails, hangs or is killed, all end soon, and one line names it."""

import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from parallel.health.failure import GangError
from parallel.mesh import Layout
from parallel.ranks.environment import RankEnv, child_environment
from parallel.ranks.spawn import run_ranks
from tests.launch.process import command_of
from tests.parallel.forked import ROOT, interpreter
from tests.parallel.on_ranks import TORCHRUN, command, forks, run, torchrun
from tests.ports import free_ports
from tests.waiting import until

pytestmark = pytest.mark.slow

SHORT = {"silent": 6.0, "first": 60.0, "step": 8.0, "grace": 1.0}
GONE = r"(was ended by SIGKILL|has gone: it(s process has ended| has closed its connections))(, last seen .+)?$"
LONG = [{"chunks": 200, "height": 64, "width": 64}]


def check_gone(pids):
    until(lambda: not any(map(command_of, pids)), "a rank is still there", seconds=10.0)


def calls_before(action):
    """So many that there was a heartbeat since work began, where it says what the rank last did."""
    return 500 if action == "stop" else 20


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
            r"^rank 1 .*tick \d+, chunk \d+.*: FlagMismatch: the reuse flags differ from the leader's",
        ),
        ("kill", {"pp": 3}, 1, rf"^rank 1 \(stage 1 of 3\) {GONE}"),
        ("kill", {"cp": 2}, 1, rf"^rank 1 \(stage 0 of 1, cp 1 of 2\) {GONE}"),
        ("kill", {"pp": 2}, 0, rf"^rank 0 \(stage 0 of 2\) {GONE}"),
        (
            "stop",
            {"pp": 3},
            1,
            r"^rank 1 \(stage 1 of 3\) has given no sign of life for \d+ s (at|after) request 0, tick",
        ),
        ("stop", {"pp": 2}, 0, r"^rank 0 \(stage 0 of 2\) has given no sign of life"),
        ("terminate", {"pp": 2}, 1, r"^rank 1 \(stage 1 of 2\) was told to stop$"),
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
    values = {"action": action, "rank": rank, "calls": calls_before(action), "timeouts": SHORT, "requests": LONG}
    fork = action not in ("kill", "stop", "terminate") or layout != {"pp": 2}  # else as they are started in earnest
    with pytest.raises(GangError, match=message) as caught:
        run(tmp_path, "trouble", **layout, fork=fork, **values)
    assert caught.value.failure.status == {"input": 2}.get(action, 1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.pt").exists()
    check_gone(pids(tmp_path, count))


def trouble(tmp_path, action, rank, start=command, **more):
    values = {"layout": {"pp": 2}, "action": action, "rank": rank, "timeouts": SHORT, "requests": LONG, **more}
    return start("trouble", tmp_path / "out.pt", {"calls": calls_before(action), **values})


def started(tmp_path, count):
    """The processes of all ranks, once they are there."""
    until(lambda: all((tmp_path / f"out.pt.{rank}").exists() for rank in range(count)), seconds=60)
    time.sleep(0.5)
    return pids(tmp_path, count)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("raise", r"rank 1 \(stage 1 of 2\): request 0, tick \d+, chunk \d+ .*a matrix of sorrows"),
        ("kill", r"rank 1 \(stage 1 of 2\) has gone: "),
        ("stop", r"rank 1 \(stage 1 of 2\) has given no sign of life for \d+ s (at|after) request 0, tick"),
    ],
)
def test_torchrun_shows_the_message_once_and_leaves_nobody_behind(tmp_path, action, message):
    ended = torchrun(trouble(tmp_path, action, 1), PYTHON_EXEC=interpreter())
    assert ended.returncode == 1
    found = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, ended.stderr
    assert re.match(f"error: {message}", found[0])
    check_gone(pids(tmp_path, 2))


def test_ranks_of_a_killed_torchrun_end(tmp_path):
    agent = subprocess.Popen([*TORCHRUN, *trouble(tmp_path, "none", -1)[1:]], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        found = started(tmp_path, 2)
    finally:
        agent.kill()
        agent.wait()
    check_gone(found)


@contextmanager
def alone(arguments):
    """Two ranks without a launcher: nobody shows or ends anything for them."""
    [port] = free_ports(1)
    ranks = []
    try:
        for rank in range(2):
            env = RankEnv(rank=rank, world_size=2, local_rank=rank, host="127.0.0.1", port=port)
            environment = child_environment(env, threads=1)
            ranks.append(subprocess.Popen(arguments, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_without_a_launcher_a_process_may_go_on_after_a_failure(tmp_path):
    """As an actor does that tells its driver; the store is served by the rank that goes on."""
    with alone(trouble(tmp_path, "kill", 1, forks, survives=SHORT["grace"] + 1)) as ranks:
        assert ranks[0].wait(60) == 1
        assert ranks[1].wait(10) == -signal.SIGKILL
    assert re.match(r"rank 1 \(stage 1 of 2\) has gone: ", (tmp_path / "out.pt").read_text())


@pytest.mark.parametrize(
    ("action", "how"),
    [("kill", "it has closed its connections"), ("stop", r"it has given no sign of life for \d+ s")],
)
def test_without_a_launcher_the_rank_that_serves_the_store_is_named(tmp_path, action, how):
    with alone(trouble(tmp_path, action, 0, forks)) as ranks:
        said = ranks[1].communicate(timeout=120)[1]
        assert ranks[1].returncode == 1
        assert ranks[0].wait(10) == -signal.SIGKILL
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert re.match(rf"error: rank 0 \(stage 0 of 2\) has gone: {how}(, last seen (at|after) .+)?$", errors[0])


LAUNCHER = """
import sys
from parallel.health.failure import GangError
from parallel.ranks.spawn import run_ranks
from parallel.mesh import Layout
from tests.parallel.on_ranks import command, forks
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
        found = started(tmp_path, 2)
        launcher.send_signal(sent)
        assert launcher.wait(20) == status
        check_gone(found)
    finally:
        launcher.kill()


def test_a_wrong_number_of_ranks_is_one_clear_line(tmp_path):
    values = {"layout": {"pp": 3}}
    with pytest.raises(GangError, match="ended with status 2"):
        run_ranks(forks("videos", tmp_path / "out.pt", values), Layout(pp=2), threads=1)
