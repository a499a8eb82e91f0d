"""Keys and values that lie elsewhere: alike in all branches, or in host memory. The same bits, fewer bytes."""

import itertools
from dataclasses import replace

import pytest
import torch

from engine import request as requests
from engine.engine import Engine
from engine.kv.buffer import KVBuffer
from engine.kv.layout import KVPlan, KVSettings, plan_kv
from engine.kv.selection import SelectionSettings
from engine.kv.staging import Staging
from engine.reuse.policy import ReuseSettings
from engine.schedule import Schedule
from engine.video import KVOp
from models.attention import attention_backend
from models.protocols import KVGeometry
from tests.engine.tiny import tiny_config
from tests.parallel.small import SmallPipeline, one_thread, request

gpu = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
GUIDED, CLIP = {"guided": True}, torch.zeros(80, 32, 48, 3, dtype=torch.uint8)  # three whole chunks, and some frames


def latents(pipeline, kv, wanted, reuse):
    made = list(Engine(pipeline, kv=kv, reuse=reuse).generate(wanted, decode=False))
    return torch.cat([chunk.latents for chunk in made], dim=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("config", "budget", "clean_pass", "prefix"),
    [
        ({}, None, True, None),
        ({"guided": True, "window": 1}, None, True, None),
        ({"guided": True, "window": 2}, None, True, CLIP),
        (GUIDED, None, True, CLIP),
        (GUIDED, None, False, CLIP),
        (GUIDED, 2, True, None),
        ({"guided": True, "window": 1}, 1, False, CLIP),
    ],
    ids=["distilled", "window 1", "window 2, clip", "clip", "not renewed", "compressed", "compressed, window 1, clip"],
)
def test_wherever_rows_lie_the_video_is_the_same(config, budget, clean_pass, prefix, device, monkeypatch):
    """All in one tensor for each branch; alike ones once; in host memory."""
    one_thread()
    pipeline, wanted = SmallPipeline(tiny_config(**config), device=device), request(chunks=5, prefix=prefix)
    kv, reuse = KVSettings(budget=budget), ReuseSettings(clean_pass=clean_pass)
    made = [latents(pipeline, one, wanted, reuse) for one in (kv, replace(kv, offload=True))]
    monkeypatch.setattr(requests, "plan_kv", lambda *given: replace(plan_kv(*given), shared=False))
    plain = latents(pipeline, kv, wanted, reuse)
    assert all(torch.equal(one, plain) for one in made)


CHUNK = 6
WIDTH = 2 * 2 * 8 * 4  # keys and values of two heads of 8, fp32


@pytest.mark.parametrize(
    ("config", "budget", "offload", "chunks", "once", "host"),
    [
        # Chunks that a layer holds, those that there are once for all layers, and those of a layer in host memory.
        ({}, None, False, 5, 0, 0),
        ({}, None, True, 4, 1 + 5, 1),
        (GUIDED, None, False, 5 + 5, 0, 0),  # the one clean chunk differs in the tick in which it retires
        (GUIDED, None, True, 4 + 4, 1 + 5, 1 + 1),
        ({"guided": True, "window": 1}, None, False, 5 + 2, 5, 0),
        ({"guided": True, "window": 1}, None, True, 1 + 1, 4 + 5, 4 + 1),
        ({"guided": True, "window": 2}, None, False, 5 + 3, 5, 0),
        ({"guided": True, "window": 2, "clean_pass": False}, None, False, 5 + 5, 0, 0),
        (GUIDED, 3, False, 7 + 7, 0, 0),
        (GUIDED, 3, True, 4 + 4, 3 + 7, 3 + 3),
    ],
)
def test_bytes_are_those_of_rows_that_differ(config, budget, offload, chunks, once, host):
    layers, config = 3, dict(config)
    clean_pass = config.pop("clean_pass", True)
    sampling = SmallPipeline(tiny_config(**config)).sampling(8, clean_pass=clean_pass)
    schedule = Schedule(first=0, chunks=12, num_steps=8, window=sampling.window)
    plan = plan_kv(sampling, schedule, KVSettings(budget=budget, offload=offload), CHUNK)
    cpu = torch.device("cpu")
    geometry = KVGeometry(
        layers=range(layers), query_heads=4, key_heads=2, head_size=8, dtype=torch.float32, device=cpu
    )
    buffer = KVBuffer(plan, geometry, attention_backend("sdpa"))
    bookkeeping = 0
    if budget:
        bookkeeping = sampling.branches * layers * (CHUNK * 4 * 8 * 4 + (budget + sampling.window) * CHUNK * 2 * 4)
    assert buffer.nbytes == plan.nbytes(geometry) == (layers * chunks + once) * CHUNK * WIDTH + bookkeeping
    held = [layer.host for layer in buffer._layers.values() if layer.host is not None]
    assert buffer.host_nbytes == sum(one.nbytes for one in held) == layers * host * CHUNK * WIDTH
    pinned = plan.host_nbytes(replace(geometry, device=torch.device("cuda")))  # 768 and its multiples, each a power
    assert pinned == 0 if not host else pinned > buffer.host_nbytes and pinned % 1024 == 0


