"""Procedural clips: coloured shapes that move over a grey background, and panoramas of such shapes.

Shapes move on a torus of one picture. A panorama is a world of 256 pixels that closes on itself, in which a camera
turns at constant speed. Everything is drawn on the device of the generator that is passed in, so that a seed gives the
same clips on the same kind of device. The module knows pixels only, no latents and no model.

Shapes: N clips, K layers, F frames, S = SIDE pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.pocket.words import COLOURS, MOTIONS, PANS, RESTS, SHAPES, SPEEDS

SIDE = 64  # pixels
WORLD = 256  # pixels around a panorama
RADIUS = 12.0  # pixels, of every object of the DiT's clips
SPEED = SPEEDS[""]  # pixels per frame
REST = 36  # frames for which an object with rests moves, and then stands still
_LANDMARKS = 6
_BORDER = 16.0  # pixels between the centre of a landmark and the upper or lower border, at least


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """The moving things of N clips, K layers each; later layers lie above earlier ones.

    All tensors are [N, K] except `position` and `velocity`, [N, K, 2] as (x, y) in pixels and pixels per frame.
    """

    colour: Tensor
    shape: Tensor
    motion: Tensor
    position: Tensor
    velocity: Tensor
    radius: Tensor
    since_rest: Tensor | None = None  # frames since the last rest began; None if it never rests
    width: int = SIDE  # of the world, in pixels

    def at(self, time: Tensor) -> Tensor:
        """Positions [N, K, F, 2] at times [F], in frames."""
        travelled = time.expand(*self.colour.shape, -1)
        if self.since_rest is not None:
            travelled = _moved(self.since_rest[..., None] + travelled) - _moved(self.since_rest)[..., None]
        return self.position[:, :, None] + self.velocity[:, :, None] * travelled[..., None]


def _moved(time: Tensor) -> Tensor:
    """Frames of movement in a time that begins with a rest."""
    rounds = torch.floor(time / (2 * REST))
    return rounds * REST + (time - 2 * REST * rounds - REST).clamp(min=0)


def draw_background(count: int, generator: torch.Generator) -> Tensor:
    """Grey backgrounds [N, S, S] in 0..1, half of them plain and half with a linear gradient."""
    level, slope, angle = _greys(count, generator)
    axis = torch.linspace(-0.5, 0.5, SIDE, device=generator.device)
    return level + slope * (torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """N clips of objects over a background that does not move."""

    objects: Objects
    background: Tensor  # [N, S, S]

    def frames(self, count: int, *, start: float = 0.0) -> Tensor:
        """`count` frames from `start` on, as of `render`."""
        return render(self.objects, self.background, count, start=start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panoramas:
    """N clips of a camera that turns among landmarks, over a background that closes on itself."""

    objects: Objects
    level: Tensor  # [N, 1, 1], as are the next two
    slope: Tensor
    angle: Tensor

    def frames(self, count: int, *, start: float = 0.0) -> Tensor:
        """`count` frames from `start` on, as of `render`."""
        device = self.level.device
        time = start + torch.arange(count, dtype=torch.float32, device=device)
        camera = -self.objects.velocity[:, :1, 0] * time  # [N, F]
        x = torch.arange(SIDE, dtype=torch.float32, device=device) + camera[..., None]
        tilt = torch.linspace(-0.25, 0.25, SIDE, device=device)[:, None] * torch.sin(self.angle)[..., None]
        wave = 0.5 * torch.cos(2 * math.pi / WORLD * x + self.angle)
        grey = self.level[..., None] + self.slope[..., None] * (wave[:, :, None, :] + tilt)
        return render(self.objects, grey, count, start=start)


def draw_shapes(count: int, layers: int, generator: torch.Generator, *, varied: bool, pace: str = "") -> Shapes:
    """Random clips of objects; `varied` also draws size and speed at random, for the autoencoder's training."""
    shape = (count, layers)
    motion = _pick(len(MOTIONS), shape, generator)
    radius = _uniform(7, 14, shape, generator) if varied else torch.full(shape, RADIUS, device=generator.device)
    speed = _uniform(0.4, 1.7, shape, generator) if varied else SPEEDS.get(pace, SPEED)
    objects = Objects(
        colour=_pick(len(COLOURS), shape, generator),
        shape=_pick(len(SHAPES), shape, generator),
        motion=motion,
        position=_uniform(0, SIDE, (*shape, 2), generator),
        velocity=_directions(tuple(MOTIONS), motion) * torch.as_tensor(speed, device=generator.device)[..., None],
        radius=radius,
        since_rest=_uniform(0, 2 * REST, shape, generator) if pace == RESTS else None,
    )
    return Shapes(objects=objects, background=draw_background(count, generator))


