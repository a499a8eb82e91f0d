"""What is measured, and where: a model's shapes on a device, and how time is taken there."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Row, seconds_of
from benchmarks.workload import QUICK, model_config
from models.errors import InputError
from models.magi.config import MagiConfig, ModelConfig
from models.magi.presets import PRESETS
from models.protocols import CELL_PIXELS

TINY = "tiny"
"""A preset that there is to try the command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A model, a device, and until when to measure."""

    preset: str
    config: MagiConfig
    config_file: Path  # where the configuration is written, for what reads one
    device: torch.device
    deadline: float  # by the monotonic clock

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    @property
    def shapes(self) -> ModelConfig:
        """Shapes of the DiT."""
        return self.config.model_config

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self.config.runtime_config.video_size_h, self.config.runtime_config.video_size_w

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, height and width of a chunk."""
        height, width = self.size
        return self.config.runtime_config.chunk_width, height // CELL_PIXELS, width // CELL_PIXELS

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.config.chunk_tokens(*self.size)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values on the device."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.shapes.dtype)

    def seconds(self, function: Callable[[], object], *, repeats: int = 5) -> float:
        """Median time of a call, without its launch; two calls before it are not counted."""
        return statistics.median([seconds_of(function, self.device) for _ in range(repeats + 2)][2:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that is measured by itself."""

    name: str  # of its file
    about: str  # what it says, for the report
    seconds: float  # that it takes about, of magi-4.5b-distill on an H100 or H200
    measure: Callable[[Bench], Iterator[Row]]  # gives its rows as it has them


def new_bench(preset: str, device: str, folder: Path, *, minutes: float) -> Bench:
    """A model by the name of its preset; an `InputError` if there is none, or the device is not there."""
    if device not in ("cuda", "cpu"):
        raise InputError(f"unknown device {device!r}: choose from cuda, cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU here: give --device cpu --preset tiny to try the command")
    if preset != TINY and preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}, {TINY}")
    config = model_config(QUICK) if preset == TINY else PRESETS[preset].config()
    deadline = time.monotonic() + 60 * minutes
    path = folder / "model.json"
    return Bench(preset=preset, config=config, config_file=path, device=torch.device(device), deadline=deadline)


def problem(error: Exception, most: int = 90) -> str:
    """The first line of an error, not too long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
