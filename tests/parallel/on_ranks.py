"""Starts a scenario on several ranks and reads what the lead has saved."""

import json
import os
import subprocess
import sys

import torch

from parallel.mesh import Layout
from parallel.ranks.spawn import run_ranks
from tests.parallel.forked import ROOT, forked

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def arguments(name, out, values):
    return [name, str(out), json.dumps(values)]


def command(name, out, values):
    return [sys.executable, "-m", "tests.parallel.scenarios", *arguments(name, out, values)]


def forks(name, out, values):
    return forked(arguments(name, out, values))


def start(out, name, values, *, pp=1, cp=1, fork=True):
    """Run a scenario. Ranks are forks (`tests.parallel.forked`), or processes that import everything themselves."""
    values["layout"] = {"pp": pp, "cp": cp}
    run_ranks((forks if fork else command)(name, out, values), Layout(pp=pp, cp=cp), threads=1)


def run(tmp_path, name="videos", *, pp=1, cp=1, fork=True, **values):
    """As `start`; what the lead has saved."""
    out = tmp_path / "out.pt"
    start(out, name, values, pp=pp, cp=cp, fork=fork)
    return torch.load(out, weights_only=False)


def torchrun(arguments, **more):
    """Have two ranks run a command as torchrun starts them; `more` are variables of their environment."""
    return subprocess.run(
        [*TORCHRUN, *arguments[1:]],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
