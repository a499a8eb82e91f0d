"""Where the tokens of a request stand in its KV buffers: clean region first, the window's chunks after it in order.

Plain Python bookkeeping, the same for every layer, branch and rank; `buffer.py` holds the tensors and moves them.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIXED = -1
"""Stands for the tokens of many chunks that a compression has left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    chunk: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutState:
    """What a layout has come to."""

    clean: tuple[tuple[int, int], ...]
    """(chunk, rows) of the clean region, oldest first; chunk -1 stands for tokens of many."""
    window: tuple[int, ...]  # chunks of the window, oldest first


class KVLayout:
    """Rows of the clean region and of the window.

    Args:
        chunk_tokens: tokens of a chunk.
        clean_tokens: size of the clean region; what does not fit is cut down when a chunk retires.
        window: chunks of the window.
        chunks: of the whole video, which bounds what can be held at once.
    """

    def __init__(self, *, chunk_tokens: int, clean_tokens: int, window: int, chunks: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.clean_tokens = clean_tokens
        self.capacity = min(clean_tokens + window * chunk_tokens, chunks * chunk_tokens)
        """Rows in all (B_total)."""
        self._slots = window
        self._clean: list[_Kept] = []
        self._window: list[int] = []

    @property
    def clean_rows(self) -> int:
        """Rows of the clean region that are in use."""
        return sum(kept.rows for kept in self._clean)

    @property
    def used_rows(self) -> int:
        """Rows in use in all."""
        return self.clean_rows + len(self._window) * self.chunk_tokens

    @property
    def window_chunks(self) -> tuple[int, ...]:
        """Chunks of the window, oldest first."""
        return tuple(self._window)

    @property
    def clean_chunks(self) -> tuple[int, ...]:
        """Finished chunks that are held whole, oldest first."""
        return tuple(kept.chunk for kept in self._clean if kept.chunk != _MIXED)

    def enter(self, chunk: int) -> None:
        """Give a chunk the next slot of the window."""
        if len(self._window) == self._slots:
            raise ValueError(f"chunk {chunk} cannot enter: the window holds {self._window} already")
        if self._window and chunk != self._window[-1] + 1:
            raise ValueError(f"chunk {chunk} cannot follow chunk {self._window[-1]} into the window")
        self._window.append(chunk)

    def retire(self, chunk: int) -> int:
        """Move the oldest chunk of the window to the clean region, where it stands already.

        Returns:
            How many rows the clean region now has too many; `drop_oldest` or `mix` must follow if that is not 0.
        """
        if not self._window or self._window[0] != chunk:
            raise ValueError(f"chunk {chunk} cannot retire: the window holds {self._window}")
        self._window.pop(0)
        self._clean.append(_Kept(chunk=chunk, rows=self.chunk_tokens))
        return max(0, self.clean_rows - self.clean_tokens)

    def drop_oldest(self, rows: int) -> None:
        """Take rows away from the front of the clean region."""
        kept = []
        for entry in self._clean:
            gone = min(rows, entry.rows)
            rows -= gone
            if entry.rows > gone:
                kept.append(_Kept(chunk=entry.chunk, rows=entry.rows - gone))
        self._clean = kept

    def mix(self, rows: int) -> None:
        """The clean region was compressed to so many rows, which belong to no single chunk any more."""
        if rows > self.clean_rows:
            raise ValueError(f"{self.clean_rows} rows cannot be compressed to {rows}")
        self._clean = [_Kept(chunk=_MIXED, rows=rows)]

    def rows(self, chunk: int) -> slice:
        """Rows of a chunk that is held whole, in the window or in the clean region.

        Raises:
            KeyError: it is not held, or not whole.
        """
        start = 0
        for kept in self._clean:
            if kept.chunk == chunk:
                return slice(start, start + kept.rows)
            start += kept.rows
        if chunk not in self._window:
            raise KeyError(f"chunk {chunk} is not held")
        start += self._window.index(chunk) * self.chunk_tokens
        return slice(start, start + self.chunk_tokens)

    def span(self, keys_from: int | None, chunk: int) -> slice:
        """Rows that a chunk attends to: from chunk `keys_from` (None: from the first row) to its own last row.

        Raises:
            KeyError: one of the two is not held.
        """
        start = 0 if keys_from is None else self.rows(keys_from).start
        return slice(start, self.rows(chunk).stop)

    def state(self) -> LayoutState:
        """What it has come to."""
        return LayoutState(clean=tuple((kept.chunk, kept.rows) for kept in self._clean), window=tuple(self._window))

    def restore(self, state: LayoutState) -> None:
        """Go on from a state of a layout of the same size.

        Raises:
            ValueError: it does not fit.
        """
        rows = sum(rows for _, rows in state.clean)
        within = rows <= self.clean_tokens and len(state.window) <= self._slots
        if not within or rows + len(state.window) * self.chunk_tokens > self.capacity:
            raise ValueError(f"{rows} clean rows and {len(state.window)} chunks do not fit into {self.capacity} rows")
        self._clean = [_Kept(chunk=chunk, rows=rows) for chunk, rows in state.clean]
        self._window = list(state.window)
