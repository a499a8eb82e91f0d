"""Does a video of magi-pocket show what its prompt says? One function, `adherence`, measures it from decoded frames.

Nothing here makes videos: the frames may come from the engine at any setting, from a file, or from procedural clips.
All measuring is plain arithmetic on pixels, so the same frames always give the same figures.

How each figure is measured:

- Colour: the colour that most coloured pixels of the video are nearest to in hue.
- Motion: the object's centre in every frame is the circular mean of its pixels on the torus. A robust line (Theil-Sen)
  through all frames gives the velocity, and `direction` names it.
- Boundary error: the same kind of line through the chunk before a boundary is extended across it. The error is the mean
  distance, on the torus, between it and the object in the first 4 frames after the boundary. It is infinite where there
  is no object to measure.
- Pace: the share of the steps from a frame to the next that lie within a quarter of the speed from what was asked for,
  in both axes together; standing still, within a quarter of a pixel. A step without an object at both ends is wrong.
  It is not a number where the prompt asks for rests, as nobody says when they are.
- Deviation: the largest distance of any frame from the line through the whole video.
- Shape: the drawn shape with the best mean overlap; `overlap` is that of the prompt's shape. `stray` is the share of
  the colour that lies outside the outline of the best shape.
- Seams: mean absolute change from frame to frame across boundaries, relative to that between the other frames.

Shapes: F frames, S = SIDE pixels, K shapes, P sub-pixel phases per axis. Positions are (x, y) in pixels on a torus.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import InputError
from models.pocket.clips import RADIUS, SIDE, Objects, render
from models.pocket.words import COLOURS, MOTIONS, RESTS, SHAPES, SPEEDS, Scene, parse_prompt

CHUNK, TILE = 24, 12  # frames that are made as one chunk, and that the autoencoder decodes at a time
AFTER = 4  # frames after a boundary that are compared with the extended line
_LEAST = 0.5  # share of the frames that must show an object before a line is fitted
_WHOLE_OVERLAP, _WHOLE_STRAY = 0.8, 0.05
_GREY_LEVEL = 0.25  # levels of 255, added to both sides of a seam's ratio: a still video changes by nothing at all
_SEEN = 0.25  # chroma from which a pixel counts as coloured; the six colours have 0.58 to 0.77, grey has 0
_FAINT = 0.2  # coverage below this is taken for noise
_MIN_AREA = 60.0  # pixels; a whole object has about 400
_MIN_COMPACT = 0.5  # a whole object has about 0.85, two of them 20 pixels apart 0.5, evenly spread noise 0
_PACE = 0.25  # of the speed that was asked for
_STILL, _MOVING = 0.25, 0.5  # pixels per frame; the clips have 0 and 1
_MAX_ANGLE = math.radians(30)
_PHASES = 8
_MARGIN = 2  # pixels around the outline that still belong to the object


@dataclass(frozen=True, kw_only=True, slots=True)
class Adherence:
    """What was measured in one video, beside what was asked for."""

    scene: Scene
    colour: str | None
    colour_share: float
    motion: str | None
    velocity: tuple[float, float]  # pixels per frame; nan if there is no object
    chunk_motions: tuple[str | None, ...]
    boundary_errors: tuple[float, ...]  # pixels, one per boundary between chunks
    paced: float  # 0..1, of the steps from frame to frame
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


def scene_of(prompt: str) -> Scene:
    """What a prompt asks for; an `InputError` if it is not of one object, which alone is measured."""
    scene = parse_prompt(prompt)
    if not isinstance(scene, Scene):
        raise InputError(f"{prompt!r} shows no single object, so nothing can be measured in it")
    return scene


def adherence(frames: Tensor, scene: Scene) -> Adherence:
    """Measure a video, uint8 [F >= 2, SIDE, SIDE, 3], against its prompt; a ValueError if its shape is another."""
    seen = track(frames)
    count = len(frames)
    boundaries = range(CHUNK, count, CHUNK)
    motions = tuple(_motion(seen, first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))
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
        boundary_errors=tuple(_boundary_error(seen, boundary) for boundary in boundaries),
        paced=_paced(seen, scene),
        deviation=deviation,
        shape=shape,
        overlap=overlaps[SHAPES.index(scene.shape)].item(),
        stray=stray_share(seen, shape or scene.shape),
        found=seen.found.float().mean().item(),
        chunk_seam=_seam(frames, boundaries),
        tile_seam=_seam(frames, set(range(TILE, count, TILE)) - set(boundaries)),
    )


def _points(seen: Track, first: int, end: int) -> tuple[Tensor, Tensor] | None:
    """Times and centres of the frames first .. end-1 that show an object; None if fewer than half of them do."""
    times = first + seen.found[first:end].nonzero()[:, 0]
    if len(times) < max(2, math.ceil(_LEAST * (end - first))):
        return None
    return times.float(), seen.centre[times]


def _motion(seen: Track, first: int, end: int) -> str | None:
    points = _points(seen, first, end)
    return direction(fit_line(*points).velocity) if points else None


def _whole_motion(seen: Track) -> tuple[Tensor, float]:
    """Velocity [2] over the whole video, and the largest distance from its line."""
    points = _points(seen, 0, len(seen.found))
    if points is None:
        return torch.full((2,), torch.nan), math.inf
    times, centres = points
    line = fit_line(times, centres)
    return line.velocity, wrap(centres - line.at(times)).norm(dim=1).max().item()


def _paced(seen: Track, scene: Scene) -> float:
    if scene.pace == RESTS:
        return math.nan
    speed = SPEEDS[scene.pace] if scene.motion != "still" else 0.0
    asked = speed * torch.tensor(MOTIONS[scene.motion], dtype=torch.float32)
    off = (wrap(seen.centre.diff(dim=0)) - asked).norm(dim=1)  # nan without an object
    return (off <= _PACE * (speed or 1)).float().mean().item()


def _boundary_error(seen: Track, boundary: int) -> float:
    before = _points(seen, boundary - CHUNK, boundary)
    after = _points(seen, boundary, min(boundary + AFTER, len(seen.found)))
    if before is None or after is None:
        return math.inf
    times, centres = after
    return wrap(centres - fit_line(*before).at(times)).norm(dim=1).mean().item()


def _seam(frames: Tensor, boundaries: Collection[int]) -> float:
    """Mean absolute change into the frames `boundaries`, over that into other frames; nan without boundaries."""
    if not boundaries:
        return math.nan
    change = frames.float().diff(dim=0).abs().mean((1, 2, 3))  # [F - 1], into frame i + 1
    inside = [i for i in range(len(change)) if (i + 1) % TILE]
    at = change[[boundary - 1 for boundary in boundaries]].mean().item()
    return (at + _GREY_LEVEL) / (change[inside].mean().item() + _GREY_LEVEL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """The object of one clip, frame by frame."""

    colour: str | None  # None: nothing coloured was seen
    colour_share: float  # of the coloured pixels of all frames, those nearest to `colour`
    coverage: Tensor  # [F, S, S] in 0..1
    centre: Tensor  # [F, 2], 0..SIDE; nan where no compact object was found
    found: Tensor  # [F] bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Motion at constant velocity."""

    velocity: Tensor  # [2], pixels per frame
    origin: Tensor  # [2], where it is at time 0

    def at(self, times: Tensor) -> Tensor:
        """Positions [N, 2] at `times` [N], not wrapped."""
        return self.origin + self.velocity * times[:, None]