def draw_panoramas(count: int, generator: torch.Generator, *, pace: str = "") -> Panoramas:
    """Random panoramas: five or six landmarks in a row, and the camera's turn as a movement of them all.

    `motion` [N, 1] of the objects indexes `PANS`, the direction of the camera.
    """
    level, slope, angle = _greys(count, generator)
    shape = (count, _LANDMARKS)
    motion = _pick(len(PANS), (count, 1), generator)
    sixth = _uniform(0, 1, (count, 1), generator) < 0.5
    place = torch.arange(_LANDMARKS, device=generator.device) + _uniform(-0.15, 0.15, shape, generator)
    x = WORLD * (place / (_LANDMARKS - (~sixth).float()) + _uniform(0, 1, (count, 1), generator))
    radius = torch.full(shape, RADIUS, device=generator.device)
    radius[:, -1:] *= sixth  # nothing is drawn of a radius of 0
    objects = Objects(
        colour=_pick(len(COLOURS), shape, generator),
        shape=_pick(len(SHAPES), shape, generator),
        motion=motion,
        position=torch.stack([x, _uniform(_BORDER, SIDE - _BORDER, shape, generator)], dim=-1),
        velocity=-SPEEDS[pace] * _directions(PANS, motion).expand(-1, _LANDMARKS, -1),
        radius=radius,
        width=WORLD,
    )
    return Panoramas(objects=objects, level=level, slope=slope, angle=angle)


def render(objects: Objects, background: Tensor, frames: int, *, start: float = 0.0) -> Tensor:
    """Draw clips, anti-aliased.

    Args:
        objects: N clips of K layers.
        background: [N, S, S] in 0..1, or one for each frame, [N, F, S, S].
        frames: how many frames.
        start: time of the first frame, in frames.

    Returns:
        [N, 3, F, S, S] in -1..1.
    """
    device = background.device
    palette = torch.tensor(list(COLOURS.values()), device=device)
    still = background[:, None] if background.dim() == 3 else background
    video = still[:, None].expand(-1, 3, frames, -1, -1).clone()
    positions = objects.at(start + torch.arange(frames, dtype=torch.float32, device=device))
    centres = torch.arange(SIDE, dtype=torch.float32, device=device) + 0.5
    for layer in range(objects.colour.shape[1]):
        offset = centres - positions[:, layer, ..., None]  # [N, F, 2, S]
        dx = torch.remainder(offset[:, :, 0] + objects.width / 2, objects.width) - objects.width / 2
        dy = torch.remainder(offset[:, :, 1] + SIDE / 2, SIDE) - SIDE / 2
        one = (slice(None), layer, None, None, None)
        distance = _distance(objects.shape[one], dx[:, :, None, :], dy[:, :, :, None], objects.radius[one])
        inside = ((0.5 - distance).clamp(0, 1) * (objects.radius[one] > 0))[:, None]
        video += inside * (palette[objects.colour[:, layer]][:, :, None, None, None] - video)
    return video * 2 - 1


def _distance(shape: Tensor, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the outline, negative inside; about equal areas for equal `r`."""
    dx, dy = torch.broadcast_tensors(dx, dy)
    circle = torch.sqrt(dx * dx + dy * dy) - 0.95 * r
    ax, ay = dx.abs(), dy.abs()
    square = torch.maximum(ax, ay) - 0.84 * r
    slant = (math.sqrt(3) * ax - dy) / 2 - 0.55 * r  # apex up
    triangle = torch.maximum(slant, dy - 0.65 * r)
    arm, half = 1.05 * r, 0.38 * r
    cross = torch.minimum(torch.maximum(ax - arm, ay - half), torch.maximum(ay - arm, ax - half))
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, torch.where(shape == 2, triangle, cross)))


def _greys(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Level, slope (0 for half of the clips) and angle of backgrounds, [N, 1, 1] each."""
    one = (count, 1, 1)
    level, slope = _uniform(0.35, 0.65, one, generator), _uniform(0, 0.3, one, generator)
    slope = slope * (_uniform(0, 1, one, generator) < 0.5)
    return level, slope, _uniform(0, 2 * math.pi, one, generator)


def _pick(high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(high, tuple(shape), generator=generator, device=generator.device)


def _uniform(low: float, high: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def _directions(names: Sequence[str], motion: Tensor) -> Tensor:
    """Unit vectors [..., 2] of indices into `names`."""
    table = torch.tensor([MOTIONS[name] for name in names], dtype=torch.float32, device=motion.device)
    return table[motion]
