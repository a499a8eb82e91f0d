"""magi-pocket's autoencoder alone: true clips, encoded and decoded.

    python -m benchmarks.pocket_autoencoder

Clips of every pace are drawn, encoded and decoded as the engine does it, and compared as the frames that are seen, of
256 levels. Status 0 if it comes to 34 dB, if the change from frame to frame inside a latent frame is within a fifth of
the true one, and if that into a new tile or chunk is at most 1.2 times that inside; 1 if not, 2 for bad input.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks import common
from benchmarks.adherence import CHUNK, TILE
from benchmarks.common import Out, Row, Verdict
from benchmarks.workload import Weights, pocket_pipeline
from models.pocket.clips import Panoramas, Shapes, draw_panoramas, draw_shapes
from models.pocket.words import PACES, RESTS
from models.protocols import CELL_FRAMES, Autoencoder

_DECIBEL, _INSIDE, _BORDER = 34.0, 0.2, 1.2  # what the project holds itself to


def run(
    clips: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 24,
    chunks: Annotated[int, typer.Option(min=2, help="Length of each, in chunks of 24 frames.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the clips.")] = 9001,
    weights: Weights = None,
    out: Out = Path("results/pocket_autoencoder"),
) -> int:
    """Encode and decode true clips, and measure what is lost."""
    common.output_folder(out)
    autoencoder = pocket_pipeline(weights).autoencoder
    rows = [row(name, drawn, autoencoder, chunks) for name, drawn in kinds(clips, seed)]
    return common.publish(
        out,
        "pocket_autoencoder",
        title="magi-pocket's autoencoder alone",
        about=f"{clips} clips of each kind, {chunks} chunks, seed {seed}. Changes are of 256 levels. "
        f"{common.machine_line()}.",
        verdicts=verdicts(rows),
        sections={"By kind of clip": rows},
    )


def kinds(count: int, seed: int) -> Iterator[tuple[str, Shapes | Panoramas]]:
    """What the DiT is trained on: objects of every pace, and panoramas."""
    generator = torch.Generator().manual_seed(seed)
    for pace in PACES:
        yield f"objects {pace}".strip(), draw_shapes(count, 1, generator, varied=False, pace=pace)
        if pace != RESTS:
            yield f"panorama {pace}".strip(), draw_panoramas(count, generator, pace=pace)


def row(name: str, drawn: Shapes | Panoramas, autoencoder: Autoencoder, chunks: int) -> Row:
    """What one kind of clip comes to."""
    pixels = (drawn.frames(chunks * CHUNK) + 1) * 127.5
    true = pixels.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
    return {"clips": name} | figures(true, torch.stack([_coded(autoencoder, clip, chunks) for clip in true]))


def _coded(autoencoder: Autoencoder, clip: Tensor, chunks: int) -> Tensor:
    decode, latents = autoencoder.stream(), autoencoder.encode(clip)
    return torch.cat([decode(chunk) for chunk in latents.chunk(chunks, dim=2)])


def figures(true: Tensor, decoded: Tensor) -> Row:
    """PSNR, and mean absolute change into a frame by its place; clips [N, frames, H, W, 3] uint8."""
    error = (decoded.float() - true.float()).square().mean().item()
    found: Row = {"PSNR dB": 10 * math.log10(255**2 / max(error, 1e-9))}
    true_change, change = (_changes(video) for video in (true, decoded))
    for place in ("inside", "new latent frame", "new tile", "new chunk"):
        found[place] = change[place]
    return found | {"true": statistics.fmean(true_change.values())}


def _changes(video: Tensor) -> dict[str, float]:
    change = video.float().diff(dim=1).abs().mean((0, 2, 3, 4))
    places: dict[str, list[float]] = {}
    for frame, value in enumerate(change.tolist(), 1):
        sizes = {"new chunk": CHUNK, "new tile": TILE, "new latent frame": CELL_FRAMES}
        place = next((name for name, size in sizes.items() if not frame % size), "inside")
        places.setdefault(place, []).append(value)
    return {place: statistics.fmean(values) for place, values in places.items()}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The means over all kinds of clip against what is wanted."""

    def mean(name: str) -> float:
        return statistics.fmean(float(row[name] or 0) for row in rows)

    inside = mean("inside") / mean("true")
    found = [
        Verdict("PSNR", f"{mean('PSNR dB'):.1f} dB", f">= {_DECIBEL:.0f} dB", mean("PSNR dB") >= _DECIBEL),
        Verdict(
            "change inside a latent frame over the true one",
            f"{inside:.2f}",
            f"{1 - _INSIDE:.1f} to {1 + _INSIDE:.1f}",
            abs(inside - 1) <= _INSIDE,
        ),
    ]
    for place in ("new tile", "new chunk"):
        ratio = mean(place) / max(mean("inside"), 1e-9)
        found.append(
            Verdict(f"change into a {place} over that inside", f"{ratio:.2f}", f"<= {_BORDER}", ratio <= _BORDER)
        )
    return found


if __name__ == "__main__":
    sys.exit(common.run_command(run, "pocket_autoencoder"))
