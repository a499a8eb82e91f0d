"""Starts a scenario on several ranks and reads what the lead has saved."""

import json
import sys

import torch

from parallel.ranks.spawn import run_ranks
from parallel.topology.mesh import Layout


def command(name, out, values):
    return [sys.executable, "-m", "tests.parallel.scenarios", name, str(out), json.dumps(values)]


def run(tmp_path, name="videos", *, pp=1, cp=1, **values):
    values["layout"] = {"pp": pp, "cp": cp}
    out = tmp_path / "out.pt"
    run_ranks(command(name, out, values), Layout(pp=pp, cp=cp), threads=1)
    return torch.load(out, weights_only=False)
