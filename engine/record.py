"""What happened in a run, compactly: decisions, distances, timings, and what of the past was kept.

A record is a folder with `record.json` (settings and totals) and `record.npz` (arrays); plots are drawn from it. It
knows figures only, no tensors of the model.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.cache import Decision, Observation
from engine.schedule import Schedule
from models.errors import InputError

__all__ = ["NOT_ACTIVE", "RunRecord", "RunTrace"]

NOT_ACTIVE = 255
"""In `flags`: the chunk was not in the window. 0 is computed, 1 reused."""
_ARRAYS = ("flags", "distances", "tick_seconds", "tick_items", "fill", "kept")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A finished record.

    Attributes:
        settings: what was asked for, as plain JSON values.
        flags: uint8 [ticks, chunks], see `NOT_ACTIVE`.
        distances: float32 [ticks, chunks], relative L1; NaN where none was taken.
        tick_seconds: float64 [ticks].
        tick_items: int32 [ticks], passes through the layers.
        fill: float32 [ticks], share of the KV buffer's rows in use at the tick's end.
        kept: float32 [chunks, chunks]; row c is, after chunk c retired, the share of each chunk's tokens still held.
    """

    settings: Mapping[str, Any]
    flags: np.ndarray
    distances: np.ndarray
    tick_seconds: np.ndarray
    tick_items: np.ndarray
    fill: np.ndarray
    kept: np.ndarray

    @property
    def computed_fraction(self) -> float:
        """Computed chunk-steps as a share of all."""
        active = self.flags != NOT_ACTIVE
        return float((self.flags[active] == 0).mean()) if active.any() else 1.0

    def save(self, folder: Path) -> None:
        """Write the folder, which is made if need be.

        Raises:
            InputError: it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(folder / "record.npz", **{name: getattr(self, name) for name in _ARRAYS})
            (folder / "record.json").write_text(json.dumps(dict(self.settings), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write the record {folder}: {error.strerror}") from None

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read a folder that `save` wrote.

        Raises:
            InputError: there is no whole record.
        """
        try:
            settings = json.loads((folder / "record.json").read_text())
            with np.load(folder / "record.npz", allow_pickle=False) as arrays:
                return cls(settings=settings, **{name: arrays[name] for name in _ARRAYS})
        except FileNotFoundError as error:
            raise InputError(f"{folder} holds no record: {Path(error.filename).name} is missing") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"the record in {folder} is damaged: {error}") from None


class RunTrace:
    """A record in the making; the engine tells it what happens. Of fixed size once a schedule is known."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def begin(self, schedule: Schedule) -> None:
        """A run with that schedule starts."""
        ticks, chunks = schedule.ticks, schedule.chunks
        self._arrays = {
            "flags": np.full((ticks, chunks), NOT_ACTIVE, dtype=np.uint8),
            "distances": np.full((ticks, chunks), np.nan, dtype=np.float32),
            "tick_seconds": np.zeros(ticks),
            "tick_items": np.zeros(ticks, dtype=np.int32),
            "fill": np.zeros(ticks, dtype=np.float32),
            "kept": np.zeros((chunks, chunks), dtype=np.float32),
        }

    def decided(self, seen: Observation, decision: Decision) -> None:
        """A chunk's step was decided."""
        self._arrays["flags"][seen.tick, seen.chunk] = 0 if decision is Decision.COMPUTE else 1
        if seen.distance is not None:
            self._arrays["distances"][seen.tick, seen.chunk] = seen.distance

    def ticked(self, tick: int, *, seconds: float, items: int, fill: float) -> None:
        """A tick is over."""
        self._arrays["tick_seconds"][tick] = seconds
        self._arrays["tick_items"][tick] = items
        self._arrays["fill"][tick] = fill

    def retired(self, chunk: int, shares: np.ndarray) -> None:
        """A chunk has left the window; these shares of chunks 0 .. chunk are still held."""
        self._arrays["kept"][chunk, : len(shares)] = shares

    def finish(self, settings: Mapping[str, Any]) -> RunRecord:
        """The record."""
        return RunRecord(settings=settings, **self._arrays)
