"""Finished chunks of unfinished videos, kept beside the videos until the last one is there.

A chunk is a file of frames in a hidden folder of its video. It appears whole, and the same chunk always has the same
frames, so it does not matter who made it, or how often, or whether this process was ended in between. The video is
encoded in one go from the files.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from launch.files import file_errors
from launch.video import VideoWriter

__all__ = ["ChunkFiles"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkFiles:
    """The chunks of one video.

    Attributes:
        folder: hidden, made when there is a chunk.
    """

    folder: Path

    def count(self) -> int:
        """Chunks that are there, from the first on without a gap."""
        index = 0
        while self._is_whole(self._file(index)):
            index += 1
        return index

    def write(self, index: int, frames: NDArray[np.uint8]) -> None:
        """Keep a chunk.

        Args:
            index: counted from 0.
            frames: uint8 [F, H, W, 3].

        Raises:
            InputError: the disk is full or cannot be written.
        """
        path = self._file(index)
        part = path.with_name(f".{path.name}.part")
        with file_errors(path):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as file:
                    np.save(file, frames)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)  # what a full disk has taken of it

    def encode(self, path: Path, *, fps: int) -> None:
        """Make the video file of all chunks. It appears when it is complete.

        Raises:
            InputError: as in `write`.
        """
        files = [self._file(index) for index in range(self.count())]
        _, height, width, _ = np.load(files[0], mmap_mode="r").shape
        with VideoWriter(path, fps=fps, height=height, width=width) as writer:
            for file in files:
                writer.write(torch.from_numpy(np.load(file)))

    def remove(self) -> None:
        """The video is there, or not wanted any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06}.npy"

    @staticmethod
    def _is_whole(path: Path) -> bool:
        """Whether all frames are there: a machine that went down may have cut the file off."""
        try:
            frames = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return bool(frames.size)
