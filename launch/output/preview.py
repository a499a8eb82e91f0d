"""A contact sheet of a video while it is made: a picture of some of its chunks, which is replaced as it grows."""

import math
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from engine.files import atomic_write
from launch.output.formats import png
from launch.output.segments import pixels

_MOST = 48  # pictures in it; of a longer video every second, fourth ... chunk has one
_SIDE, _GAP, _LEVEL = 160, 4, 24  # pixels of the longer side of each, between them, and their grey


class Preview:
    """The picture at `path`: the first frame of each chunk, in the order of reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pictures: list[NDArray[np.uint8]] = []
        self._chunks, self._every = 0, 1

    def add(self, frame: NDArray[np.uint8]) -> None:
        """The first frame of the next chunk, uint8 [H, W, 3]; an `InputError` if the picture cannot be written."""
        self._chunks += 1
        if (self._chunks - 1) % self._every:
            return
        if len(self._pictures) == _MOST:
            self._pictures, self._every = self._pictures[::2], 2 * self._every
        height, width = frame.shape[:2]
        scale = _SIDE / max(height, width)
        size = {"height": max(1, round(height * scale)), "width": max(1, round(width * scale))}
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(**size)
        self._pictures.append(pixels(picture))
        with atomic_write(self._path) as file:
            file.write(png(self._sheet()))

    def _sheet(self) -> NDArray[np.uint8]:
        height, width = self._pictures[0].shape[:2]
        columns = math.ceil(math.sqrt(len(self._pictures) * height / width * 16 / 9))
        columns = min(columns, len(self._pictures))
        rows = math.ceil(len(self._pictures) / columns)
        sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), _LEVEL, dtype=np.uint8)
        for place, picture in enumerate(self._pictures):
            top, left = (_GAP + (place // columns) * (height + _GAP), _GAP + (place % columns) * (width + _GAP))
            sheet[top : top + height, left : left + width] = picture
        return sheet
