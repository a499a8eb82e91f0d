"""What the memory is worth: does a camera that turns see the same landmarks again?

    python -m benchmarks.memory_recall --out results/memory_recall

magi-pocket pans over a world of 256 pixels at one pixel a frame, so a turn takes 10.7 chunks, and a landmark is out of
sight for longer than the model's own range reaches. Measured are the whole history, the model's own range, and KV
budgets by what is kept as one and by score. Each seed is a process of one thread, as many at once as there are cores.
Exit status 0 if the best score at a budget of 4 chunks recalls at least 0.8 of what the whole history does after two
turns, and twice what the own range does; 1 if not, 2 for bad input.

The middle column of every frame is one column of the world further than the one before. These columns, side by side,
are a picture of the world, `WORLD` columns for every turn. A landmark is a connected run of its columns in which most
coloured pixels are nearest to one colour in hue. It has come back a number of turns later if there is one of the same
colour whose centre lies within 4 pixels on both axes of where it should be, and whose outline is the same: soft
intersection over union of the coverages at least 0.6, centres aligned. Shapes: F frames, S = SIDE pixels.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, get_args

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import common
from benchmarks.adherence import CHUNK, chroma, coverage, hues
from benchmarks.common import Out, Row, Verdict
from benchmarks.workload import Weights, pocket_pipeline, pocket_reuse
from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.kv.selection import Granularity, Score, SelectionSettings
from engine.machine import settle_heap
from engine.progress import Progress
from engine.request import Request
from launch.options import CacheName
from models.pocket.clips import SIDE, WORLD
from models.pocket.words import COLOURS, PANS, Panorama

BUDGETS = (1, 2, 4)
SHOWN = (1, 2, 5)  # turns after which recall is in the tables
_NEAR, _OVERLAP = 4.0, 0.6  # pixels and overlap of outlines within which a landmark is the same
_THIN = 3  # coloured pixels of a column that belongs to a landmark, at least
_LEAST = 60  # coloured pixels of a landmark, at least; a whole one has about 400
_REACH = 24  # pixels around a landmark's centre that are compared
_BUDGET, _AFTER, _OF_FULL, _OF_RANGE = 4, 2, 0.8, 2.0  # what the project holds itself to: chunks, turns, shares
_TITLE = "What the memory is worth: recall over turns of a camera"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """How much of the past is held: a budget in chunks, or the whole history, or the model's own range."""

    budget: int | None = None
    whole: bool = False
    retention: Granularity = "token"
    score: Score = "flowcache"

    @property
    def memory(self) -> str:
        """In words."""
        return "whole history" if self.whole else "own range" if self.budget is None else f"budget {self.budget}"

    @property
    def kind(self) -> str:
        """What is kept as one, and by which score."""
        return f"{self.score}, {self.retention}" if self.budget else self.memory

    def kv(self, chunks: int) -> KVSettings:
        """For a video of so many chunks; a budget of all of them drops nothing."""
        selection = SelectionSettings(retention=self.retention, score=self.score)
        return KVSettings(budget=chunks if self.whole else self.budget, selection=selection)


