"""The picture at the head of the README: `python -m benchmarks.showcase --out docs/images`.

Two objects, and one panorama made twice: as the model's own range has it, and with a KV budget. Below them is which
steps of the first video were computed and which reused. An animated WebP of a few hundred kilobytes.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import Out, output_folder, run_command
from engine.files import atomic_write
from engine.record import RunRecord
from launch.api import load
from launch.options import CacheName
from launch.plots.record import reuse_figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One of the videos."""

    prompt: str
    budget: int | None = None  # chunks, of an even share of every chunk of the past, by frames
    note: str = ""


SHOWN = (
    Shown(prompt="a red circle moving right"),
    Shown(prompt="a blue square moving up"),
    Shown(prompt="panning right", note="sees 5 chunks, forgets"),
    Shown(prompt="panning right", budget=4, note="KV budget 4, remembers"),
)
_SIDE, _GAP, _CAPTION = 160, 12, 40  # pixels of a video's side, between videos, and below one
_WIDTH = len(SHOWN) * (_SIDE + _GAP) - _GAP
_MAPPED = 6  # seconds of the first video whose steps are drawn
_SHOWN_FPS = 12  # every other frame


def make(seconds: float, seed: int, cache: CacheName, folder: Path) -> list[NDArray[np.uint8]]:
    """Frames [F, H, W, 3] of each, and a record of the first in `folder`."""
    videos = []
    for place, one in enumerate(SHOWN):
        score, retention = ("even", "frame") if one.budget else (None, None)
        with load("magi-pocket", cache=cache, kv_budget=one.budget, kv_score=score, kv_retention=retention) as engine:
            made = engine.generate(one.prompt, seconds=seconds, seed=seed)
            videos.append(np.concatenate([chunk.frames for chunk in made]))
            if not place:
                engine.save(one.prompt, folder / "video.mp4", record=folder / "run", seconds=_MAPPED, seed=seed)
    return videos


def pictures(videos: Sequence[NDArray[np.uint8]], record: RunRecord) -> list[Image.Image]:
    """One picture for every other frame: the videos with their prompts, and the map of the record."""
    drawn = io.BytesIO()
    figure = reuse_figure(record)
    figure.savefig(drawn, format="png", dpi=_WIDTH / figure.get_figwidth())
    steps = Image.open(drawn).convert("RGB")
    page = Image.new("RGB", (_WIDTH, _SIDE + _CAPTION + _GAP + steps.height), "white")
    page.paste(steps, (0, _SIDE + _CAPTION + _GAP))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    lefts = range(0, _WIDTH, _SIDE + _GAP)
    for left, one in zip(lefts, SHOWN, strict=True):
        for line, text in enumerate((one.prompt, one.note)):
            draw.text((left + _SIDE / 2, _SIDE + 12 + 16 * line), text, "#222222", font, anchor="mm")
    found = []
    for frames in zip(*(video[::2] for video in videos), strict=True):
        found.append(page.copy())
        for left, frame in zip(lefts, frames, strict=True):
            found[-1].paste(Image.fromarray(frame).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (left, 0))
    return found


def main(
    out: Out = Path("results/showcase"),
    seconds: Annotated[float, typer.Option(min=1, help="Length of the videos; a turn of the camera takes 10.7.")] = 21,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise of all of them.")] = 8,
    cache: Annotated[CacheName, typer.Option(help="Preset of reuse.")] = "flowcache-slow",
) -> int:
    """Make the picture of four videos and of one's computed and reused steps."""
    folder = output_folder(out)
    with tempfile.TemporaryDirectory() as scratch:
        videos = make(seconds, seed, cache, Path(scratch))
        shown = pictures(videos, RunRecord.load(Path(scratch) / "run"))
    path, each = folder / "showcase.webp", round(1000 / _SHOWN_FPS)
    with atomic_write(path) as file:
        first, *others = shown
        first.save(file, "WEBP", save_all=True, append_images=others, duration=each, loop=0, quality=30, method=4)
    typer.echo(f"{path}: {len(shown)} frames of {first.width}x{first.height}, {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "showcase"))
