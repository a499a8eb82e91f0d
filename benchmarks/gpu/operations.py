"""Single operations: what the card gives at best, and what those of a layer cost.

Products, attention by backend, the output projection by precision, the selection of tokens and the compression of the
KV buffer, and decoding.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Row
from benchmarks.gpu.bench import Bench, problem
from engine.kv.buffer import KVBuffer
from engine.kv.layout import KVPlan
from engine.kv.selection import Granularity, SelectionSettings, select
from engine.video import KVOp
from models.attention import Attention, attention_backend, available_backends, folded
from models.errors import InputError
from models.magi.layers import apply_rotary
from models.magi.pipeline import random_pipeline
from models.magi.weights import Loading

_KEPT = 4  # chunks of a KV budget


def peaks(bench: Bench) -> Iterator[Row]:
    """Large matrix products and copies: what the card gives at best."""
    size = 8192 if bench.cuda else 512
    for dtype in (torch.bfloat16, torch.float32):
        a, b = bench.random(size, size, dtype=dtype), bench.random(size, size, dtype=dtype)
        seconds = bench.seconds(partial(torch.mm, a, b))
        name = str(dtype).removeprefix("torch.")
        yield {"what": f"{name} product of {size}^3", "ms": 1e3 * seconds, "TFLOP/s": 2 * size**3 / seconds / 1e12}
    source = torch.empty(size * size * 16, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    yield {"what": "copy, bytes read and written", "ms": 1e3 * seconds, "TB/s": 2 * source.nbytes / seconds / 1e12}


def attention(bench: Bench) -> Iterator[Row]:
    """Attention of a chunk over 5, 3 and 1 chunks, by backend and by SDPA's kernels."""
    shapes = bench.shapes
    d, g, h = shapes.kv_channels, shapes.num_query_groups, shapes.num_attention_heads
    q = bench.random(1, bench.tokens, h, d)
    for chunks in (5, 3, 1):
        k, v = (bench.random(1, chunks * bench.tokens, g, d) for _ in range(2))
        flops = 4 * bench.tokens * chunks * bench.tokens * h * d
        expected = attention_backend("sdpa")(q, k, v)
        for name, function in _attentions(bench):
            row: Row = {"keys, chunks": chunks, "backend": name}
            try:
                error = ((function(q, k, v) - expected).float().norm() / expected.float().norm()).item()
                seconds = bench.seconds(partial(function, q, k, v))
                row |= {"ms": 1e3 * seconds, "TFLOP/s": flops / seconds / 1e12, "differs from sdpa": error}
            except (RuntimeError, ImportError, InputError) as error:
                row["problem"] = problem(error)
            yield row