WHOLE, RANGE = Case(whole=True), Case()


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of a case with one seed."""

    case: Case
    panorama: Tensor  # uint8 [S, F, 3], the first frame on the left
    mirrored: bool  # the camera pans left, so the world is the picture's mirror image
    recalls: tuple[Recall, ...]  # after 1, 2, ... turns
    kv_bytes: int
    seconds: float  # of each chunk, decoding included

    def turn(self, number: int) -> Tensor:
        """The world as it was seen in one turn, uint8 [S, WORLD, 3]."""
        seen = self.panorama[:, number * WORLD : (number + 1) * WORLD]
        return seen.flip(1) if self.mirrored else seen


def run(
    turns: Annotated[int, typer.Option(min=1, max=100, help="How often the camera comes round again.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Videos of each case.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="The first one.")] = 3,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="In chunks, for 1, 2 and 4.")] = None,
    cache: Annotated[CacheName, typer.Option(help="Preset of reuse.")] = "flowcache-slow",
    weights: Weights = None,
    quick: Annotated[bool, typer.Option(help="One turn in 4 steps, few cases: to try the command.")] = False,
    out: Out = Path("results/memory_recall"),
) -> int:
    """Make panoramas with more and less memory, and count the landmarks that come back."""
    common.output_folder(out)
    turns, seeds, chosen = (1, 1, cases([1])[:3]) if quick else (turns, seeds, cases(budget or BUDGETS))
    numbers = range(seed, seed + seeds)
    workers = min(seeds, common.cores())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = pool.map(partial(make, chosen, turns, 4 if quick else 16, cache, weights), numbers)
        made = [one for some in common.progress(waiting, "seeds", seeds) for one in some]
    source = f"{seeds} videos of each case, seeds {numbers[0]} to {numbers[-1]}, {turns} turns, --cache {cache}"
    return report(out, made, f"{source}. {common.machine_line()}, one thread each.")


def cases(budgets: Sequence[int]) -> list[Case]:
    """What is compared: no compression, then budgets by what is kept as one, and by score."""
    kinds: list[tuple[Granularity, Score]] = [("token", score) for score in get_args(Score)]
    kinds += [("frame", "flowcache"), ("chunk", "flowcache"), ("frame", "even")]
    held = [Case(budget=b, retention=unit, score=score) for b, (unit, score) in product(budgets, kinds)]
    return [WHOLE, RANGE, *held]


def make(
    cases: Sequence[Case], turns: int, steps: int, cache: CacheName, weights: Path | None, seed: int
) -> list[Made]:
    """Make one video of each case, in a process that is there for it."""
    settle_heap()  # as the command line does
    torch.set_num_threads(1)
    pipeline = pocket_pipeline(weights)
    chunks = math.ceil(((turns + 1) * WORLD + SIDE) / CHUNK)  # the last landmark is seen to its end
    prompt = Panorama(motion=PANS[seed % len(PANS)]).prompt
    request = Request(prompt=prompt, chunks=chunks, height=SIDE, width=SIDE, num_steps=steps, seed=seed)
    made, reuse = list[Made](), pocket_reuse(cache)
    for case in cases:
        engine, seen, began = Engine(pipeline, kv=case.kv(chunks), reuse=reuse), list[Progress](), time.perf_counter()
        slits = [slit_scan(chunk.frames) for chunk in engine.generate(request, seen.append) if chunk.frames is not None]
        seconds, picture = time.perf_counter() - began, torch.cat(slits, dim=1)
        engine.close()
        found = landmarks(picture)
        made.append(
            Made(
                case=case,
                panorama=picture,
                mirrored=prompt.endswith("left"),
                recalls=tuple(recall(found, turn) for turn in range(1, turns + 1)),
                kv_bytes=seen[-1].kv_bytes,
                seconds=seconds / chunks,
            )
        )
    return made


def report(out: Path, made: Sequence[Made], source: str) -> int:
    """Write and print what was measured; the exit status."""
    known = dict.fromkeys(one.case for one in made)
    about = "After so many turns, the share of the first turn's landmarks that are there again; `invented`, after two, "
    about += "are those that were not there in the first turn, as a share of all that are seen."
    return common.publish(
        out,
        "memory_recall",
        title=_TITLE,
        about=f"{source}\n\n{about}",
        verdicts=verdicts(made),
        sections={"Recall": [row(case, [one for one in made if one.case == case]) for case in known]},
        figures={
            "recall_over_bytes": over_bytes(made),
            "recall_over_turns": over_turns(made),
            "panoramas": panoramas(made),
        },
    )


def pooled(made: Sequence[Made], case: Case, turn: int) -> Recall:
    """The recall of all videos of a case, after so many turns or as many as there are."""
    each = [one.recalls[min(turn, len(one.recalls)) - 1] for one in made if one.case == case]
    return Recall(
        seen=sum(one.seen for one in each), again=sum(one.again for one in each), found=sum(one.found for one in each)
    )


def row(case: Case, made: Sequence[Made]) -> Row:
    """A case as a line of the table."""
    cells: Row = {"memory": case.memory, "kept": case.kind if case.budget else "all of it"}
    for turn in shown_turns(made):
        cells[f"after_{turn}"] = pooled(made, case, turn).share
    last = pooled(made, case, _AFTER)
    cells |= {"landmarks": last.seen, "invented": 1 - last.again / last.found if last.found else math.nan}
    cells["KV_MB"] = made[0].kv_bytes / 1e6
    return cells | {"seconds_a_chunk": common.median(one.seconds for one in made)}


def shown_turns(made: Sequence[Made]) -> list[int]:
    """Turns that tables and pictures have."""
    return [turn for turn in SHOWN if turn <= len(made[0].recalls)]


def best(made: Sequence[Made], budget: int) -> Case | None:
    """What recalls most at a budget; None where it was not measured."""
    held = [case for case in dict.fromkeys(one.case for one in made) if case.budget == budget]
    return max(held, key=lambda case: pooled(made, case, _AFTER).share, default=None)


def verdicts(made: Sequence[Made]) -> list[Verdict]:
    """The figures that the project holds itself to, at its default and at the best there is."""
    whole, own = (pooled(made, case, _AFTER).share for case in (WHOLE, RANGE))
    found, after = [], f"after {min(_AFTER, len(made[0].recalls))} turns"
    chosen = best(made, _BUDGET)
    for case in dict.fromkeys(one for one in (chosen, Case(budget=_BUDGET)) if one is not None):
        share = pooled(made, case, _AFTER).share
        if math.isnan(share):
            continue
        name, held = f"{case.memory} ({case.kind})", case == chosen
        over, times = f"{share:.2f} of {whole:.2f}", f"{share:.2f} against {own:.2f}"
        enough, twice = share >= _OF_FULL * whole, share >= _OF_RANGE * own and share > 0
        of_whole, of_own = (f"{name}, {what}, {after}" for what in ("whole history's recall", "own range's recall"))
        found.append(Verdict(of_whole, over, f">= {_OF_FULL} of it" * held, enough if held else None))
        found.append(Verdict(of_own, times, f">= {_OF_RANGE:g} x" * held, twice if held else None))
    return found


def over_bytes(made: Sequence[Made]) -> Figure:
    """Recall after two turns over the size of the buffers, a line for each score and for each unit of retention."""
    figure, axes = common.new_plot(_TITLE, "keys and values (MB)", f"recall after {_AFTER} turns")
    for kind in dict.fromkeys(one.case.kind for one in made):
        held = {one.case: one.kv_bytes / 1e6 for one in made if one.case.kind == kind}
        shares = [pooled(made, case, _AFTER).share for case in held]
        alone = kind in (WHOLE.kind, RANGE.kind)
        marker, colour = ("s" if kind == RANGE.kind else "*", "black") if alone else ("o", None)
        axes.plot(list(held.values()), shares, label=kind, marker=marker, color=colour)
    sizes = sorted({one.kv_bytes / 1e6 for one in made})
    axes.set(ylim=(-0.03, 1.03), xlim=(0.8 * sizes[0], 1.25 * sizes[-1]), xscale="log")
    axes.set_xticks(sizes, [f"{size:.1f}" for size in sizes])
    axes.set_xticks([], minor=True)
    common.legend_below(figure, axes, 4)
    return figure


def over_turns(made: Sequence[Made]) -> Figure:
    """Recall over turns, of no compression and of a budget of four chunks."""
    figure, axes = common.new_plot(_TITLE, "turns", "recall")
    turns = range(1, len(made[0].recalls) + 1)
    for case in dict.fromkeys(one.case for one in made if one.case.budget in (None, _BUDGET)):
        name = case.kind if case.budget is None else f"{case.memory}: {case.kind}"
        colour, line = (None, "-") if case.budget else ("black", "-" if case.whole else ":")
        shares = [pooled(made, case, turn).share for turn in turns]
        axes.plot(turns, shares, marker="o", label=name, color=colour, linestyle=line)
    axes.set(ylim=(-0.03, 1.03), xticks=list(turns))
    common.legend_below(figure, axes, 3)
    return figure


def panoramas(made: Sequence[Made]) -> Figure:
    """The world of the first seed, turn by turn, by how much of the past was held."""
    wanted = [RANGE, *(case for case in (Case(budget=_BUDGET), best(made, _BUDGET)) if case is not None), WHOLE]
    first = {one.case: one for one in reversed(made)}
    columns = [first[case] for case in dict.fromkeys(wanted) if case in first]
    turns = [0, *shown_turns(made)]
    figure = Figure(figsize=(3.6 * len(columns), 1.05 * len(turns) + 0.3), layout="constrained")
    plots = figure.subplots(len(turns), len(columns), squeeze=False)
    for (line, turn), (place, one) in product(enumerate(turns), enumerate(columns)):
        axes = plots[line][place]
        axes.imshow(one.turn(turn).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        if not line:
            case = one.case
            axes.set_title(case.memory + (f": {case.kind}" if case.budget else ""), fontsize=9)
        if not place:
            axes.set_ylabel(f"turn {turn}", fontsize=9)
    return figure


# ---- landmarks of a panorama


@dataclass(frozen=True, kw_only=True, slots=True)
class Landmark:
    """One thing in a panorama."""

    colour: int
    x: float  # of its centre, in columns from the first frame on
    y: float
    outline: Tensor  # coverage [2 * _REACH, 2 * _REACH] around the centre


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """What of the first turn's landmarks is there some turns later."""

    seen: int  # landmarks of the first turn
    again: int  # of them, those that have come back
    found: int  # landmarks of the later turn

    @property
    def share(self) -> float:
        """0..1; not a number where there was nothing to remember."""
        return self.again / self.seen if self.seen else float("nan")


