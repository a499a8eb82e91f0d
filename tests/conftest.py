"""Which tests share a worker when several run at a time; and a home for what is cached."""

import gc
import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# An example takes as long as the machine lets it; tests are neighbours of clusters and gangs.
settings.register_profile("neighbours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("neighbours")
# Tests that share a cluster, or a service, share a worker with it. A process is in one cluster at a time, and stays in
# the shared one to its end, so those that join one of their own come before, on the same worker.
SHARED = {
    "tests/launch/test_cluster.py": "cluster",
    "tests/benchmarks/test_chaos.py": "cluster",
    "tests/benchmarks/test_cluster.py": "cluster",
    "tests/parallel/cluster/test_cluster.py": "cluster",
    "tests/parallel/cluster/test_joined.py": "cluster",
    "tests/parallel/cluster/test_nodes.py": "cluster",
    "tests/launch/serve/test_page.py": "service",
    "tests/launch/serve/test_service.py": "service",
}
# What takes longest begins first, so that no worker is left alone with it at the end.
LONGEST = (
    *SHARED,
    "tests/parallel/cluster/",
    "tests/launch/",
    "tests/parallel/health/",
    "tests/parallel/ranks/",
    "tests/benchmarks/",
    "tests/models/pocket/",
    "tests/engine/",
    "tests/models/magi/",
    "tests/test_layers.py",
)


def pytest_configure(config):
    """What the commands keep for the next run (encoded prompts) goes to a folder of this run, and with it."""
    gc.disable()  # what is collected stays
    config.cache_home = tempfile.mkdtemp(prefix="flowcache-tests-")
    os.environ["XDG_CACHE_HOME"] = config.cache_home
    # Under nohup, or behind a shell, the commands would rightly ignore these, and tests send them.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    """Remove it."""
    shutil.rmtree(config.cache_home, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Put the longest tests first; those of a file stay together."""

    def place(item):
        found = (place for place, start in enumerate(LONGEST) if item.nodeid.startswith(start))
        return next(found, len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish():
    """Look for garbage again, but not in what all tests have imported."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, all of a file run on one worker, and so do all that share something costly."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return SHARED.get(file, file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
