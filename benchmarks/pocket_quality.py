"""Does magi-pocket do what prompts say? Makes videos of many prompts and measures them.

    python -m benchmarks.pocket_quality --out results/pocket_quality

Colour, direction and jumps at chunk borders have thresholds: exit status 0 if all are met, 1 if not, 2 for bad input.
The other figures are there to be read, and the contact sheet to be looked at. `benchmarks.adherence` says how each is
measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.adherence import Adherence, adherence
from benchmarks.contact_sheet import Strip, contact_sheet, sampled_frames
from benchmarks.prompts import balanced_scenes
from benchmarks.report import csv_text, machine_line, markdown_table, output_folder, run_app, save_figure, save_text
from benchmarks.summary import COLUMNS, WORD_COLUMNS, by_word, csv_row, figures
from engine.engine import Engine
from engine.request import Request
from models.errors import InputError
from models.magi.pipeline import Loading, load_pipeline
from models.pocket.clips import SIDE
from models.pocket.preset import pocket_config
from models.pocket.words import Scene, parse_prompt

_SEEDS = 1000  # of noise per seed of the benchmark, so that two runs share none

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """What is measured."""

    frames: Tensor  # uint8 [F, 64, 64, 3]
    scene: Scene  # what was asked for
    seed: int  # of the noise
    seconds: float  # that making it took


@app.command()
def run(
    prompts: Annotated[int, typer.Option(min=1, max=_SEEDS, help="How many prompts.")] = 60,
    chunks: Annotated[int, typer.Option(min=2, help="Length of each video, in chunks of 24 frames.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of all noise.")] = 9001,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's own by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder of weights, in place of those that ship.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/pocket_quality"),
    keep_frames: Annotated[bool, typer.Option("--keep-frames", help="Save the frames of all videos too.")] = False,
    frames_from: Annotated[
        Path | None, typer.Option(help="Measure frames that an earlier run has kept; make no videos.")
    ] = None,
) -> None:
    """Make videos of many prompts with magi-pocket and measure whether they show what was asked for."""
    output_folder(out)
    keep = output_folder(out / "frames") if keep_frames else None
    if keep is not None and any(keep.iterdir()):
        raise InputError(f"{keep} holds frames of another run: remove it, or choose another folder with --out")
    if frames_from is None:
        config = pocket_config()
        num_steps = steps or config.runtime_config.num_steps
        engine = Engine(load_pipeline(config, weights, Loading()))
        videos = make_videos(engine, balanced_scenes(prompts, seed), chunks, seed * _SEEDS, num_steps)
        count = prompts
        source = f"{prompts} prompts, {chunks} chunks each, {num_steps} steps, seed {seed}"
    else:
        kept = sorted(frames_from.glob("*.safetensors"))
        if not kept:
            raise InputError(f"no frames in {frames_from}: give the folder `frames` of a run with --keep-frames")
        videos, count, source = map(_read_video, kept), len(kept), f"{len(kept)} videos from {frames_from}"
    strips, seconds = _measure(videos, count, keep)
    if frames_from is None:
        source += f", {seconds / count:.2f} s a video"
    raise typer.Exit(0 if _write(out, strips, source) else 1)


def make_videos(
    engine: Engine, scenes: Sequence[Scene], chunks: int, first_seed: int, num_steps: int
) -> Iterator[Video]:
    """Make a video of each scene, one after the other, with seeds from `first_seed` on."""
    for i, scene in enumerate(scenes):
        request = Request(
            prompt=scene.prompt, chunks=chunks, height=SIDE, width=SIDE, num_steps=num_steps, seed=first_seed + i
        )
        began = time.perf_counter()
        frames = torch.cat([chunk.frames for chunk in engine.generate(request)])
        yield Video(frames=frames, scene=scene, seed=request.seed, seconds=time.perf_counter() - began)


def _keep_video(folder: Path, index: int, video: Video) -> None:
    about = {"prompt": video.scene.prompt, "seed": str(video.seed)}
    save_file({"frames": video.frames.contiguous()}, folder / f"{index:03}.safetensors", metadata=about)


def _read_video(path: Path) -> Video:
    try:
        with safe_open(path, framework="pt") as file:
            about, frames = file.metadata() or {}, file.get_tensor("frames")
            scene, seed = parse_prompt(about["prompt"]), int(about["seed"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a video that this benchmark has kept: {error}") from None
    return Video(frames=frames, scene=scene, seed=seed, seconds=0.0)


def _measure(videos: Iterable[Video], count: int, keep: Path | None) -> tuple[list[Strip], float]:
    """Measure the videos as they come; only the frames that the sheet shows stay in memory.

    Returns:
        a strip for each video, and the seconds that making all of them took.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    strips, seconds = [], 0.0
    with Progress(*columns, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task("videos", total=count)
        for i, video in enumerate(videos):
            if keep is not None:
                _keep_video(keep, i, video)
            measured = adherence(video.frames, video.scene)
            shown = sampled_frames(len(video.frames))
            strips.append(Strip(frames=video.frames[list(shown)], shown=shown, measured=measured))
            seconds += video.seconds
            bar.update(task, advance=1, description=_tally([strip.measured for strip in strips]))
    return strips, seconds


def _tally(measured: Sequence[Adherence]) -> str:
    colour, motion = sum(m.colour_right for m in measured), sum(m.motion_right for m in measured)
    return f"colour {colour}/{len(measured)}, direction {motion}/{len(measured)}"


def _write(out: Path, strips: Sequence[Strip], source: str) -> bool:
    """Write Markdown, CSV and contact sheet, and print the tables; tells whether all thresholds are met."""
    measured = [strip.measured for strip in strips]
    result = figures(measured)
    table = markdown_table(("figure", "measured", "wanted", "verdict"), [figure.row for figure in result])
    words = markdown_table(WORD_COLUMNS, by_word(measured))
    title = "magi-pocket: do videos show what their prompts say?"
    save_text(out / "pocket_quality.md", f"# {title}\n\n{source}. {machine_line()}.\n\n{table}\n\n{words}\n")
    save_text(out / "pocket_quality.csv", csv_text(COLUMNS, [csv_row(one) for one in measured]))
    save_figure(out / "contact_sheet.png", contact_sheet(strips, f"{title}   {source}"))
    typer.echo(f"{source}\n\n{table}\n\n{words}\n\nwritten to {out}")
    return all(figure.passed is not False for figure in result)


if __name__ == "__main__":
    sys.exit(run_app(app, "pocket_quality"))
