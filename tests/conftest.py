"""Which tests share a worker when several run at a time."""

import pytest

# They start clusters. There is one at a time, and those that can share one do.
RAY = (
    "tests/benchmarks/test_chaos.py",
    "tests/benchmarks/test_cluster.py",
    "tests/launch/test_cluster.py",
    "tests/parallel/cluster/",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, all of a file run on one worker, and so do all that need Ray."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "ray" if nodeid.startswith(RAY) else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
