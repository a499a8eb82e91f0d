"""Counted operations are held against what PyTorch counts while the same thing runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import CountingRunner, pass_flops
from engine.engine import Engine
from engine.executor import LocalRunner
from engine.kv.layout import KVSettings
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from models.magi.dit import MagiDiT
from models.pocket.preset import POCKET_DIT
from tests.engine.tiny import TinyPipeline, tiny_config


class TorchCounted:
    """A model whose passes PyTorch counts; it sees explicit products only, so attention is computed with them."""

    def __init__(self, model):
        self._model, self.flops = model, 0

    def __getattr__(self, name):
        found = getattr(self._model, name)
        return self._counted(found) if name in ("patches", "layers", "velocity") else found

    def _counted(self, function):
        def run(*args):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                found = function(*args)
            self.flops += counter.get_total_flops()
            return found

        return run


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("budget", [None, 2])
def test_a_videos_operations_are_those_that_pytorch_counts(guided, budget):
    """Limited ranges, compressed buffers, context-free and clean passes, gated MLP, both kinds of captions."""
    pipeline = TinyPipeline(tiny_config(guided=guided))
    reuse, kv = ReuseSettings(policy="flowcache", threshold=0.2, warmup_steps=2), KVSettings(budget=budget)
    by_torch = TorchCounted(pipeline.model)
    counting = CountingRunner(pipeline.model, pipeline.attention, pipeline.config.model_config)
    request = Request(prompt="a thing", chunks=5, height=32, width=32, num_steps=4, seed=3)
    for _ in Engine(pipeline, LocalRunner(by_torch, pipeline.attention), reuse=reuse, kv=kv).generate(request):
        pass
    held = []
    for _ in Engine(pipeline, counting, reuse=reuse, kv=kv).generate(request):
        held.append(counting.kv_bytes)
    assert counting.flops == by_torch.flops > 0
    assert max(held) > 0 and counting.kv_bytes == 0, "the video was released"


def test_more_keys_cost_two_products_each_and_nothing_else():
    one = pass_flops(POCKET_DIT, tokens=96, keys=96, text=5)
    more = pass_flops(POCKET_DIT, tokens=96, keys=97, text=5)
    assert more - one == 2 * 2 * 96 * POCKET_DIT.hidden_size * POCKET_DIT.num_layers


def test_a_pass_of_many_tokens_costs_two_operations_for_each_weight_and_token():
    dit = MagiDiT(POCKET_DIT)
    per_chunk = ("t_embedder", "y_embedder", "ada_modulate", "linear_kv_xattn")
    weights = sum(
        value.numel()
        for name, value in dit.named_parameters()
        if value.dim() > 1 and not any(part in name for part in per_chunk)
    )
    tokens = 10**6
    assert pass_flops(POCKET_DIT, tokens=tokens, keys=0, text=0) == pytest.approx(2 * weights * tokens, rel=1e-4)


def test_counting_changes_nothing():
    pipeline = TinyPipeline(tiny_config())
    request = Request(prompt="a thing", chunks=3, height=32, width=48, num_steps=4, seed=3)
    counting = CountingRunner(pipeline.model, pipeline.attention, pipeline.config.model_config)
    counted = [chunk.latents for chunk in Engine(pipeline, counting).generate(request)]
    plain = [chunk.latents for chunk in Engine(pipeline).generate(request)]
    assert all(torch.equal(a, b) for a, b in zip(counted, plain, strict=True))
    assert counting.items > 12  # 3 chunks of 4 steps, and extra passes
