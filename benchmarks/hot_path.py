"""What each change to the hot path brings, one at a time: `python -m benchmarks.hot_path`.

A chunk goes through a random model (hidden size 512, 8 layers, 1,014 tokens) that attends to three chunks, with and
without one change and all others as they are. The two take turns, so that what else the machine does meets both; time
is of the process on a CPU and of the device on a GPU. Single operations stand for changes that pick another kernel.
What picks the same kernel as before on this device is not in the table.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.common import Out, Row, machine_line, median, output_folder, progress, publish, run_command, seconds_of
from benchmarks.workload import ChunkPass, ModelSpec, model_config
from engine.kv.selection import importance
from models.attention import attention_backend, folded
from models.checkpoint import Loading
from models.errors import InputError
from models.magi.config import ModelConfig
from models.magi.layers import Fp8Linear, product_in_fp32
from models.magi.pipeline import random_dit, random_pipeline
from models.magi.vae import TiledVAE

_DECODED = (6, 40, 40)  # latents that are decoded
_TOKENS, _KEYS = 6 * 13 * 13, 3  # tokens of a chunk, chunks attended to

Run = Callable[[], object]
Change = tuple[str, Run, Run]
"""What it is; a call without it, and one with it."""


def changes(dtype: torch.dtype, device: torch.device, *, compiled: bool = True) -> Iterator[Change]:
    """The changes that this device shows, each as it is asked for; `compiled` needs a compiler."""
    config = model_config(ModelSpec(layers=8, width=512, head=64, dtype=str(dtype), side=208))
    loading = Loading(device=str(device))
    now = ChunkPass(random_dit(config, loading), config, _KEYS)
    yield "texts, gates, positions: once, not in every pass", now.anew, now
    apart = random_dit(config, loading).to(device)  # to move a model undoes what was worked out of its weights
    yield "one product for q, qx, k, v; norms' gains at loading", ChunkPass(apart, config, _KEYS), now
    if compiled:
        regions = random_dit(config, replace(loading, compiled=True))
        yield "--compile: two regions of a layer", now, ChunkPass(regions, config, _KEYS)
    autoencoder = random_pipeline(config, replace(loading, layers=range(1))).autoencoder
    assert isinstance(autoencoder, TiledVAE)
    latents = torch.randn(1, 16, *_DECODED, device=device)
    tiles = autoencoder.decode_grid(*_DECODED)
    yield (
        f"{len(tiles)} tiles decoded together, not one by one",
        lambda: [autoencoder.decode_tiles(latents, [tile]) for tile in tiles],
        lambda: autoencoder.decode_tiles(latents, tiles),
    )
    if dtype == torch.bfloat16:
        yield from _operations(config.model_config, device)


def _operations(shapes: ModelConfig, device: torch.device) -> Iterator[Change]:
    """What picks kernels of 16 bits or fewer."""
    hidden, heads, groups = shapes.hidden_size, shapes.num_attention_heads, shapes.num_query_groups
    size = shapes.kv_channels
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    fp8, x = Fp8Linear(hidden, 4 * hidden).to(device), draw(_TOKENS, hidden)

    def in_fp32() -> Tensor:
        y = F.linear(fp8.quantise(x).float(), fp8.weight[0].float())
        return (y * (fp8.input_scale[:1] * fp8.weight_scale)).bfloat16()

    yield "an fp8 layer: no fp32 copies of its weights", in_fp32, lambda: fp8(x)
    if device.type == "cpu":  # the others pick the same kernels there as before
        return
    y, w = draw(_TOKENS, 2 * hidden), draw(hidden, 2 * hidden)
    yield (
        "output projection: bf16 operands, fp32 result",
        lambda: F.linear(y.float(), w.float()),
        lambda: product_in_fp32(y, w),
    )
    q, k, v = draw(1, _TOKENS, heads, size), *(draw(1, _KEYS * _TOKENS, groups, size) for _ in range(2))
    attend = attention_backend("sdpa")
    yield "attention: grouped heads as they are, not folded", lambda: folded(q, k, v), lambda: attend(q, k, v)
    yield (
        "--kv-queries chunk: scores by bf16 products",
        lambda: importance(q[0].float(), k[0].float()),
        lambda: importance(q[0], k[0]),
    )


def compare(change: Change, device: torch.device, rounds: int) -> Row:
    """Both ways of a change in turn; after one call of each that is not counted."""
    what, *ways = change
    turns = progress(range(rounds + 1), what, rounds + 1)
    times = [[seconds_of(way, device, time.process_time) for way in ways] for _ in turns][1:]
    without, with_it = ([pair[index] for pair in times] for index in range(2))
    return {
        "change": what,
        "without: ms": 1e3 * median(without),
        "with: ms": 1e3 * median(with_it),
        "ratio": median(new / old for old, new in times),
        "least ratio": min(new / old for old, new in times),
        "most": max(new / old for old, new in times),
    }


@torch.no_grad()
def main(
    out: Out = Path("results/hot_path"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of calls.")] = 9,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure --compile; needs a compiler.")
    ] = True,
) -> int:
    """Measure each change to the hot path alone."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"there is no device {device!r} here: choose cpu, or cuda on a machine with a GPU")
    folder = output_folder(out)
    torch.manual_seed(0)
    where = torch.device(device)
    found: dict[str, list[Row]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype).removeprefix("torch.")] = [
            compare(change, where, rounds) for change in changes(dtype, where, compiled=compiled)
        ]
    about = f"{machine_line()}. {rounds} pairs a change, medians; a ratio below one is a gain."
    data: list[Row] = [{"dtype": dtype, **row} for dtype, rows in found.items() for row in rows]
    return publish(folder, "hot_path", title="Changes to the hot path", about=about, sections=found, data=data)


if __name__ == "__main__":
    sys.exit(run_command(main, "hot_path"))
