"""A picture of many videos at once: a row for each, with frames in time and what was measured beside them.

It draws what it is given; it measures nothing and knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from benchmarks.adherence import Adherence
from benchmarks.summary import BORDER_PIXELS

_CAPTION = 225  # pixels of the sheet, as are all lengths here
_COLUMNS = (10, 90)  # where the parts of a line of the caption begin
_HEADER = 34
_GAP, _BORDER_GAP, _ROW_GAP = 2, 8, 8
_RIGHT, _WRONG = "#222222", "#c00000"
_INCH = 75  # pixels of the sheet per inch of the figure, which makes a line of 7.5 points a sixth of a row


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """One row."""

    frames: Tensor  # uint8 [N, H, W, 3], the video's frames `shown`
    shown: tuple[int, ...]  # their numbers, rising
    measured: Adherence  # the video's figures


def sampled_frames(count: int, chunk_frames: int = 24) -> tuple[int, ...]:
    """Frames to show of a video of `count`: first, middle and last of every chunk."""
    firsts = range(0, count, chunk_frames)
    places = (0, chunk_frames // 2, chunk_frames - 1)
    return tuple(first + place for first in firsts for place in places if first + place < count)


def contact_sheet(strips: Sequence[Strip], title: str, chunk_frames: int = 24) -> Figure:
    """Draw the sheet, as wide as the longest video needs; a dark line stands between frames of different chunks.

    Args:
        strips: the rows, all with the same frames but for those past a shorter video's end.
        title: one line above.
        chunk_frames: frames of a chunk.
    """
    shown = max((strip.shown for strip in strips), key=len)
    height, width = strips[0].frames.shape[1:3]
    lefts, borders, x = [], [], _CAPTION
    for i, frame in enumerate(shown):
        if i and frame // chunk_frames != shown[i - 1] // chunk_frames:
            x += _BORDER_GAP
            borders.append(x - (_BORDER_GAP + _GAP) / 2)
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
    for border in borders:
        axes.plot([border, border], [_HEADER, canvas.shape[0]], color="#222222", linewidth=1.5)
    for row, strip in enumerate(strips):
        _caption(axes, row, _HEADER + row * pitch, height, strip.measured)
    return figure


def _caption(axes: Axes, row: int, top: int, height: int, measured: Adherence) -> None:
    """Four lines: prompt, colour and motion, shape, borders; in red and crossed where they are not as asked."""
    x, y = measured.velocity
    errors = " ".join(f"{error:.1f}" for error in measured.border_errors)
    joined = max(measured.border_errors, default=0.0) <= BORDER_PIXELS
    right = measured.colour_right and measured.motion_right and measured.shape_right and joined
    if not right:
        axes.add_patch(Rectangle((1, top), 4, height, color=_WRONG))
    motion = f"{measured.motion or 'unclear'}  {x:+.2f}, {y:+.2f} px/frame"
    lines: tuple[tuple[tuple[str, bool], ...], ...] = (
        ((f"{row + 1}  {measured.scene.prompt}", right),),
        (
            (f"{measured.colour or 'no colour'} {measured.colour_share:.0%}", measured.colour_right),
            (motion, measured.motion_right),
        ),
        (
            (measured.shape or "no shape", measured.shape_right),
            (f"overlap {measured.overlap:.2f}, stray {measured.stray:.0%}", True),
        ),
        (("borders", joined), (f"{errors or 'none'} px", joined)),
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
