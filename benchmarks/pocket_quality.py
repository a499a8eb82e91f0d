"""Does magi-pocket do what prompts say? Makes videos of many prompts and measures them.

    python -m benchmarks.pocket_quality --out results/pocket_quality

Colour, direction and jumps at chunk boundaries have thresholds: status 0 if all are met, 1 if not, 2 for bad input.
The other figures are there to be read, and the contact sheet to be looked at. `benchmarks.adherence` says how each is
measured.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.adherence import Adherence, adherence
from benchmarks.common import (
    Cell,
    Verdict,
    columns,
    machine_line,
    markdown_table,
    median,
    output_folder,
    progress_bar,
    publish,
    run_app,
)
from benchmarks.models import balanced_scenes, pocket_request
from engine.engine import Engine
from models.errors import InputError
from models.magi.pipeline import Loading, load_pipeline
from models.pocket.preset import pocket_config
from models.pocket.words import COLOURS, MOTIONS, SHAPES, Scene, parse_prompt

_SEEDS = 1000  # of noise per seed of the benchmark, so that two runs share none
_COLOUR, _DIRECTION, _PIXELS = 0.9, 0.8, 2.0  # what the project holds itself to
_CHUNK = 24  # frames
# Pixels of the contact sheet: caption, header, gaps between frames, chunks and rows; where a caption's lines begin.
_CAPTION, _HEADER, _GAP, _BOUNDARY_GAP, _ROW_GAP = 225, 34, 2, 8, 8
_COLUMNS = (10, 90)
_RIGHT, _WRONG = "#222222", "#c00000"
_INCH = 75  # pixels of the sheet per inch of the figure, which makes a line of 7.5 points a sixth of a row

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """What is measured."""

    frames: Tensor  # uint8 [F, 64, 64, 3]
    scene: Scene  # what was asked for
    seed: int  # of the noise
    seconds: float  # that making it took


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """One row of the contact sheet."""

    frames: Tensor  # uint8 [N, H, W, 3], the video's frames `shown`
    shown: tuple[int, ...]  # their numbers, rising
    measured: Adherence


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
    raise typer.Exit(_write(out, strips, source))


def make_videos(
    engine: Engine, scenes: Sequence[Scene], chunks: int, first_seed: int, num_steps: int
) -> Iterator[Video]:
    """Make a video of each scene, one after the other, with seeds from `first_seed` on."""
    for i, scene in enumerate(scenes):
        request = pocket_request(scene.prompt, chunks=chunks, num_steps=num_steps, seed=first_seed + i)
        began = time.perf_counter()
        frames = torch.cat([chunk.frames for chunk in engine.generate(request) if chunk.frames is not None])
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
    strips: list[Strip] = []
    seconds = 0.0
    with progress_bar() as bar:
        task = bar.add_task("videos", total=count)
        for i, video in enumerate(videos):
            if keep is not None:
                _keep_video(keep, i, video)
            shown = sampled_frames(len(video.frames))
            measured = adherence(video.frames, video.scene)
            strips.append(Strip(frames=video.frames[list(shown)], shown=shown, measured=measured))
            seconds += video.seconds
            right = [sum(getattr(one.measured, name) for one in strips) for name in ("colour_right", "motion_right")]
            tally = f"colour {right[0]}/{len(strips)}, direction {right[1]}/{len(strips)}"
            bar.update(task, advance=1, description=tally)
    return strips, seconds


def _write(out: Path, strips: Sequence[Strip], source: str) -> int:
    measured = [strip.measured for strip in strips]
    title = "magi-pocket: do videos show what their prompts say?"
    return publish(
        out,
        "pocket_quality",
        title=title,
        about=f"{source}. {machine_line()}.",
        verdicts=verdicts(measured),
        sections={"By word": markdown_table(*columns(by_word(measured)))},
        data=columns([video_row(one) for one in measured]),
        figures={"contact_sheet": contact_sheet(strips, f"{title}   {source}")},
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them do not exceed (nearest rank); infinite ones count."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def verdicts(measured: Sequence[Adherence]) -> list[Verdict]:
    """The figures over all videos, those with thresholds first; not a number meets none."""

    def share(right: Callable[[Adherence], float]) -> str:
        return f"{100 * statistics.fmean(right(one) for one in measured):.1f} %"

    def at_least(name: str, right: Callable[[Adherence], bool], least: float) -> Verdict:
        passed = statistics.fmean(right(one) for one in measured) >= least
        return Verdict(name, share(right), f">= {100 * least:.1f} %", passed)

    errors = [error for one in measured for error in one.boundary_errors]
    deviations, strays = [one.deviation for one in measured], [100 * one.stray for one in measured]
    seams = [one.chunk_seam for one in measured if one.boundary_errors]
    tiles = [one.tile_seam for one in measured if not math.isnan(one.tile_seam)]
    asked = [motion == one.scene.motion for one in measured for motion in one.chunk_motions]
    error = median(errors)
    middle, worst = "median", "90th percentile"
    return [
        at_least("colour right", lambda m: m.colour_right, _COLOUR),
        at_least("direction right", lambda m: m.motion_right, _DIRECTION),
        Verdict("error after a chunk boundary, median", f"{error:.2f} px", f"<= {_PIXELS:.2f} px", error <= _PIXELS),
        Verdict(f"error after a chunk boundary, {worst}", f"{percentile(errors, 0.9):.2f} px"),
        Verdict(f"distance from one line at worst, {middle}", f"{median(deviations):.2f} px"),
        Verdict(f"distance from one line at worst, {worst}", f"{percentile(deviations, 0.9):.2f} px"),
        Verdict("single chunks that move as asked", f"{100 * statistics.fmean(asked):.1f} %"),
        Verdict("frames with one compact object", share(lambda m: m.found)),
        Verdict("shape right", share(lambda m: m.shape_right)),
        Verdict("overlap with the prompt's shape, mean", f"{statistics.fmean(m.overlap for m in measured):.2f}"),
        Verdict("one whole object of the right shape", share(lambda m: m.whole)),
        Verdict(f"colour outside the object, {middle}", f"{median(strays):.1f} %"),
        Verdict(f"colour outside the object, {worst}", f"{percentile(strays, 0.9):.1f} %"),
        Verdict(f"change at chunk boundaries over that inside, {middle}", f"{median(seams):.2f}"),
        Verdict(f"change at chunk boundaries over that inside, {worst}", f"{percentile(seams, 0.9):.2f}"),
        Verdict(f"change at 12-frame tile boundaries over that inside, {middle}", f"{median(tiles):.2f}"),
    ]


def by_word(measured: Sequence[Adherence]) -> list[dict[str, Cell]]:
    """How many videos are right, for each word of the prompts that came up."""
    rows: list[dict[str, Cell]] = []
    for word in (*COLOURS, *SHAPES, *MOTIONS):
        these = [m for m in measured if word in (m.scene.colour, m.scene.shape, m.scene.motion)]
        if these:
            row: dict[str, Cell] = {"word": word, "videos": len(these)}
            row["colour right"] = sum(m.colour_right for m in these)
            row["direction right"] = sum(m.motion_right for m in these)
            row["shape right"] = sum(m.shape_right for m in these)
            row["boundary error, median (px)"] = round(median(error for m in these for error in m.boundary_errors), 2)
            rows.append(row)
    return rows


def video_row(one: Adherence) -> dict[str, Cell]:
    """One video as a row of the CSV."""
    errors = one.boundary_errors or (math.nan,)
    row: dict[str, Cell] = {"prompt": one.scene.prompt, "colour": one.colour, "colour_share": one.colour_share}
    row |= {"motion": one.motion, "velocity_x": one.velocity[0], "velocity_y": one.velocity[1]}
    row |= {"chunks_as_asked": sum(motion == one.scene.motion for motion in one.chunk_motions)}
    row |= {"shape": one.shape, "overlap": one.overlap, "stray": one.stray, "found": one.found}
    row |= {"boundary_error_mean": statistics.fmean(errors), "boundary_error_max": max(errors)}
    names = ("deviation", "chunk_seam", "tile_seam", "colour_right", "motion_right", "shape_right", "whole")
    return row | {name: getattr(one, name) for name in names}


def sampled_frames(count: int) -> tuple[int, ...]:
    """Frames to show of a video of `count`: first, middle and last of every chunk."""
    places = (0, _CHUNK // 2, _CHUNK - 1)
    return tuple(first + place for first in range(0, count, _CHUNK) for place in places if first + place < count)


def contact_sheet(strips: Sequence[Strip], title: str) -> Figure:
    """Draw the sheet, as wide as the longest video needs; a dark line stands between frames of different chunks.

    Args:
        strips: the rows, all with the same frames but for those past a shorter video's end.
        title: one line above.
    """
    shown = max((strip.shown for strip in strips), key=len)
    height, width = strips[0].frames.shape[1:3]
    lefts, boundaries, x = [], [], _CAPTION
    for i, frame in enumerate(shown):
        if i and frame // _CHUNK != shown[i - 1] // _CHUNK:
            x += _BOUNDARY_GAP
            boundaries.append(x - (_BOUNDARY_GAP + _GAP) / 2)
        lefts.append(x)
        x += width + _GAP
    pitch = height + _ROW_GAP
    canvas = torch.full((_HEADER + pitch * len(strips), x + _ROW_GAP, 3), 255, dtype=torch.uint8)
    for row, strip in enumerate(strips):
        top = _HEADER + row * pitch
        for left, image in zip(lefts, strip.frames, strict=False):
            canvas[top : top + height, left : left + width] = image

    figure = Figure(figsize=(canvas.shape[1] / _INCH, canvas.shape[0] / _INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas.numpy(), interpolation="nearest", aspect="auto")
    axes.text(_ROW_GAP, 5, title, fontsize=9, fontweight="bold", va="top")
    for left, frame in zip(lefts, shown, strict=True):
        axes.text(left + width / 2, _HEADER - 3, str(frame), fontsize=7.5, ha="center", va="bottom", color="#555555")
    for boundary in boundaries:
        axes.plot([boundary, boundary], [_HEADER, canvas.shape[0]], color="#222222", linewidth=1.5)
    for row, strip in enumerate(strips):
        _caption(axes, row, _HEADER + row * pitch, height, strip.measured)
    return figure


def _caption(axes: Axes, row: int, top: int, height: int, measured: Adherence) -> None:
    """Four lines: prompt, colour and motion, shape, boundaries; in red and crossed where they are not as asked."""
    x, y = measured.velocity
    errors = " ".join(f"{error:.1f}" for error in measured.boundary_errors)
    joined = max(measured.boundary_errors, default=0.0) <= _PIXELS
    right = measured.colour_right and measured.motion_right and measured.shape_right and joined
    if not right:
        axes.add_patch(Rectangle((1, top), 4, height, color=_WRONG))
    colour = f"{measured.colour or 'no colour'} {measured.colour_share:.0%}"
    motion = f"{measured.motion or 'unclear'}  {x:+.2f}, {y:+.2f} px/frame"
    shape = f"overlap {measured.overlap:.2f}, stray {measured.stray:.0%}"
    lines: tuple[tuple[tuple[str, bool], ...], ...] = (
        ((f"{row + 1}  {measured.scene.prompt}", right),),
        ((colour, measured.colour_right), (motion, measured.motion_right)),
        ((measured.shape or "no shape", measured.shape_right), (shape, True)),
        (("boundaries", joined), (f"{errors or 'none'} px", joined)),
    )
    for i, line in enumerate(lines):
        for left, (text, good) in zip(_COLUMNS, line, strict=False):
            axes.text(
                left,
                top + height * (i + 0.5) / len(lines),
                text if good or not i else f"\N{BALLOT X} {text}",
                fontsize=7.5 if i else 8.5,
                fontweight="normal" if i else "bold",
                color=_RIGHT if good else _WRONG,
                va="center",
            )


if __name__ == "__main__":
    sys.exit(run_app(app, "pocket_quality"))
