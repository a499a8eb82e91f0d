"""The checkpoints of one video as the lead sees them: one at a time, from the border where it is due to the manifest.

A draft is begun when a quantum is about to begin. It is whole once every rank has its file on the disk and the chunks
that were finished before it were handed out; only then is the manifest written. The next one waits until then, so that
a slow disk holds up this video and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.files import AsyncSave, Checkpoint, CheckpointConfig, Shard, commit, new_place
from engine.schedule import Quantum

Begin = Callable[[Quantum, Path], tuple[AsyncSave, Mapping[str, int]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """How a video is kept."""

    plan: CheckpointConfig  # where and how often
    fingerprint: Mapping[str, Any]  # of all that must be the same when it is taken up
    found: Checkpoint | None = None  # a checkpoint to go on from


@dataclass(slots=True)
class _Draft:
    place: Path
    quantum: int
    counts: Mapping[str, int]
    writing: AsyncSave | None
    """Of the lead's own files; None once they are on the disk."""
    own: tuple[Shard, ...] = ()
    """Those files, then."""
    shards: tuple[Shard, ...] | None = None
    """Of all ranks, once they are on the disk."""


class Checkpointer:
    """One video's checkpoints.

    Args:
        keeping: where and how often.
        start: the quantum that the video has begun with.
        begin: takes the snapshot when a quantum is about to begin; gives what the lead writes, and the counts so far.
    """

    def __init__(self, keeping: Keeping, start: int, begin: Begin) -> None:
        self._keeping, self._start, self._begin = keeping, start, begin
        self._draft: _Draft | None = None

    @property
    def writing(self) -> bool:
        """The lead's own files are on their way to the disk."""
        return self._draft is not None and self._draft.writing is not None

    @property
    def settled(self) -> bool:
        """No rank has a file on its way to the disk."""
        return self._draft is None or self._draft.shards is not None

    def due(self, quantum: Quantum) -> bool:
        """Whether there is to be a checkpoint before a quantum."""
        return quantum.index > self._start and quantum.index % self._keeping.plan.every == 0

    def reached(self, quantum: Quantum) -> bool:
        """A quantum before which one is due may begin: take the snapshot. False while the one before is not whole."""
        if self._draft is not None:
            return False
        place = new_place(self._keeping.plan.folder, quantum.index)
        writing, counts = self._begin(quantum, place)
        self._draft = _Draft(place=place, quantum=quantum.index, counts=counts, writing=writing)
        return True

    def written(self) -> bool:
        """Whether the lead's own files have come to be on the disk since the last call.

        Raises:
            InputError: one cannot be written.
        """
        draft = self._draft
        if draft is None or draft.writing is None or not draft.writing.done:
            return False
        draft.own, draft.writing = draft.writing.shards(), None
        return True

    def acknowledged(self, others: Iterable[Shard]) -> None:
        """The other ranks have their files on the disk."""
        assert self._draft is not None
        self._draft.shards = (*self._draft.own, *others)

    def commit(self, handed_out: int) -> None:
        """Write the manifest, if all is there that it stands for.

        Args:
            handed_out: index of the next chunk to be handed out.

        Raises:
            InputError: it cannot be written.
        """
        draft = self._draft
        if draft is None or draft.shards is None or handed_out < draft.counts["chunks"]:
            return
        commit(
            Checkpoint(
                place=draft.place,
                quantum=draft.quantum,
                counts=draft.counts,
                fingerprint=self._keeping.fingerprint,
                shards=draft.shards,
            )
        )
        self._draft = None
