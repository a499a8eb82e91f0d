"""Which tests share a worker when several run at a time; and a home for what is cached."""

import os
import shutil
import signal
import tempfile

import pytest

# They start clusters. There is one at a time, and those that can share one do.
RAY = (
    "tests/benchmarks/test_chaos.py",
    "tests/benchmarks/test_cluster.py",
    "tests/launch/serve/test_page.py",
    "tests/launch/serve/test_service.py",
    "tests/launch/test_cluster.py",
    "tests/parallel/cluster/",
)


def pytest_configure(config):
    """What the commands keep for the next run (encoded prompts) goes to a folder of this run, and with it."""
    config.cache_home = tempfile.mkdtemp(prefix="flowcache-tests-")
    os.environ["XDG_CACHE_HOME"] = config.cache_home
    # Under nohup, or behind a shell, the commands would rightly ignore these, and tests send them.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    """Remove it."""
    shutil.rmtree(config.cache_home, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, all of a file run on one worker, and so do all that need Ray."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "ray" if nodeid.startswith(RAY) else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
