"""Ranks that load the weights of their stage."""

import json
from pathlib import Path

import torch

from models.checkpoint import Loading
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import load_stage
from parallel.split import stage_range
from tests.parallel.scenarios.videos import videos
from tests.parallel.small import small_config


def loaded(gang, values, out):
    """As `videos`, with weights from a checkpoint."""
    config = small_config()
    with gang.loading():
        model = load_stage(config, Path(values["weights"]), Loading(layers=stage_range(config, gang.mesh)))
    videos(gang, values, out, wrap=lambda _: model)


def peak_memory():
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load_only(gang, values, out):
    """Load a stage, run nothing, and note how much memory that took."""
    config = MagiConfig.from_dict(values["model"], source="test")
    with torch.device("meta"):
        MagiDiT(config.model_config, Loading(layers=range(1)))  # imports what the meta device needs
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    before = peak_memory()
    model = load_stage(config, Path(values["weights"]), Loading(layers=stage_range(config, gang.mesh)))
    total = sum(parameter.sum().item() for parameter in model.parameters())  # touches every page
    figures = {"grown": peak_memory() - before, "held": model.weight_bytes, "total": total}
    Path(f"{out}.{gang.mesh.rank}").write_text(json.dumps(figures))
