"""What happened in a run, compactly: decisions, distances, timings, and what of the past was kept.

A record is a folder with `record.json` (settings and totals) and `record.npz` (arrays); plots are drawn from it. It
knows figures only, no tensors of the model. What is held and written grows in proportion to the video, a few bytes for
each step of each chunk; the tables over ticks and chunks, which grow with its square, are put together when asked for.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import atomic_write, write_errors
from engine.reuse.policy import Decision, Observation
from engine.schedule import Schedule, Timetable
from models.errors import InputError

NOT_ACTIVE = 255
"""In `flags`: the chunk was not in the window. 0 is computed, 1 reused, 2 extrapolated."""
_SPAN = ("first", "chunks", "num_steps", "window", "stagger")
_ARRAYS = ("span", "decisions", "changes", "tick_seconds", "tick_items", "fill", "held")
_SETTINGS_FILE, _ARRAYS_FILE = "record.json", "record.npz"
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error,
    InputError,
)  # fmt: skip
"""What reading a file that is not whole can raise."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished record. Chunks and ticks are counted through all spans of the video."""

    settings: Mapping[str, Any]  # what was asked for, as plain JSON values
    span: np.ndarray
    """Int64 [spans, 5], of each schedule first, chunks, num_steps, window, stagger. Older ones are [5] or [4], of one
    span, without the stagger."""
    decisions: np.ndarray  # uint8 [made chunks, steps], see `NOT_ACTIVE`
    changes: np.ndarray  # float32 [made chunks, steps], relative L1; NaN where none was taken
    tick_seconds: np.ndarray  # float64 [ticks]
    tick_items: np.ndarray  # int32 [ticks], passes through the layers
    fill: np.ndarray  # float32 [ticks], share of the KV buffer's rows in use at the tick's end
    held: np.ndarray
    """Float64 [entries, 3]: after which chunk retired, of which chunk, what share of its tokens was still held."""

    @cached_property
    def schedule(self) -> Timetable:
        """Of the video."""
        rows = np.atleast_2d(self.span)
        return Timetable(spans=tuple(Schedule(**dict(zip(_SPAN, map(int, row), strict=False))) for row in rows))

    def of_span(self, number: int) -> RunRecord:
        """The record of one span alone, with chunks and ticks of its own."""
        table = self.schedule
        own, (chunk, tick, _), after = table.spans[number], table.places[number], table.places[number + 1]
        made = slice(chunk + own.first - table.first, chunk + own.chunks - table.first)
        ticks, (retired, held) = slice(tick, after.tick), (self.held[:, 0].astype(int), self.held[:, 1].astype(int))
        inside = (chunk + own.first <= retired) & (retired < chunk + own.chunks) & (held >= chunk)
        return RunRecord(
            settings=self.settings,
            span=np.atleast_2d(self.span)[number : number + 1],
            decisions=self.decisions[made],
            changes=self.changes[made],
            tick_seconds=self.tick_seconds[ticks],
            tick_items=self.tick_items[ticks],
            fill=self.fill[ticks],
            held=self.held[inside] - np.array([chunk, chunk, 0]),
        )

    @property
    def flags(self) -> np.ndarray:
        """The decisions by tick: uint8 [ticks, chunks]."""
        return self._by_tick(self.decisions, NOT_ACTIVE)

    @property
    def distances(self) -> np.ndarray:
        """The changes by tick: float32 [ticks, chunks]."""
        return self._by_tick(self.changes, np.nan)

    @property
    def kept(self) -> np.ndarray:
        """float32 [chunks, chunks]; row c is, after chunk c retired, the share of each chunk's tokens still held."""
        chunks = self.schedule.chunks
        table = np.zeros((chunks, chunks), dtype=np.float32)
        table[self.held[:, 0].astype(int), self.held[:, 1].astype(int)] = self.held[:, 2]
        return table

    def _by_tick(self, steps: np.ndarray, missing: float) -> np.ndarray:
        schedule = self.schedule
        table = np.full((schedule.ticks, schedule.chunks), missing, dtype=steps.dtype)
        for row, own in enumerate(steps):
            begins = schedule.tick_of(schedule.first + row, 0)
            table[begins : begins + schedule.num_steps, schedule.first + row] = own
        return table

    @property
    def computed_fraction(self) -> float:
        """Computed chunk-steps as a share of all."""
        active = self.decisions != NOT_ACTIVE
        return float((self.decisions[active] == 0).mean()) if active.any() else 1.0

    def save(self, folder: Path) -> None:
        """Write the folder, which is made if need be; a record that it holds already is replaced.

        The settings are taken away first and come last, so that there is never a record of two runs. An InputError if
        it cannot be written.
        """
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **{name: getattr(self, name) for name in _ARRAYS})
        settings = json.dumps(dict(self.settings), indent=1) + "\n"
        with write_errors(folder, "the record"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _SETTINGS_FILE).unlink(missing_ok=True)
        for name, content in ((_ARRAYS_FILE, arrays.getvalue()), (_SETTINGS_FILE, settings.encode())):
            with atomic_write(folder / name, "the record") as file:
                file.write(content)

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read a folder that `save` wrote; an InputError if it holds no whole record."""
        try:
            settings = json.loads((folder / _SETTINGS_FILE).read_text())
            if not isinstance(settings, dict):
                raise ValueError(f"{_SETTINGS_FILE} is not a JSON object")
            if not isinstance(settings.get("prompt"), str):
                raise ValueError(f"{_SETTINGS_FILE} has no prompt, so it is no record's")
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
        """Raise a ValueError or an InputError where arrays do not fit together."""
        if (
            self.span.ndim not in (1, 2)
            or not self.span.size
            or self.span.shape[-1] not in (4, 5)
            or self.span.dtype.kind != "i"
        ):
            raise ValueError("the span is no schedule")
        schedule = self.schedule
        steps, ticks = (schedule.chunks - schedule.first, schedule.num_steps), (schedule.ticks,)
        shapes = {"decisions": steps, "changes": steps, "tick_seconds": ticks, "tick_items": ticks, "fill": ticks}
        shapes["held"] = (len(self.held) if self.held.ndim else 0, 3)
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype.kind not in "fiu":
                raise ValueError(f"{name} are {array.dtype} {list(array.shape)}, not numbers {list(shape)}")
        known = np.isin(self.decisions, (*(decision.value for decision in Decision), NOT_ACTIVE))
        if not known.all() or (self.decisions == NOT_ACTIVE).all():
            raise ValueError("the decisions are no table of flags")
        if not ((self.held[:, :2] >= 0) & (self.held[:, :2] < schedule.chunks)).all():
            raise ValueError("held names chunks that the video does not have")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as packed:
        damaged = packed.testzip()  # the checksums of all, before a header is believed
    if damaged is not None:
        raise ValueError(f"{damaged} in {path.name} does not match its checksum")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in _ARRAYS}


class Recorder:
    """A record in the making; the engine calls it with what happens."""

    observes = True
    """Whether distances are wanted that the policy does not look at."""

    def __init__(self) -> None:
        self._first, self._arrays, self._held = 0, dict[str, np.ndarray](), list[np.ndarray]()

    def begin(self, table: Timetable) -> None:
        """Start, with the schedule of the video."""
        ticks, steps = table.ticks, (table.chunks - table.first, table.num_steps)
        self._first, self._held = table.first, []
        self._arrays = {
            "span": np.array([[getattr(span, name) for name in _SPAN] for span in table.spans], dtype=np.int64),
            "decisions": np.full(steps, NOT_ACTIVE, dtype=np.uint8),
            "changes": np.full(steps, np.nan, dtype=np.float32),
            "tick_seconds": np.zeros(ticks),
            "tick_items": np.zeros(ticks, dtype=np.int32),
            "fill": np.zeros(ticks, dtype=np.float32),
        }

    def decided(self, seen: Observation, decision: Decision) -> None:
        """Add the decision about a chunk's step."""
        row = seen.chunk - self._first
        self._arrays["decisions"][row, seen.step] = decision.value
        if seen.distance is not None:
            self._arrays["changes"][row, seen.step] = seen.distance

    def ticked(self, tick: int, *, seconds: float, items: int, fill: float) -> None:
        """Add what a tick took."""
        for name, figure in (("tick_seconds", seconds), ("tick_items", items), ("fill", fill)):
            self._arrays[name][tick] = figure

    def retired(self, chunk: int, shares: np.ndarray) -> None:
        """A chunk that was made has left the window; these shares of chunks 0 .. chunk are still held."""
        (alive,) = np.nonzero(shares)
        self._held.append(np.stack([np.full(len(alive), chunk), alive, shares[alive]], axis=1).astype(np.float64))

    def finish(self, settings: Mapping[str, Any]) -> RunRecord:
        """The record."""
        held = np.concatenate([np.zeros((0, 3)), *self._held])
        return RunRecord(settings=settings, held=held, **self._arrays)