@pytest.mark.parametrize("device", DEVICES)
def test_copies_come_in_order_behind_a_busy_compute_stream(device):
    """Nothing is overwritten before its reads are done, on the device or on the host, and nothing is read too early.

    On a GPU every read and write is queued behind a long kernel, or behind none, so that a copy that waits for too
    little finds or leaves other values.
    """
    rows, heads, size, layers, device = 4096, 2, 64, 3, torch.device(device)
    plan = KVPlan(
        chunk_tokens=rows, frame_tokens=rows, clean_tokens=2 * rows, window=1, chunks=9, branches=1, selection=None,
        offload=True,
    )  # fmt: skip
    geometry = KVGeometry(
        layers=range(layers), query_heads=2, key_heads=heads, head_size=size, dtype=torch.float32, device=device
    )
    staging, pinned = Staging(plan, geometry), device.type == "cuda"
    host = [torch.zeros(2, 2 * rows, heads, size, pin_memory=pinned) for _ in range(layers)]
    own = [torch.zeros(2, rows, heads, size, device=device) for _ in range(layers)]
    pieces = [[one[:, rows:], one[:, :rows]] for one in host]
    values = [[0.0, 0.0, 0.0] for _ in range(layers)]  # of the first and the second half on the host, and of its own
    seen, expected = [], []

    def busy(turn):
        if pinned and turn % 2:
            torch.cuda._sleep(20_000_000)  # some ten milliseconds

    for turn in range(8):
        for layer in range(layers):
            busy(turn)
            joined = staging.join((turn, layer), pieces[layer], own[layer])
            if layer + 1 < layers:
                staging.fetch((turn, layer + 1), pieces[layer + 1])
            busy(turn)
            seen.append(joined.double().unflatten(1, (3, rows)).mean((0, 2, 3, 4)))
            expected.append([values[layer][1], values[layer][0], values[layer][2]])
        half = turn % 2
        busy(turn + turn // 2)
        for layer in range(layers):  # a chunk is made, retires, and another takes its place
            made, values[layer][2] = 100.0 * turn + layer, -1.0 - turn
            own[layer].fill_(made)
            values[layer][half] = made
        staging.to_host((host[layer][:, half * rows : (half + 1) * rows], own[layer]) for layer in range(layers))
        for layer in range(layers):
            own[layer].fill_(values[layer][2])
    staging.settle()
    assert torch.stack(seen).tolist() == expected
    assert [[one[:, :rows].mean().item(), one[:, rows:].mean().item()] for one in host] == [one[:2] for one in values]


@pytest.mark.parametrize(
    ("clean", "sink", "selection"),
    [
        (3, 0, None),
        (3, 1, None),  # the first chunk stays
        (1, 1, None),  # and nothing but it
        (2, 0, SelectionSettings(query_tokens=3)),
        (2, 0, SelectionSettings(query_tokens=3, asks="next")),  # compressed layer by layer, when the next one attends
    ],
)
def test_what_chunks_attend_to_is_the_same_in_host_memory(clean, sink, selection):
    geometry = KVGeometry(
        layers=range(3), query_heads=4, key_heads=2, head_size=8, dtype=torch.float32, device=torch.device("cpu")
    )
    plan = KVPlan(
        chunk_tokens=CHUNK, frame_tokens=1, clean_tokens=clean * CHUNK, window=2, chunks=9, branches=2,
        selection=selection, sink_tokens=sink * CHUNK,
    )  # fmt: skip

    def attended(buffer):
        generator, made = torch.Generator().manual_seed(0), []
        for chunk in range(plan.chunks):
            if chunk >= plan.window:
                buffer.apply(KVOp(kind="retire", chunk=chunk - plan.window))
            buffer.apply(KVOp(kind="enter", chunk=chunk))
            for one, branch in itertools.product(buffer.layout.window_chunks, range(plan.branches)):
                view = buffer.view(branch, one, None, asks=True)
                for layer in geometry.layers:
                    k, v = torch.randn(2, 1, CHUNK, 2, 8, generator=generator)
                    view.store(layer, k, v)
                    made.append(view.attend(layer, torch.randn(1, CHUNK, 4, 8, generator=generator)))
        return torch.stack(made)

    attention = attention_backend("sdpa")
    plain, offload = (attended(KVBuffer(one, geometry, attention)) for one in (plan, replace(plan, offload=True)))
    assert torch.equal(plain, offload)
