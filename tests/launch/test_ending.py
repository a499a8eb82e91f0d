"""Signals that end a command: they unwind it, also where a library swallows the exception; ignored ones stay so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch.process import environment

SWALLOWED = """
import os, signal, sys
from launch.ending import check_signals, unwind_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
unwind_on_signals()
check_signals()
try:
    os.kill(os.getpid(), int(sys.argv[1]))
except BaseException as error:
    print("swallowed", type(error).__name__)
check_signals()
print("went on")
"""
IGNORED = """
import os, signal
from launch.ending import check_signals, unwind_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
unwind_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
check_signals()
print("went on")
"""
DEFERRED = """
import os, sys
from launch.ending import check_signals, deferred_signals, unwind_on_signals
unwind_on_signals()
with deferred_signals():
    os.kill(os.getpid(), int(sys.argv[1]))
    print("went on")
    if len(sys.argv) > 2:
        check_signals()
        print("not reached")
print("not reached")
"""


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("number", "kind", "status"), [(2, "KeyboardInterrupt", -2), (15, "SystemExit", 143)])
def test_a_swallowed_signal_ends_the_next_round(number: int, kind: str, status: int) -> None:
    done = _run(SWALLOWED, number)
    assert (done.stdout, done.returncode) == (f"swallowed {kind}\n", status)


@pytest.mark.parametrize("looks", [(), ("looks",)])
@pytest.mark.parametrize(("number", "status"), [(1, 129), (2, -2), (15, 143)])
def test_a_deferred_signal_is_seen_by_who_looks_and_at_the_end(number: int, status: int, looks: tuple[str]) -> None:
    done = _run(DEFERRED, number, *looks)
    assert (done.stdout, done.returncode) == ("went on\n", status)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    assert _run(IGNORED).stdout == "went on\n"
