"""Each rank reads its own tensors and no others."""

import json

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import Loading
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import load_stage
from parallel.mesh import Layout, Mesh
from parallel.split import stage_range
from tests.parallel.on_ranks import run, start
from tests.parallel.small import SmallPipeline, small_config

pytestmark = pytest.mark.slow


def written(folder, config):
    """A checkpoint of two shards, one for the odd layers."""
    state = SmallPipeline(config).model.state_dict()
    shards = {name: f"model-{'.layers.1.' in name or '.layers.3.' in name:d}.safetensors" for name in state}
    folder.mkdir()
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return state


def test_the_stages_of_a_checkpoint_are_the_whole_of_it(tmp_path):
    config = small_config(5)
    state = written(tmp_path / "inference_weight.distill", config)
    seen = set()
    for rank in range(4):
        layers = stage_range(config, Mesh(layout=Layout(pp=4), rank=rank), "2,1,1,1")
        model = load_stage(config, tmp_path, Loading(layers=layers))
        held = model.state_dict()
        assert {int(name.split(".")[2]) for name in held if ".layers." in name} == set(layers)
        assert ("x_embedder.weight" in held) == (rank == 0)
        assert ("final_linear.linear.weight" in held) == (rank == 3)
        assert all(torch.equal(held[name], state[name]) for name in held)
        assert model.weight_bytes == sum(tensor.nbytes for tensor in held.values())
        seen |= set(held)
    assert seen == set(state)


def test_ranks_hold_their_own_weights_only(tmp_path):
    config = small_config(5)
    state = written(tmp_path / "inference_weight.distill", config)
    got = run(tmp_path, "loaded", pp=3, weights=str(tmp_path))
    whole = sum(tensor.nbytes for tensor in state.values())
    layer = sum(tensor.nbytes for name, tensor in state.items() if ".layers.0." in name)
    shared = whole - 5 * layer
    for report in got["reports"]:
        count = report.layers[1] - report.layers[0]
        assert count * layer < report.weight_bytes <= count * layer + shared
        assert report.load_seconds > 0
    assert len(got["latents"][0]) == 4


def test_no_rank_ever_holds_more_than_its_own_stage(tmp_path):
    """Measured on processes: 16 layers of 16 MB each over 4 stages."""
    values = small_config(16).to_dict()
    values["model_config"] |= {
        "hidden_size": 512,
        "ffn_hidden_size": 2048,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 64,
    }
    config = MagiConfig.from_dict(values, source="test")
    dit = MagiDiT(config.model_config)
    folder = tmp_path / "inference_weight.distill"
    folder.mkdir()
    save_file(dit.state_dict(), folder / "model.safetensors")
    whole = sum(parameter.nbytes for parameter in dit.parameters())
    assert whole > 250e6
    del dit
    start(tmp_path / "out", "load_only", {"model": values, "weights": str(tmp_path)}, pp=4, fork=False)
    for rank in range(4):
        figures = json.loads((tmp_path / f"out.{rank}").read_text())
        assert figures["held"] < 0.3 * whole
        assert figures["grown"] < 1.2 * figures["held"]
