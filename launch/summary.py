"""What a finished video cost, for people."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.cache_presets import CacheName

__all__ = ["Summary", "peak_memory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What was made and what it cost.

    Attributes:
        out: the file.
        frames: frames in it.
        fps: frames per second.
        height: pixels.
        width: pixels.
        chunks: chunks made.
        loading: seconds to load the model.
        making: seconds from the loaded model to the finished file.
        computed: computed chunk-steps as a share of all.
        cache_name: preset of reuse.
        kv_bytes: size of the KV buffers.
        memory: peak of the process, bytes.
        gpu_memory: peak of tensors on the GPU, bytes; None without one.
    """

    out: Path
    frames: int
    fps: int
    height: int
    width: int
    chunks: int
    loading: float
    making: float
    computed: float
    cache_name: CacheName
    kv_bytes: int
    memory: int
    gpu_memory: int | None

    def text(self) -> str:
        """Three lines for people."""
        peak = _size(self.memory)
        if self.gpu_memory is not None:
            peak += f", on the GPU {_size(self.gpu_memory)}"
        return (
            f"{self.out}: {self.frames} frames of {self.width}x{self.height}, {self.frames / self.fps:.1f} s of video\n"
            f"made in {self.making:.1f} s, {self.making / self.chunks:.2f} s per chunk, "
            f"after {self.loading:.1f} s of loading\n"
            f"{self.computed:.0%} of the steps computed ({self.cache_name}); "
            f"keys and values {_size(self.kv_bytes)}, peak memory {peak}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def peak_memory() -> int:
    """Largest size that this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kilobytes elsewhere