def track(frames: Tensor) -> Track:
    """Find the object in every frame of a video, uint8 [F, SIDE, SIDE, 3]."""
    if frames.dtype != torch.uint8 or frames.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"frames must be uint8 [F, {SIDE}, {SIDE}, 3], not {frames.dtype} {list(frames.shape)}")
    field = chroma(frames.float() / 255)
    colour, share = _dominant_colour(field)
    covered = coverage(field, colour)
    centre, compact = _centres(covered)
    found = ((covered > 0.5).sum((1, 2)) >= _MIN_AREA) & (compact >= _MIN_COMPACT)
    centre = torch.where(found[:, None], centre, torch.nan)
    return Track(colour=colour, colour_share=share, coverage=covered, centre=centre, found=found)


def wrap(offset: Tensor) -> Tensor:
    """The shortest offset on the torus, -SIDE/2 .. SIDE/2, per axis."""
    return torch.remainder(offset + SIDE / 2, SIDE) - SIDE / 2


def fit_line(times: Tensor, centres: Tensor) -> Line:
    """Constant velocity by the Theil-Sen estimator, per axis: the median of the slopes of all pairs of frames.

    Up to 29% of the frames may be anywhere without moving the result far. Times [N] are frame numbers, rising, N >= 2;
    centres [N, 2] are on the torus, none of them nan.
    """
    steps = wrap(centres.diff(dim=0))
    path = torch.cat([centres[:1], centres[0] + steps.cumsum(0)])
    a, b = torch.triu_indices(len(times), len(times), offset=1)
    velocity = ((path[b] - path[a]) / (times[b] - times[a])[:, None]).quantile(0.5, dim=0)
    origin = (path - velocity * times[:, None]).quantile(0.5, dim=0)
    return Line(velocity=velocity, origin=origin)