def _attentions(bench: Bench) -> Iterator[tuple[str, Attention]]:
    for name in available_backends():
        yield name, attention_backend(name)
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for backend in kernels if bench.cuda else ():

        def in_rows(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return folded(q, k, v)

        def grouped(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        yield f"sdpa's {backend.name.lower()}, folded", in_rows
        if backend is not SDPBackend.EFFICIENT_ATTENTION:  # takes no groups
            yield f"sdpa's {backend.name.lower()}, grouped", grouped


def projection(bench: Bench) -> Iterator[Row]:
    """The output projection of a layer, by precision: the released one multiplies in fp32."""
    hidden = bench.shapes.hidden_size
    x, w = bench.random(bench.tokens, 2 * hidden), bench.random(hidden, 2 * hidden)
    expected = x.double() @ w.double().T
    ways: dict[str, Callable[[], Tensor]] = {
        "fp32, as released": lambda: F.linear(x.float(), w.float()),
        "bf16 operands, fp32 result": lambda: torch.mm(x.bfloat16(), w.bfloat16().T, out_dtype=torch.float32),
        "bf16": lambda: F.linear(x.bfloat16(), w.bfloat16()),
    }
    for name, way in ways.items():
        row: Row = {"way": name}
        try:
            error = ((way() - expected).norm() / expected.norm()).item()
            seconds = bench.seconds(way)
            row |= {"ms": 1e3 * seconds, "TFLOP/s": 2 * x.numel() * hidden / seconds / 1e12, "relative error": error}
        except (RuntimeError, TypeError) as failed:
            row["problem"] = problem(failed)
        yield row


def selection(bench: Bench) -> Iterator[Row]:
    """What a KV budget of 4 chunks costs when a chunk retires, in one layer and in all; and rotary positions."""
    shapes, tokens, layers = bench.shapes, bench.tokens, bench.shapes.num_layers
    keys = bench.random((_KEPT + 1) * tokens, shapes.num_query_groups, shapes.kv_channels)
    frame = tokens // bench.grid[0]
    names: tuple[Granularity, ...] = ("token", "chunk")
    for name in names:
        settings = SelectionSettings(queries=name)
        rows = settings.query_rows(frame, tokens)
        queries = bench.random(rows, shapes.num_attention_heads, shapes.kv_channels)
        choose = partial(
            select, queries, keys, keep=_KEPT * tokens, frame_tokens=frame, chunk_tokens=tokens, settings=settings
        )
        seconds = bench.seconds(choose, repeats=3)
        yield {"what": f"selection, {rows} queries", "ms a layer": 1e3 * seconds, "ms in all": 1e3 * layers * seconds}
    seconds = bench.seconds(_retiring(bench), repeats=3)
    what = "a chunk retires: selection, and the buffer is compressed"
    yield {"what": what, "ms a layer": 1e3 * seconds, "ms in all": 1e3 * layers * seconds}
    rotary = bench.random(1, tokens, shapes.num_attention_heads, shapes.kv_channels, dtype=torch.float32)
    table = bench.random(2, tokens, 3 * (shapes.kv_channels // 8), dtype=torch.float32)
    seconds = bench.seconds(lambda: apply_rotary(rotary, table))
    yield {"what": "rotary positions of the queries", "ms a layer": 1e3 * seconds, "ms in all": 1e3 * layers * seconds}


def _retiring(bench: Bench) -> Callable[[], None]:
    """A call retires the oldest chunk of a full buffer of one layer and lets another in."""
    window = bench.config.runtime_config.window_size
    plan = KVPlan(
        chunk_tokens=bench.tokens,
        frame_tokens=bench.tokens // bench.grid[0],
        clean_tokens=_KEPT * bench.tokens,
        window=window,
        chunks=1_000,
        branches=1,
        selection=SelectionSettings(),
    )
    buffer = KVBuffer(plan, bench.shapes.kv_geometry(range(1), bench.device), attention_backend("sdpa"))
    for chunk in range(window):
        buffer.apply(KVOp(kind="enter", chunk=chunk))
    oldest = iter(range(1_000))

    def retire() -> None:
        chunk = next(oldest)
        buffer.apply(KVOp(kind="retire", chunk=chunk))
        buffer.apply(KVOp(kind="enter", chunk=chunk + window))

    for _ in range(_KEPT):
        retire()
    for layer in buffer.state().layers.values():  # the tensors in use
        layer.kv.normal_()
        if layer.queries is not None:
            layer.queries.normal_()
    return retire


def decode(bench: Bench) -> Iterator[Row]:
    """Decoding one chunk."""
    with torch.no_grad():
        autoencoder = random_pipeline(bench.config, Loading(device=str(bench.device), layers=range(1))).autoencoder
        decoding = autoencoder.stream()
        latents = bench.random(1, bench.shapes.latent_channels, *bench.grid, dtype=torch.float32)
        seconds = bench.seconds(lambda: decoding(latents), repeats=2)
    frames = 4 * bench.grid[0]
    yield {"frames": frames, "pixels": f"{bench.size[1]}x{bench.size[0]}", "ms": 1e3 * seconds}
