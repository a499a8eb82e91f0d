"""Does a camera that turns see the same landmarks again? Measures panoramas of magi-pocket from decoded frames.

At a pace of one pixel a frame the middle column of every frame is one column of the world further than the one before.
These columns, side by side, are a picture of the world, `WORLD` columns for every turn. A landmark is a connected run
of its columns in which most coloured pixels are nearest to one colour in hue. It has come back a number of turns later
if there is one of the same colour whose centre lies within 4 pixels on both axes of where it should be, and whose
outline is the same: soft intersection over union of the coverages at least 0.6, centres aligned.

Nothing here makes videos. Shapes: F frames, S = SIDE pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.adherence import chroma, coverage, hues
from models.pocket.clips import SIDE, WORLD
from models.pocket.words import COLOURS

NEAR = 4.0  # pixels
OVERLAP = 0.6
_THIN = 3  # coloured pixels of a column that belongs to a landmark, at least
_LEAST = 60  # coloured pixels of a landmark, at least; a whole one has about 400
_REACH = 24  # pixels around a landmark's centre that are compared


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
    near = abs(other.x - one.x - apart) <= NEAR and abs(other.y - one.y) <= NEAR
    if one.colour != other.colour or not near:
        return False
    both, any_ = torch.minimum(one.outline, other.outline).sum(), torch.maximum(one.outline, other.outline).sum()
    return (both / any_).item() >= OVERLAP


def recall(found: Sequence[Landmark], turn: int) -> Recall:
    """How many of the first turn's landmarks have come back `turn` turns later."""
    first, later = ([one for one in found if begin <= one.x < begin + WORLD] for begin in (0, turn * WORLD))
    again = [one for one in first if any(same(one, other, apart=turn * WORLD) for other in found)]
    return Recall(seen=len(first), again=len(again), found=len(later))