def slit_scan(frames: Tensor) -> Tensor:
    """The middle columns of frames [F, S, S, 3] as one picture [S, F, 3]."""
    return frames[:, :, SIDE // 2].transpose(0, 1)


def landmarks(picture: Tensor) -> list[Landmark]:
    """Those of a picture, uint8 [S, F, 3], from left to right; what its ends cut off is left out."""
    field = chroma(picture.float() / 255)
    hue = hues(field)
    counts = torch.stack([(hue == colour).sum(0) for colour in range(len(COLOURS))])  # [colours, F]
    best = torch.where(counts.sum(0) >= _THIN, counts.argmax(0), -1).tolist()
    found, start = [], 0
    for colour, run in groupby(best):
        stop = start + len(list(run))
        if colour >= 0 and start > 0 and stop < len(best) and counts[colour, start:stop].sum() >= _LEAST:
            found.append(_landmark(field, hue, colour, start, stop))
        start = stop
    return found


def _landmark(field: Tensor, hue: Tensor, colour: int, start: int, stop: int) -> Landmark:
    cover = torch.where(hue == colour, coverage(field, list(COLOURS)[colour]), 0)
    cover[:, :start] = 0
    cover[:, stop:] = 0
    x = (cover.sum(0) * torch.arange(cover.shape[1])).sum() / cover.sum()
    y = (cover.sum(1) * torch.arange(cover.shape[0])).sum() / cover.sum()
    around = F.pad(cover, [_REACH] * 4)
    top, left = round(y.item()), round(x.item())
    return Landmark(
        colour=colour,
        x=x.item(),
        y=y.item(),
        outline=around[top : top + 2 * _REACH, left : left + 2 * _REACH].clone(),
    )


def same(one: Landmark, other: Landmark, *, apart: float = 0.0) -> bool:
    """Whether two landmarks are the same, the other one so many columns further."""
    near = abs(other.x - one.x - apart) <= _NEAR and abs(other.y - one.y) <= _NEAR
    if one.colour != other.colour or not near:
        return False
    both, any_ = torch.minimum(one.outline, other.outline).sum(), torch.maximum(one.outline, other.outline).sum()
    return (both / any_).item() >= _OVERLAP


def recall(found: Sequence[Landmark], turn: int) -> Recall:
    """How many of the first turn's landmarks have come back `turn` turns later."""
    first, later = ([one for one in found if begin <= one.x < begin + WORLD] for begin in (0, turn * WORLD))
    again = [one for one in first if any(same(one, other, apart=turn * WORLD) for other in found)]
    return Recall(seen=len(first), again=len(again), found=len(later))


if __name__ == "__main__":
    sys.exit(common.run_command(run, "memory_recall"))
