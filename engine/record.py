"""What happened in a run, compactly: decisions, distances, timings, and what of the past was kept.

A record is a folder with `record.json` (settings and totals) and `record.npz` (arrays); plots are drawn from it. It
knows figures only, no tensors of the model.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
import zlib
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
"""In `flags`: the chunk was not in the window. 0 is computed, 1 reused, 2 extrapolated."""
_ARRAYS = ("flags", "distances", "tick_seconds", "tick_items", "fill", "kept")
_SETTINGS_FILE, _ARRAYS_FILE = "record.json", "record.npz"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a file that is not whole can raise."""


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
        """Write the folder, which is made if need be; a record that it holds already is replaced.

        The settings are taken away first and come last, so that there is never a record of two runs.

        Raises:
            InputError: it cannot be written.
        """
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **{name: getattr(self, name) for name in _ARRAYS})
        settings = json.dumps(dict(self.settings), indent=1) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _SETTINGS_FILE).unlink(missing_ok=True)
            _write(folder / _ARRAYS_FILE, arrays.getvalue())
            _write(folder / _SETTINGS_FILE, settings.encode())
        except OSError as error:
            raise InputError(f"cannot write the record {folder}: {error.strerror}") from None

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read a folder that `save` wrote.

        Raises:
            InputError: there is no whole record.
        """
        try:
            settings = json.loads((folder / _SETTINGS_FILE).read_text())
            if not isinstance(settings, dict):
                raise ValueError(f"{_SETTINGS_FILE} is not a JSON object")
            record = cls(settings=settings, **_read_arrays(folder / _ARRAYS_FILE))
            record._check()
        except FileNotFoundError as error:
            raise InputError(f"{folder} holds no record: {Path(error.filename).name} is missing") from None
        except NotADirectoryError:
            raise InputError(f"{folder} holds no record: it is not a folder") from None
        except _DAMAGE as error:
            raise InputError(f"the record in {folder} is damaged: {error}") from None
        return record

    def _check(self) -> None:
        """Raises ValueError where arrays do not fit together."""
        known = np.isin(self.flags, (*(decision.value for decision in Decision), NOT_ACTIVE))
        if self.flags.ndim != 2 or not known.all() or (self.flags == NOT_ACTIVE).all():
            raise ValueError("the flags are no table of decisions")
        ticks, chunks = self.flags.shape
        shapes = {
            "distances": (ticks, chunks),
            "tick_seconds": (ticks,),
            "tick_items": (ticks,),
            "fill": (ticks,),
            "kept": (chunks, chunks),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype.kind not in "fiu":
                raise ValueError(f"{name} are {array.dtype} {list(array.shape)}, not numbers {list(shape)}")


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as packed:
        damaged = packed.testzip()  # the checksums of all, before a header is believed
    if damaged is not None:
        raise ValueError(f"{damaged} in {path.name} does not match its checksum")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in _ARRAYS}


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
        self._arrays["flags"][seen.tick, seen.chunk] = decision.value
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
