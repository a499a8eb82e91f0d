"""What one GPU does with one chunk: `python -m benchmarks.gpu --out DIR`.

Weights are random, so nothing is downloaded. Each part is written to DIR as soon as it is measured, the most important
first: the card's peaks, attention, the output projection, one layer by operation, a whole pass with one to five chunks
of context, selection, and decoding. Times are medians between events of the device, after warm-up.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Out, machine_line, new_log, output_folder, run_command, save_text, table
from benchmarks.flops import pass_flops
from engine.kv.selection import Granularity, SelectionSettings, select
from engine.kv.views import LayerKV, SliceView
from models.attention import Attention, attention_backend, available_backends
from models.errors import InputError
from models.magi.config import MagiConfig, ModelConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.layers import apply_rotary
from models.magi.presets import released_config
from models.magi.random import random_dit
from models.magi.vae import TiledVAE, ViTVAE
from models.magi.weights import Loading
from models.protocols import Caption, PassCondition

Row = dict[str, Any]
_CONTEXTS = (1, 2, 3, 4, 5)  # chunks attended to, its own included
_TEXT = 200  # caption tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, and where."""

    config: MagiConfig
    vae: VaeConfig
    device: torch.device
    grid: tuple[int, int, int]  # of a chunk's latent

    @property
    def shapes(self) -> ModelConfig:
        """Shapes of the DiT."""
        return self.config.model_config

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        frames, height, width = self.grid
        return frames * (height // self.shapes.patch_size) * (width // self.shapes.patch_size)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values on the device."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.shapes.dtype)

    def seconds(self, function: Callable[[], object], *, repeats: int = 5) -> float:
        """Median time of a call, without its launch; two calls before it are not counted."""
        cuda = self.device.type == "cuda"
        times = []
        for index in range(repeats + 2):
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                passed = start.elapsed_time(end) / 1000
            else:
                began = time.perf_counter()
                function()
                passed = time.perf_counter() - began
            if index >= 2:
                times.append(passed)
        return statistics.median(times)

    def dit(self, layers: range | None = None) -> MagiDiT:
        """A DiT with random weights, in the dtypes of a loaded one."""
        return random_dit(self.config, Loading(device=str(self.device), layers=layers))

    def view(self, chunks: int, layers: range, attention: Attention) -> SliceView:
        """A chunk that attends to so many, itself included."""
        rows, heads, size = chunks * self.tokens, self.shapes.num_query_groups, self.shapes.kv_channels
        held = {layer: LayerKV(self.random(2, rows, heads, size)) for layer in layers}
        return SliceView(held, slice(rows - self.tokens, rows), slice(0, rows), attention, asks=False)


def peaks(bench: Bench) -> Iterator[Row]:
    """Matrix products and copies: what the card gives at best."""
    size = 8192 if bench.device.type == "cuda" else 512
    for dtype in (torch.bfloat16, torch.float32):
        a, b = bench.random(size, size, dtype=dtype), bench.random(size, size, dtype=dtype)
        seconds = bench.seconds(partial(torch.mm, a, b))
        yield {"what": f"{dtype} product of {size}^3", "ms": 1e3 * seconds, "TFLOP/s": 2 * size**3 / seconds / 1e12}
    source = torch.empty(size * size * 16, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    yield {"what": "copy, bytes read and written", "ms": 1e3 * seconds, "TB/s": 2 * source.nbytes / seconds / 1e12}


def attention(bench: Bench) -> Iterator[Row]:
    """Attention of a chunk over 1, 3 and 5 chunks, by backend."""
    shapes = bench.shapes
    d, g, h = shapes.kv_channels, shapes.num_query_groups, shapes.num_attention_heads
    q = bench.random(1, bench.tokens, h, d)
    for chunks in (1, 3, 5):
        k, v = (bench.random(1, chunks * bench.tokens, g, d) for _ in range(2))
        flops = 4 * bench.tokens * chunks * bench.tokens * h * d
        expected = attention_backend("sdpa")(q, k, v)
        for name, function in _attentions():
            row: Row = {"keys, chunks": chunks, "backend": name}
            try:
                error = ((function(q, k, v) - expected).float().norm() / expected.float().norm()).item()
                seconds = bench.seconds(partial(function, q, k, v))
                row |= {"ms": 1e3 * seconds, "TFLOP/s": flops / seconds / 1e12, "differs": error}
            except (RuntimeError, ImportError) as problem:
                row["problem"] = str(problem).splitlines()[0][:80]
            yield row


def _attentions() -> Iterator[tuple[str, Attention]]:
    folded = attention_backend("sdpa")
    for name in available_backends():
        yield name, attention_backend(name)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def chosen(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return folded(q, k, v)

        def grouped(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        yield f"{backend.name.lower()}, folded", chosen
        yield f"{backend.name.lower()}, grouped", grouped


def projection(bench: Bench) -> Iterator[Row]:
    """The output projection of a layer, by precision: the released one multiplies in fp32."""
    hidden = bench.shapes.hidden_size
    x, w = bench.random(bench.tokens, 2 * hidden), bench.random(hidden, 2 * hidden)
    expected = x.double() @ w.double().T if bench.device.type == "cuda" else x.float() @ w.float().T
    ways: dict[str, Callable[[], Tensor]] = {
        "fp32, as released": lambda: F.linear(x.float(), w.float()),
        "bf16 operands, fp32 result": lambda: torch.mm(x, w.T, out_dtype=torch.float32),
        "bf16": lambda: F.linear(x, w),
    }
    for name, way in ways.items():
        row: Row = {"way": name}
        try:
            error = ((way() - expected).norm() / expected.norm()).item()
            seconds = bench.seconds(way)
            row |= {"ms": 1e3 * seconds, "TFLOP/s": 2 * x.numel() * hidden / seconds / 1e12, "relative error": error}
        except (RuntimeError, TypeError) as problem:
            row["problem"] = str(problem).splitlines()[0][:80]
        yield row


def layer(bench: Bench) -> Iterator[Row]:
    """One layer with three chunks of keys, split by kernel."""
    dit = bench.dit(range(1, 2))
    run = _pass(bench, dit, chunks=3)
    whole = bench.seconds(run)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for _ in range(3):
            run()
    yield {"operation": "whole layer", "ms": 1e3 * whole, "calls": 1}
    key = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, key))
    for event in events[:24]:
        yield {"operation": event.key[:90], "ms": getattr(event, key) / 3e3, "calls": event.count / 3}


def layer_compiled(bench: Bench) -> Iterator[Row]:
    """One layer with three chunks of keys, as it is and compiled."""
    for mode in ("eager", "compiled", "cuda graph"):
        dit = bench.dit(range(1, 2))
        row: Row = {"layer": mode}
        began = time.perf_counter()
        try:
            if mode == "compiled":
                dit.videodit_blocks.layers["1"].compile(dynamic=False)
            run = _pass(bench, dit, chunks=3)
            if mode == "cuda graph":
                run = _captured(run)
            run()
            row["first call s"] = time.perf_counter() - began
            row["ms"] = 1e3 * bench.seconds(run)
        except (RuntimeError, AssertionError) as problem:
            row["problem"] = str(problem).splitlines()[0][:80]
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


def _pass(bench: Bench, dit: MagiDiT, *, chunks: int, backend: str = "sdpa") -> Callable[[], object]:
    """One pass over the layers of `dit`."""
    shapes = bench.shapes
    hidden = bench.random(1, bench.tokens, shapes.hidden_size)
    caption = Caption(bench.random(_TEXT, shapes.caption_channels, dtype=torch.float32))
    told = dit.modulation(PassCondition(times=(0.5,), distill=8.0)), dit.text(caption)
    positions = dit.positions(6 * chunks, bench.grid)
    view = bench.view(chunks, dit.held, attention_backend(backend))

    def run() -> object:
        with torch.no_grad():
            return dit.layers(hidden, *told, positions, view)

    return run


def passes(bench: Bench) -> Iterator[Row]:
    """A pass through all layers, against the peak of this card."""
    peak = next(peaks(bench))["TFLOP/s"]
    dit = bench.dit()
    ways = [("reference", False)]
    if bench.device.type == "cuda":
        ways.append(("bf16 projection", True))
    for name, fast in ways:
        for one in dit.videodit_blocks.layers.values():
            one.get_submodule("self_attention").precise = not fast  # type: ignore[assignment]
        for chunks in _CONTEXTS:
            run = _pass(bench, dit, chunks=chunks)
            seconds = bench.seconds(run, repeats=3)
            flops = pass_flops(
                bench.shapes, tokens=bench.tokens, keys=chunks * bench.tokens, text=_TEXT, distilled=True
            )
            rate = flops / seconds / 1e12
            row: Row = {"precision": name, "keys, chunks": chunks, "ms": 1e3 * seconds, "TFLOP": flops / 1e12}
            row |= {"TFLOP/s": rate, "share of peak": rate / peak}
            if bench.device.type == "cuda":
                row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
            yield row
            del run


def selection(bench: Bench) -> Iterator[Row]:
    """Choosing what is kept of a layer: four chunks and one more, cut down to four."""
    shapes, tokens = bench.shapes, bench.tokens
    keys = bench.random(5 * tokens, shapes.num_query_groups, shapes.kv_channels)
    names: tuple[Granularity, ...] = ("token", "chunk")
    for name in names:
        settings = SelectionSettings(queries=name)
        frame = tokens // bench.config.runtime_config.chunk_width
        rows = settings.query_rows(frame, tokens)
        queries = bench.random(rows, shapes.num_attention_heads, shapes.kv_channels)
        choose = partial(
            select, queries, keys, keep=4 * tokens, frame_tokens=frame, chunk_tokens=tokens, settings=settings
        )
        seconds = bench.seconds(choose, repeats=3)
        yield {"queries": f"{rows} rows ({name})", "ms a layer": 1e3 * seconds}
    rotary = bench.random(1, tokens, shapes.num_attention_heads, shapes.kv_channels, dtype=torch.float32)
    table = bench.random(2, tokens, 3 * (shapes.kv_channels // 8), dtype=torch.float32)
    yield {"queries": "rotary positions of q", "ms a layer": 1e3 * bench.seconds(lambda: apply_rotary(rotary, table))}


def decode(bench: Bench) -> Iterator[Row]:
    """Decoding one chunk, tile by tile."""
    with torch.device("meta"):
        vae = ViTVAE(bench.vae)
    dtype = bench.shapes.dtype
    state = {name: 0.02 * bench.random(*tensor.shape, dtype=dtype) for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(state, assign=True)
    tiled = TiledVAE(vae.requires_grad_(False), scale_factor=1.0, fps=24)
    latents = bench.random(1, bench.vae.z_chans, *bench.grid, dtype=torch.float32)
    tiles = len(tiled.decode_grid(*bench.grid))
    seconds = bench.seconds(lambda: tiled.decode(latents), repeats=2)
    yield {"tiles": tiles, "dtype": str(dtype), "ms": 1e3 * seconds, "ms a tile": 1e3 * seconds / tiles}


PARTS = (peaks, attention, projection, layer, layer_compiled, passes, selection, decode)


def _bench(preset: str, device: torch.device) -> Bench:
    config = released_config("4.5B_distill")
    vae = VaeConfig(
        video_size=256, video_length=16, z_chans=16, embed_dim=1024, depth=24, num_heads=16,
        qkv_bias=True, ln_in_attn=True, conv_last_layer=True,
    )  # fmt: skip
    if preset == "magi-4.5b-distill":
        return Bench(config=config, vae=vae, device=device, grid=(6, 90, 90))
    if preset != "tiny":
        raise InputError(f"unknown preset {preset!r}: choose from magi-4.5b-distill, tiny")
    small = replace(
        config.model_config, num_layers=3, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, kv_channels=32
    )
    return Bench(
        config=replace(config, model_config=small),
        vae=replace(vae, embed_dim=256, depth=2, num_heads=4, use_final_proj=True),
        device=device,
        grid=(6, 8, 8),
    )


def main(
    out: Out = Path("results/gpu"),
    preset: Annotated[str, typer.Option(help="Shapes: magi-4.5b-distill at 720x720, or tiny.")] = "magi-4.5b-distill",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="No part is begun after so many minutes.")] = 9.0,
    only: Annotated[list[str] | None, typer.Option(help="Measure this part; may be given several times.")] = None,
) -> int:
    """Measure what one GPU does with one chunk, part by part; parts that DIR has already are not measured again."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU here: give --device cpu --preset tiny to try the command")
    known = [part.__name__ for part in PARTS]
    for name in only or ():
        if name not in known:
            raise InputError(f"unknown part {name!r}: choose from {', '.join(known)}")
    log, began, folder = new_log(), time.monotonic(), output_folder(out)
    bench = _bench(preset, torch.device(device))
    for part in PARTS:
        path = folder / f"{part.__name__}.json"
        if path.exists() or (only and part.__name__ not in only):
            continue
        if time.monotonic() - began > 60 * minutes:
            log(f"{part.__name__}: no time left")
            continue
        rows = []
        started = time.monotonic()
        try:
            for row in part(bench):
                rows.append(row)
                log(f"{part.__name__}: {_plain(row)}")
        except RuntimeError as problem:
            rows.append({"problem": str(problem).splitlines()[0]})
            log(f"{part.__name__}: failed: {problem}")
        log(f"{part.__name__}: took {time.monotonic() - started:.0f} s")
        save_text(path, json.dumps(rows, indent=1))
        _report(folder, preset)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    typer.echo((folder / "gpu.md").read_text())
    return 0


def _plain(row: Row) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def _report(folder: Path, preset: str) -> None:
    sections = [f"# One chunk of {preset}", machine_line()]
    for part in PARTS:
        path = folder / f"{part.__name__}.json"
        if path.exists():
            rows = json.loads(path.read_text())
            keys = {key: None for row in rows for key in row}
            text = table([{key: row.get(key) for key in keys} for row in rows])
            sections.append(f"## {part.__name__}\n\n{part.__doc__}\n\n{text}")
    save_text(folder / "gpu.md", "\n\n".join(sections) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "gpu"))
