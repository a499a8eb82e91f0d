"""Does magi-pocket do what prompts say? Makes videos of many prompts and measures them.

    python -m benchmarks.pocket_quality --out results/pocket_quality

The same prompts are made again with KV budgets, where the direction counts. Figures with thresholds come first: status
0 if all are met, 1 if not, 2 for bad input. The others are there to be read, and the contact sheet to be looked at.
`benchmarks.adherence` says how each is measured.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import common
from benchmarks.adherence import CHUNK, Adherence, adherence, scene_of
from benchmarks.common import Out, Row, Verdict, median
from benchmarks.workload import MOST_PROMPTS, Weights, pocket_pipeline, pocket_requests
from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.request import Request
from models.pocket.words import COLOURS, MOTIONS, SHAPES

# What the project holds itself to.
_COLOUR, _DIRECTION, _SHAPE, _WHOLE, _PACED, _PIXELS, _SEAM = 0.98, 0.98, 0.9, 0.85, 0.8, 2.0, 1.3
_DIRECTION_COMPRESSED = 0.95
_TITLE = "magi-pocket: do videos show what their prompts say?"
_CAPTION, _HEADER, _GAP = 225, 34, 4  # pixels of the contact sheet: left of a row, above all, around a frame
_RIGHT, _WRONG = "#222222", "#c00000"
_INCH = 75  # pixels of the sheet per inch of the figure, which makes a line of 7 points a sixth of a row


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """One row of the contact sheet; all have the same frames."""

    frames: Tensor  # uint8 [N, H, W, 3], those of `sampled_frames`
    measured: Adherence
    seconds: float  # that making the video took


def run(
    prompts: Annotated[int, typer.Option(min=1, max=MOST_PROMPTS, help="How many prompts.")] = 100,
    chunks: Annotated[int, typer.Option(min=2, help="Length of each video, in chunks of 24 frames.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of all noise.")] = 9001,
    kv_budget: Annotated[list[int] | None, typer.Option(min=0, help="Budgets too; 0 for none. [default: 2, 4]")] = None,
    weights: Weights = None,
    out: Out = Path("results/pocket_quality"),
) -> int:
    """Make videos of many prompts with magi-pocket and measure whether they show what was asked for."""
    common.output_folder(out)
    pipeline = pocket_pipeline(weights)
    num_steps = pipeline.config.runtime_config.num_steps
    requests = pocket_requests(prompts, chunks=chunks, num_steps=num_steps, seed=seed)
    strips = measure(make_videos(Engine(pipeline), requests), prompts)
    compressed = dict[int, list[Adherence]]()
    for budget in filter(None, (2, 4) if kv_budget is None else kv_budget):
        videos = make_videos(Engine(pipeline, kv=KVSettings(budget=budget)), requests)
        compressed[budget] = [strip.measured for strip in measure(videos, prompts, f"videos, KV budget {budget}")]
    seconds = statistics.fmean(strip.seconds for strip in strips)
    source = f"{prompts} prompts, {chunks} chunks each, {num_steps} steps, seed {seed}, {seconds:.2f} s a video"
    return report(out, strips, source, compressed)


def make_videos(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[str, Tensor, float]]:
    """Prompt, frames [F, 64, 64, 3] in uint8 and seconds, one video after the other."""
    for one in requests:
        began = time.perf_counter()
        frames = torch.cat([chunk.frames for chunk in engine.generate(one) if chunk.frames is not None])
        yield one.prompt, frames, time.perf_counter() - began


def measure(videos: Iterable[tuple[str, Tensor, float]], count: int, what: str = "videos") -> list[Strip]:
    """Measure videos as they come; only the frames that the sheet shows stay in memory."""
    return [
        Strip(frames=frames[sampled_frames(len(frames))], measured=adherence(frames, scene_of(prompt)), seconds=seconds)
        for prompt, frames, seconds in common.progress(videos, what, count)
    ]


def report(
    out: Path, strips: Sequence[Strip], source: str, compressed: Mapping[int, Sequence[Adherence]] | None = None
) -> int:
    """Write and print what was measured, also with KV budgets; the exit status."""
    measured = [strip.measured for strip in strips]
    return common.publish(
        out,
        "pocket_quality",
        title=_TITLE,
        about=f"{source}. {common.machine_line()}.",
        verdicts=verdicts(measured, compressed or {}),
        sections={"By word": by_word(measured)},
        data=[video_row(one) for one in measured],
        figures={"contact_sheet": contact_sheet(strips, f"{_TITLE}   {source}")},
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them do not exceed (nearest rank); infinite ones count."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def verdicts(measured: Sequence[Adherence], compressed: Mapping[int, Sequence[Adherence]]) -> list[Verdict]:
    """The figures over all videos, those with thresholds first; not a number meets none."""

    def share(right: Callable[[Adherence], float]) -> str:
        return f"{100 * statistics.fmean(right(one) for one in measured):.1f} %"

    def at_least(
        name: str, right: Callable[[Adherence], float], least: float, videos: Sequence[Adherence] = measured
    ) -> Verdict:
        found = statistics.fmean(right(one) for one in videos)
        return Verdict(name, f"{100 * found:.1f} %", f">= {100 * least:.1f} %", found >= least)

    def at_most(name: str, value: float, most: float, unit: str = "") -> Verdict:
        return Verdict(name, f"{value:.2f}{unit}", f"<= {most:.2f}{unit}", value <= most)

    errors = [error for one in measured for error in one.boundary_errors]
    deviations, strays = [one.deviation for one in measured], [100 * one.stray for one in measured]
    seams = [one.chunk_seam for one in measured if one.boundary_errors]
    tiles = [one.tile_seam for one in measured if not math.isnan(one.tile_seam)]
    asked = [motion == one.scene.motion for one in measured for motion in one.chunk_motions]
    middle, worst = "median", "90th percentile"
    return [
        at_least("colour right", lambda m: m.colour_right, _COLOUR),
        at_least("direction right", lambda m: m.motion_right, _DIRECTION),
        *(
            at_least(f"direction right, KV budget {budget}", lambda m: m.motion_right, _DIRECTION_COMPRESSED, videos)
            for budget, videos in compressed.items()
        ),
        at_least("shape right", lambda m: m.shape_right, _SHAPE),
        at_least("one whole object of the right shape", lambda m: m.whole, _WHOLE),
        at_least("steps between frames at the right pace", lambda m: m.paced, _PACED),
        at_most("error after a chunk boundary, median", median(errors), _PIXELS, " px"),
        at_most(f"change at chunk boundaries over that inside, {middle}", median(seams), _SEAM),
        Verdict(f"change at chunk boundaries over that inside, {worst}", f"{percentile(seams, 0.9):.2f}"),
        Verdict(f"change at 12-frame tile boundaries over that inside, {middle}", f"{median(tiles):.2f}"),
        Verdict(f"error after a chunk boundary, {worst}", f"{percentile(errors, 0.9):.2f} px"),
        Verdict(f"distance from one line at worst, {middle}", f"{median(deviations):.2f} px"),
        Verdict(f"distance from one line at worst, {worst}", f"{percentile(deviations, 0.9):.2f} px"),
        Verdict("single chunks that move as asked", f"{100 * statistics.fmean(asked):.1f} %"),
        Verdict("frames with one compact object", share(lambda m: m.found)),
        Verdict("overlap with the prompt's shape, mean", f"{statistics.fmean(m.overlap for m in measured):.2f}"),
        Verdict(f"colour outside the object, {middle}", f"{median(strays):.1f} %"),
        Verdict(f"colour outside the object, {worst}", f"{percentile(strays, 0.9):.1f} %"),
    ]


def by_word(measured: Sequence[Adherence]) -> list[Row]:
    """How many videos are right, for each word of the prompts that came up."""
    rows: list[Row] = []
    for word in (*COLOURS, *SHAPES, *MOTIONS):
        these = [m for m in measured if word in (m.scene.colour, m.scene.shape, m.scene.motion)]
        if these:
            row: Row = {"word": word, "videos": len(these)}
            row["colour right"] = sum(m.colour_right for m in these)
            row["direction right"] = sum(m.motion_right for m in these)
            row["shape right"] = sum(m.shape_right for m in these)
            row["boundary error, median (px)"] = round(median(error for m in these for error in m.boundary_errors), 2)
            rows.append(row)
    return rows


def video_row(one: Adherence) -> Row:
    """One video as a row of the CSV."""
    errors = one.boundary_errors or (math.nan,)
    row: Row = {"prompt": one.scene.prompt, "colour": one.colour, "colour_share": one.colour_share}
    row |= {"motion": one.motion, "velocity_x": one.velocity[0], "velocity_y": one.velocity[1]}
    row |= {"chunks_as_asked": sum(motion == one.scene.motion for motion in one.chunk_motions)}
    row |= {"paced": one.paced, "shape": one.shape, "overlap": one.overlap, "stray": one.stray, "found": one.found}
    row |= {"boundary_error_mean": statistics.fmean(errors), "boundary_error_max": max(errors)}
    names = ("deviation", "chunk_seam", "tile_seam", "colour_right", "motion_right", "shape_right", "whole")
    return row | {name: getattr(one, name) for name in names}


def sampled_frames(count: int) -> list[int]:
    """Frames to show of a video of `count`: first, middle and last of every chunk."""
    return [frame for frame in range(count) if frame % CHUNK in (0, CHUNK // 2, CHUNK - 1)]


def contact_sheet(strips: Sequence[Strip], title: str) -> Figure:
    """Draw a row for each video; a dark line stands between frames of different chunks."""
    frames = F.pad(torch.stack([strip.frames for strip in strips]), (0, 0, *[_GAP // 2] * 4), value=255)
    rows, count, height, width, _ = frames.shape
    canvas = frames.transpose(1, 2).reshape(rows * height, count * width, 3)
    size = (_CAPTION + canvas.shape[1]) / _INCH, (_HEADER + canvas.shape[0]) / _INCH
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas.numpy(), interpolation="nearest", aspect="auto")
    axes.set(xlim=(-_CAPTION, canvas.shape[1]), ylim=(canvas.shape[0], -_HEADER))
    axes.text(8 - _CAPTION, 5 - _HEADER, title, fontsize=9, fontweight="bold", va="top")
    for place, frame in enumerate(sampled_frames(CHUNK * count)[:count]):
        axes.text((place + 0.5) * width, -3, str(frame), fontsize=7.5, ha="center", va="bottom", color="#555555")
        if place and frame % CHUNK == 0:
            axes.vlines(place * width, 0, canvas.shape[0], color="#222222", linewidth=1.5)
    for row, strip in enumerate(strips):
        text, right = _caption(strip.measured)
        middle = (row + 0.5) * height
        axes.text(8 - _CAPTION, middle, text, fontsize=7, color=_RIGHT if right else _WRONG, va="center")
    return figure


def _caption(one: Adherence) -> tuple[str, bool]:
    """What stands beside a row: prompt, colour and motion, shape, boundaries; and whether all is as asked."""
    x, y = one.velocity
    joined = max(one.boundary_errors, default=0.0) <= _PIXELS
    lines = (
        (one.scene.prompt, True),
        (f"{one.colour or 'no colour'} {one.colour_share:.0%}", one.colour_right),
        (f"{one.motion or 'unclear'} {x:+.2f}, {y:+.2f} px/frame", one.motion_right),
        (f"{one.shape or 'no shape'}, overlap {one.overlap:.2f}, stray {one.stray:.0%}", one.shape_right),
        (f"boundaries {' '.join(f'{error:.1f}' for error in one.boundary_errors) or 'none'} px", joined),
    )
    text = "\n".join(line if right else f"\N{BALLOT X} {line}" for line, right in lines)
    return text, all(right for _, right in lines)


if __name__ == "__main__":
    sys.exit(common.run_command(run, "pocket_quality"))