def direction(velocity: Tensor) -> str | None:
    """Name a velocity [2]: still below 0.25 px/frame; left, right, up or down from 0.5 on and within 30 degrees.

    None between these, so that a drift or a diagonal is right for no prompt.
    """
    x, y = velocity.tolist()
    speed = math.hypot(x, y)
    if speed < _STILL:
        return "still"
    along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
    if speed < _MOVING or math.atan2(across, along) > _MAX_ANGLE:
        return None
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def shape_overlap(seen: Track) -> Tensor:
    """How well each shape, drawn at the object's centre, fits: [K], in the order of SHAPES.

    A frame's figure is the soft intersection over union of coverages, sum(min) / sum(max), which falls with a wrong
    outline, with blur and with stray pixels. The mean is over all frames; a frame without an object counts as 0.
    """
    aligned, templates = _aligned(seen)
    overlap = torch.minimum(aligned, templates).sum((-2, -1)) / torch.maximum(aligned, templates).sum((-2, -1))
    return overlap.sum(1) / len(seen.found)


def stray_share(seen: Track, shape: str) -> float:
    """Share of the coloured coverage of all frames that lies more than 2 pixels outside the outline of `shape`.

    Streaks, doubles and holes in the background's grey show here. It is 1 if there is no object.
    """
    aligned, templates = _aligned(seen)
    size = 2 * _MARGIN + 1
    grown = F.max_pool2d(templates[SHAPES.index(shape), :, None], size, stride=1, padding=_MARGIN)[:, 0]
    total = seen.coverage.sum().item()
    inside = torch.where(grown > _FAINT, aligned, 0).sum().item()
    return max(0.0, 1 - inside / total) if total else 1.0


def chroma(rgb: Tensor) -> Tensor:
    """Colour as a complex number, R + G w + B w^2 with w a third of a turn: its angle is the hue, its size the chroma.

    It is linear and 0 for grey, so over grey it is proportional to how much of the pixel the object covers.
    """
    turn = 2 * math.pi / 3
    angles = torch.tensor([0.0, turn, -turn])
    return torch.complex(rgb @ angles.cos(), rgb @ angles.sin())


def _palette() -> Tensor:
    return chroma(torch.tensor(list(COLOURS.values())))


def hues(field: Tensor) -> Tensor:
    """Of pixels by their chroma, which of `COLOURS` is nearest in hue; -1 where a pixel is not coloured."""
    nearest = (field[..., None] * _palette().conj()).angle().abs().argmin(-1)
    return torch.where(field.abs() > _SEEN, nearest, -1)


