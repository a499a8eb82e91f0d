"""Does a video of magi-pocket show what its prompt says? One function, `adherence`, measures it from decoded frames.

Nothing here makes videos: the frames may come from the engine at any setting, from a file, or from procedural clips.

How each figure is measured:

- Colour: the colour that most coloured pixels of the video are nearest to in hue.
- Motion: the object's centre in every frame is the circular mean of its pixels on the torus. A robust line (Theil-Sen)
  through all frames gives the velocity, and `tracking.direction` names it.
- Boundary error: the same kind of line through the chunk before a border is extended across it. The error is the mean
  distance, on the torus, between it and the object in the first 4 frames after the border. It is infinite where there
  is no object to measure.
- Deviation: the largest distance of any frame from the line through the whole video.
- Shape: the drawn shape with the best mean overlap; `overlap` is that of the prompt's shape. `stray` is the share of
  the colour that lies outside the outline of the best shape.
- Seams: mean absolute change from frame to frame across borders, relative to that between the other frames.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.tracking import Track, direction, fit_line, shape_overlap, stray_share, track, wrap
from models.pocket.words import SHAPES, Scene

AFTER = 4  # frames after a border that are compared with the extended line
_LEAST = 0.5  # share of the frames that must show an object before a line is fitted
_WHOLE_OVERLAP, _WHOLE_STRAY = 0.8, 0.05
_GREY_LEVEL = 0.25  # levels of 255, added to both sides of a seam's ratio: a still video changes by nothing at all


@dataclass(frozen=True, kw_only=True, slots=True)
class Adherence:
    """What was measured in one video, beside what was asked for."""

    scene: Scene
    colour: str | None
    colour_share: float
    motion: str | None
    velocity: tuple[float, float]  # pixels per frame; nan if there is no object
    chunk_motions: tuple[str | None, ...]
    border_errors: tuple[float, ...]  # pixels, one per border between chunks
    deviation: float  # pixels
    shape: str | None
    overlap: float  # 0..1
    stray: float  # 0..1
    found: float  # share of the frames with one compact object
    chunk_seam: float  # 1: no seam
    tile_seam: float

    @property
    def colour_right(self) -> bool:
        """The prompt's colour was seen most."""
        return self.colour == self.scene.colour

    @property
    def motion_right(self) -> bool:
        """The object moved as asked."""
        return self.motion == self.scene.motion

    @property
    def shape_right(self) -> bool:
        """The prompt's shape fits best."""
        return self.shape == self.scene.shape

    @property
    def whole(self) -> bool:
        """One object of the right shape in every frame: overlap at least 0.8, at most 5% of the colour outside it."""
        return self.shape_right and self.overlap >= _WHOLE_OVERLAP and self.stray <= _WHOLE_STRAY


def adherence(frames: Tensor, scene: Scene, *, chunk_frames: int = 24, tile_frames: int = 12) -> Adherence:
    """Measure a video against its prompt.

    Args:
        frames: [F, 64, 64, 3] uint8, F at least 2.
        scene: what the prompt asked for.
        chunk_frames: frames of a chunk.
        tile_frames: frames that the autoencoder decodes at a time.

    Raises:
        ValueError: `frames` has another shape or dtype.
    """
    seen = track(frames)
    count = len(frames)
    borders = range(chunk_frames, count, chunk_frames)
    motions = tuple(_motion(seen, first, min(first + chunk_frames, count)) for first in range(0, count, chunk_frames))
    velocity, deviation = _whole_motion(seen)
    overlaps = shape_overlap(seen)
    best = int(overlaps.argmax()) if seen.found.any() else None
    shape = None if best is None else SHAPES[best]
    return Adherence(
        scene=scene,
        colour=seen.colour,
        colour_share=seen.colour_share,
        motion=None if velocity.isnan().any() else direction(velocity),
        velocity=(velocity[0].item(), velocity[1].item()),
        chunk_motions=motions,
        border_errors=tuple(_border_error(seen, border, chunk_frames) for border in borders),
        deviation=deviation,
        shape=shape,
        overlap=overlaps[SHAPES.index(scene.shape)].item(),
        stray=stray_share(seen, shape or scene.shape),
        found=seen.found.float().mean().item(),
        chunk_seam=_seam(frames, borders, tile_frames),
        tile_seam=_seam(frames, set(range(tile_frames, count, tile_frames)) - set(borders), tile_frames),
    )


def _points(seen: Track, first: int, end: int, *, least: float) -> tuple[Tensor, Tensor] | None:
    """Times and centres of the frames first .. end-1 that show an object; None if fewer than the share `least` do."""
    times = first + seen.found[first:end].nonzero()[:, 0]
    if len(times) < max(2, math.ceil(least * (end - first))):
        return None
    return times.float(), seen.centre[times]


def _motion(seen: Track, first: int, end: int) -> str | None:
    points = _points(seen, first, end, least=_LEAST)
    return direction(fit_line(*points).velocity) if points else None


def _whole_motion(seen: Track) -> tuple[Tensor, float]:
    """Velocity [2] over the whole video, and the largest distance from its line."""
    points = _points(seen, 0, len(seen.found), least=_LEAST)
    if points is None:
        return torch.full((2,), torch.nan), math.inf
    times, centres = points
    line = fit_line(times, centres)
    return line.velocity, wrap(centres - line.at(times)).norm(dim=1).max().item()


def _border_error(seen: Track, border: int, chunk_frames: int) -> float:
    before = _points(seen, border - chunk_frames, border, least=_LEAST)
    after = _points(seen, border, min(border + AFTER, len(seen.found)), least=_LEAST)
    if before is None or after is None:
        return math.inf
    times, centres = after
    return wrap(centres - fit_line(*before).at(times)).norm(dim=1).mean().item()


def _seam(frames: Tensor, borders: Collection[int], tile_frames: int) -> float:
    """Mean absolute change into the frames `borders`, over that into frames at no border; nan without borders."""
    if not borders:
        return math.nan
    change = frames.float().diff(dim=0).abs().mean((1, 2, 3))  # [F - 1], into frame i + 1
    inside = [i for i in range(len(change)) if (i + 1) % tile_frames]
    at = change[[border - 1 for border in borders]].mean().item()
    return (at + _GREY_LEVEL) / (change[inside].mean().item() + _GREY_LEVEL)
