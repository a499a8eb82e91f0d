"""Procedural clips: coloured shapes that move over a grey background, on a torus.

Everything is drawn from a generator that is passed in, so that a seed gives the same clips on every machine. The
module knows pixels only, no latents and no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.pocket.text import COLOURS, MOTIONS, SHAPES

SIDE = 64  # pixels
RADIUS = 12.0  # pixels, of every object of the DiT's clips
SPEED = 1.0  # pixels per frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """The moving things of N clips, K layers each; later layers lie above earlier ones.

    All fields are [N, K] except `position` and `velocity`, [N, K, 2] as (x, y) in pixels and pixels per frame.
    """

    colour: Tensor
    shape: Tensor
    motion: Tensor
    position: Tensor
    velocity: Tensor
    radius: Tensor


def draw_objects(count: int, layers: int, generator: torch.Generator, *, varied: bool) -> Objects:
    """Random objects. `varied` also draws size and speed at random, which the autoencoder is trained on."""

    def pick(high: int) -> Tensor:
        return torch.randint(high, (count, layers), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, layers, generator=generator)

    motion = pick(len(MOTIONS))
    radius = uniform(7, 14) if varied else torch.full((count, layers), RADIUS)
    speed = uniform(0.5, 1.5) if varied else torch.full((count, layers), SPEED)
    direction = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motion]
    position = SIDE * torch.rand(count, layers, 2, generator=generator)
    return Objects(
        colour=pick(len(COLOURS)),
        shape=pick(len(SHAPES)),
        motion=motion,
        position=position,
        velocity=direction * speed[..., None],
        radius=radius,
    )


def draw_background(count: int, generator: torch.Generator) -> Tensor:
    """Grey backgrounds [N, SIDE, SIDE] in 0..1, half of them plain and half with a linear gradient."""
    level = 0.35 + 0.3 * torch.rand(count, 1, 1, generator=generator)
    slope = 0.3 * torch.rand(count, 1, 1, generator=generator)
    slope = slope * (torch.rand(count, 1, 1, generator=generator) < 0.5)
    angle = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    axis = torch.linspace(-0.5, 0.5, SIDE)
    return level + slope * (torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None])


def _distance(shape: Tensor, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the outline, negative inside; about equal areas for equal `r`."""
    circle = torch.sqrt(dx * dx + dy * dy) - 0.95 * r
    ax, ay = dx.abs(), dy.abs()
    square = torch.maximum(ax, ay) - 0.84 * r
    slant = (math.sqrt(3) * ax - dy) / 2 - 0.55 * r  # apex up
    triangle = torch.maximum(slant, dy - 0.65 * r)
    arm, half = 1.05 * r, 0.38 * r
    cross = torch.minimum(torch.maximum(ax - arm, ay - half), torch.maximum(ay - arm, ax - half))
    distances = torch.stack([circle, square, triangle, cross])
    return torch.gather(distances, 0, shape.expand_as(circle)[None])[0]


def render(objects: Objects, background: Tensor, frames: int, *, start: float = 0.0) -> Tensor:
    """Draw clips, anti-aliased.

    Args:
        objects: N clips of K layers.
        background: [N, SIDE, SIDE] in 0..1.
        frames: how many frames.
        start: time of the first frame, in frames.

    Returns:
        [N, 3, frames, SIDE, SIDE] in -1..1.
    """
    palette = torch.tensor(list(COLOURS.values()))
    video = background[:, None, None].expand(-1, 3, frames, -1, -1).clone()
    time = start + torch.arange(frames, dtype=torch.float32)
    centres = torch.arange(SIDE, dtype=torch.float32) + 0.5
    for layer in range(objects.colour.shape[1]):
        at = objects.position[:, layer, None] + objects.velocity[:, layer, None] * time[None, :, None]  # [N, F, 2]
        offset = centres - at[..., None]  # [N, F, 2, SIDE]
        offset = torch.remainder(offset + SIDE / 2, SIDE) - SIDE / 2
        dx, dy = offset[:, :, 0, None, :], offset[:, :, 1, :, None]
        dx, dy = torch.broadcast_tensors(dx, dy)
        one = (slice(None), layer, None, None, None)
        inside = (0.5 - _distance(objects.shape[one], dx, dy, objects.radius[one])).clamp(0, 1)[:, None]
        video += inside * (palette[objects.colour[:, layer]][:, :, None, None, None] - video)
    return video * 2 - 1
