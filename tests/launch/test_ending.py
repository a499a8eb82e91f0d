"""Signals that end a command: with their status and one line, whenever they come; nothing and nobody is left."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.plots.records import made_up_record
from tests.launch.process import environment, flowcache_process

START = """
import os, signal, sys, time
from launch.ending import check_signals, deferred_signals, handle_signals, unwinding_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
number = int(sys.argv[1])
"""
SWALLOWED = """
handle_signals()
with unwinding_signals():
    check_signals()
    try:
        os.kill(os.getpid(), number)
    except BaseException as error:
        print("swallowed", type(error).__name__)
    check_signals()
    print("went on")
"""
IGNORED = """
signal.signal(number, signal.SIG_IGN)
handle_signals()
os.kill(os.getpid(), number)
check_signals()
print("went on")
"""
NOTHING_TO_CLEAN_UP = """
handle_signals()
try:
    os.kill(os.getpid(), number)
finally:
    print("unwound", flush=True)
"""
IN_AN_IMPORT = """
handle_signals()
with unwinding_signals():
    import swallows
    print("imported", flush=True)
    time.sleep(10)
"""
DEFERRED = """
handle_signals()
with unwinding_signals(), deferred_signals():
    os.kill(os.getpid(), number)
    print("went on")
    if len(sys.argv) > 2:
        check_signals()
        print("not reached")
print("not reached")
"""
TWICE = """
handle_signals()
with deferred_signals():
    os.kill(os.getpid(), number)
    time.sleep(1.2)
    os.kill(os.getpid(), number)
    print("went on", flush=True)
"""
# A package that is tried at two times, and takes whatever happens for its absence.
SWALLOWS = """
import os, sys, time
try:
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.1)
except BaseException:
    print("raised in an import", flush=True)
"""


def _run(code: str, number: int, *more: str, folder: Path = Path()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + code, str(number), *more]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("number", "kind", "status"), [(2, "KeyboardInterrupt", -2), (15, "SystemExit", 143)])
def test_a_swallowed_signal_ends_the_next_round(number: int, kind: str, status: int) -> None:
    done = _run(SWALLOWED, number)
    assert (done.stdout, done.returncode) == (f"swallowed {kind}\n", status)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    assert _run(IGNORED, signal.SIGHUP).stdout == "went on\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_where_there_is_nothing_to_clean_up_it_ends_at_once(number: int) -> None:
    done = _run(NOTHING_TO_CLEAN_UP, number)
    assert (done.stdout, done.stderr, done.returncode) == ("", "flowcache: stopped\n", 128 + number)


def test_nothing_is_raised_in_the_middle_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    done = _run(IN_AN_IMPORT, signal.SIGTERM, folder=tmp_path)
    assert (done.stdout, done.returncode) == ("imported\n", 143)


@pytest.mark.parametrize("looks", [(), ("looks",)])
@pytest.mark.parametrize(("number", "status"), [(1, 129), (2, -2), (15, 143)])
def test_a_deferred_signal_is_seen_by_who_looks_and_at_the_end(number: int, status: int, looks: tuple[str]) -> None:
    done = _run(DEFERRED, number, *looks)
    assert (done.stdout, done.returncode) == ("went on\n", status)


def test_whoever_insists_need_not_wait() -> None:
    done = _run(TWICE, signal.SIGINT)
    assert (done.stdout, done.stderr, done.returncode) == ("", "flowcache: stopped\n", 130)


# ---- commands


def _handles_signals(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> signal.SIGQUIT - 1 & 1)


def _left(mark: str) -> list[str]:
    """Processes that were started with this variable in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "tries", "latest"), [("generate", 4, 2.5), ("ranks", 2, 4.0), ("batch", 3, 6.0), ("plot", 2, 1.5)]
)
def test_a_signal_may_come_at_any_time(
    tmp_path: Path, random_weights: Path, command: str, tries: int, latest: float
) -> None:
    prompt, options = "a red circle moving right", ["--weights", random_weights, "--threads", 1]
    (tmp_path / "lines").write_text(f'{{"prompt": "{prompt}", "chunks": 5000}}')
    made_up_record().save(tmp_path / "run")
    arguments: list[object] = {
        "generate": ["generate", prompt, "--chunks", 5000, *options],
        "ranks": ["generate", prompt, "--chunks", 5000, *options, "--pp", 2],
        "batch": ["batch", "lines", *options],
        "plot": ["plot", "reuse", "run"],
    }[command]
    moments = random.Random(command)
    for number in range(tries):
        mark, sent = f"TRY={tmp_path}/{number}", (signal.SIGINT, signal.SIGTERM)[number % 2]
        name, _, value = mark.partition("=")
        process = flowcache_process(tmp_path, *arguments, extra={name: value})
        try:
            while not _handles_signals(process):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, latest))
            process.send_signal(sent)
            _, shown = process.communicate(timeout=60)
        finally:
            process.kill()
        if command == "plot" and process.returncode == 0:
            continue  # it was faster
        assert process.returncode == 128 + sent, shown
        assert shown.splitlines()[-1] == "flowcache: stopped" and shown.count("stopped") == 1, shown
        assert "Traceback" not in shown and len(shown.splitlines()) < 8
        deadline = time.monotonic() + 2
        while left := _left(mark):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        left = [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".mp4")]
        assert not [path for path in left if ".checkpoints" not in path.parts]
