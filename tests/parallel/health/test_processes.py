"""Other processes of this machine, and signals that must not end a rank at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from parallel.health.processes import LocalProcess, WakeupPipe
from tests.waiting import until


@pytest.fixture
def process():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield sleeper
    sleeper.kill()
    sleeper.wait()


def test_a_stopped_process_is_told_from_a_running_one_and_ends(process):
    seen = LocalProcess(process.pid)
    assert not seen.gone and not seen.stopped
    process.send_signal(signal.SIGSTOP)
    until(lambda: seen.stopped)
    seen.end()
    until(lambda: seen.gone)  # though nobody has waited for it yet
    assert not seen.stopped
    assert process.wait(10) == -signal.SIGKILL
    seen.end()
    seen.close()


def test_a_process_that_has_gone_before_is_gone(process):
    process.kill()
    process.wait()
    assert LocalProcess(process.pid).gone


@pytest.fixture
def unhandled():
    """Nobody handles SIGTERM; Ray does, in a process that has started a node."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_pipe_wakes_on_sigterm_and_survives_it(unhandled):
    pipe = WakeupPipe()
    try:
        assert pipe.wait(0.01) == set()
        pipe.notify()
        began = time.monotonic()
        assert pipe.wait(10) == set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert pipe.wait(10) == {signal.SIGTERM}
        assert time.monotonic() - began < 9
    finally:
        pipe.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    pipe.notify()  # of no use, and of no harm


def test_a_pipe_leaves_a_handler_of_somebody_else_alone():
    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        WakeupPipe().close()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
