"""A pass of one chunk through the layers: its time, and where in it the time goes."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Row
from benchmarks.flops import pass_flops
from benchmarks.gpu.bench import Bench, problem
from benchmarks.workload import TEXT, ChunkPass
from models.magi.pipeline import random_dit
from models.magi.weights import Loading

CONTEXTS = (1, 2, 3, 4, 5)
"""Chunks attended to, its own included."""
_KINDS = {
    "attention": ("attention", "flash", "fmha", "xformers", "softmax"),
    "products": ("mm", "linear", "matmul", "conv"),
}
"""Parts of the names of operations."""
_SHOWN = 24  # kernels of a layer


def passes(bench: Bench, backend: str, *, compiled: bool = False) -> Iterator[Row]:
    """All layers with 1 to 5 chunks of keys, and how much of it is attention and products."""
    dit = random_dit(bench.config, Loading(device=str(bench.device), attention=backend, compiled=compiled))
    for chunks in CONTEXTS:
        run = ChunkPass(dit, bench.config, chunks)
        seconds = bench.seconds(run, repeats=3)
        flops = partial(pass_flops, bench.shapes, tokens=bench.tokens, text=TEXT)
        whole, keys = flops(keys=chunks * bench.tokens), chunks * bench.tokens + TEXT
        attended = 4 * bench.tokens * keys * bench.shapes.hidden_size * bench.shapes.num_layers
        split = _split(run)
        yield {
            "keys, chunks": chunks,
            "ms": 1e3 * seconds,
            "TFLOP": whole / 1e12,
            "TFLOP/s": whole / seconds / 1e12,
            **{f"ms {kind}": 1e3 * seconds * share for kind, share in split.items()},
            "attention TFLOP/s": attended / (seconds * split["attention"]) / 1e12,
            "products TFLOP/s": (whole - attended) / (seconds * split["products"]) / 1e12,
        }
        del run


def _split(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of one call, by kind of operation."""
    times = dict.fromkeys((*_KINDS, "other"), 0.0)
    for name, spent, _ in _operations(run, kernels=False):
        low = name.lower()
        times[next((kind for kind, words in _KINDS.items() if any(word in low for word in words)), "other")] += spent
    whole = sum(times.values())
    return {kind: spent / whole for kind, spent in times.items()}


def _operations(run: Callable[[], object], *, kernels: bool) -> list[tuple[str, float, int]]:
    """(name, time on the device, calls) of what a call runs: operations, or on a GPU its kernels; slowest first."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        run()
        if cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    wanted = DeviceType.CUDA if cuda and kernels else DeviceType.CPU
    found = [event for event in profiled.key_averages() if event.device_type == wanted and getattr(event, key) > 0]
    return sorted(((event.key, getattr(event, key), event.count) for event in found), key=lambda one: -one[1])


def layer(bench: Bench) -> Iterator[Row]:
    """One layer with three chunks of keys, by kernel."""
    dit = random_dit(bench.config, Loading(device=str(bench.device), layers=range(1, 2)))
    run = ChunkPass(dit, bench.config, 3)
    yield {"kernel": "whole layer", "ms": 1e3 * bench.seconds(run), "calls": 1}
    for name, spent, calls in _operations(run, kernels=True)[:_SHOWN]:
        yield {"kernel": name[:90], "ms": spent / 1e3, "calls": calls}


def layer_ways(bench: Bench) -> Iterator[Row]:
    """One layer with three chunks of keys: as it is, compiled, and as a CUDA graph."""
    for way in ("eager", "compiled", "cuda graph") if bench.cuda else ("eager",):
        how = Loading(device=str(bench.device), layers=range(1, 2), compiled=way == "compiled")
        row: Row = {"layer": way}
        began = time.perf_counter()
        try:
            dit = random_dit(bench.config, how)
            run: Callable[[], object] = ChunkPass(dit, bench.config, 3)
            if way == "cuda graph":
                run = _captured(run)
            run()
            row["first call s"] = time.perf_counter() - began
            row["ms"] = 1e3 * bench.seconds(run)
        except (RuntimeError, AssertionError) as error:
            row["problem"] = problem(error)
        yield row


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