def _dominant_colour(field: Tensor) -> tuple[str | None, float]:
    """The colour that most coloured pixels are nearest to in hue, and their share."""
    hue = hues(field)
    votes = torch.bincount(hue[hue >= 0], minlength=len(COLOURS))
    best = int(votes.argmax())
    return (list(COLOURS)[best], votes[best].item() / int(votes.sum())) if votes.any() else (None, 0.0)


def coverage(field: Tensor, colour: str | None) -> Tensor:
    """Coverage in 0..1 from chroma, relative to the full chroma of `colour`; faint pixels are 0."""
    if colour is None:
        return torch.zeros(field.shape)
    full = _palette()[list(COLOURS).index(colour)].abs()
    covered = (field.abs() / full).clamp(max=1)
    return torch.where(covered >= _FAINT, covered, 0)


def _centres(covered: Tensor) -> tuple[Tensor, Tensor]:
    """Circular means [F, 2] in 0..SIDE of the coverage [F, S, S], and how compact it is, the less of both axes [F].

    The mean on a circle is the angle of sum(w exp(2 pi i x / SIDE)); the size of that sum over sum(w) is 1 for a point
    and 0 for an even spread.
    """
    angle = 2 * math.pi / SIDE * (torch.arange(SIDE) + 0.5)  # of pixel centres
    point = torch.polar(torch.ones(SIDE), angle)
    profiles = torch.stack([covered.sum(1), covered.sum(2)], dim=1)  # over x, over y: [F, 2, S]
    moment = (profiles * point).sum(-1) / profiles.sum(-1).clamp(min=1e-6)
    centre = torch.remainder(moment.angle() * SIDE / (2 * math.pi), SIDE)
    return centre, moment.abs().amin(1)


@cache
def _templates() -> Tensor:
    """Coverages [K, P, P, S, S] over (shape, y phase, x phase) of the shapes as the clips draw them.

    Their centres are at P x P sub-pixel places from the middle on.
    """
    phase = torch.arange(_PHASES) / _PHASES
    shape = torch.arange(len(SHAPES)).repeat_interleave(_PHASES**2)[:, None]
    y, x = torch.meshgrid(phase, phase, indexing="ij")
    middle = (torch.stack([x, y], dim=-1).reshape(-1, 2) + SIDE // 2).repeat(len(SHAPES), 1)
    count = len(middle)

    def draw(position: Tensor) -> Tensor:
        nothing = torch.zeros(count, 1, dtype=torch.long)
        objects = Objects(
            colour=nothing,
            shape=shape,
            motion=nothing,
            position=position[:, None],
            velocity=torch.zeros(count, 1, 2),
            radius=torch.full((count, 1), RADIUS),
        )
        clips = render(objects, torch.full((count, SIDE, SIDE), 0.5), 1)
        return coverage(chroma((clips[:, :, 0].permute(0, 2, 3, 1) + 1) / 2), next(iter(COLOURS)))

    # A triangle's centre is not the position that it is drawn at, so draw, measure, and draw again.
    offset = wrap(_centres(draw(middle))[0] - middle)
    return draw(middle - offset).reshape(len(SHAPES), _PHASES, _PHASES, SIDE, SIDE)


def _aligned(seen: Track) -> tuple[Tensor, Tensor]:
    """The F' frames with an object, rolled to bring its centre to the middle, and the shapes at the same place.

    Coverages are [F', S, S] and templates [K, F', S, S].
    """
    steps = (seen.centre[seen.found] * _PHASES).round().long()
    phase, whole = steps % _PHASES, steps // _PHASES
    index = (torch.arange(SIDE) - SIDE // 2 + whole[..., None]) % SIDE  # [F', 2, S]
    frame = torch.arange(len(steps))[:, None, None]
    aligned = seen.coverage[seen.found][frame, index[:, 1, :, None], index[:, 0, None, :]]
    return aligned, _templates()[:, phase[:, 1], phase[:, 0]]
