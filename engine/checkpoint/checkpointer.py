"""The checkpoints of one video: one at a time, from the chunk boundary where it is due to the manifest.

A snapshot is taken when a quantum is about to begin. The checkpoint is whole once every rank has its file on the disk
and the chunks that were finished before it are in safe hands; only then is the manifest written. The next snapshot
waits until then, so a slow disk holds up this video and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.files import Checkpoint, CheckpointConfig, Shard, commit, new_folder
from engine.schedule import Quantum

Save = Callable[[Path], Mapping[str, int]]
"""Takes the snapshot and begins to write it to a folder; the counts of the video so far."""


@dataclass(slots=True)
class _Pending:
    folder: Path
    quantum: int
    counts: Mapping[str, int]
    shards: tuple[Shard, ...] | None = None  # of all ranks, once they are on the disk


class Checkpointer:
    """Acts at the chunk boundaries of one video.

    Args:
        config: where and how often.
        fingerprint: of all that must be the same when a checkpoint is taken up.
        start: the quantum that the video has begun with.
        save: takes a snapshot.
        saved: the files of the last snapshot, once all are on the disk; None before.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        fingerprint: Mapping[str, Any],
        start: int,
        save: Save,
        saved: Callable[[], tuple[Shard, ...] | None],
    ) -> None:
        self._config, self._fingerprint, self._start = config, fingerprint, start
        self._save, self._saved = save, saved
        self._pending: _Pending | None = None

    @property
    def writing(self) -> bool:
        """Some rank has a file that is not on the disk yet."""
        return self._pending is not None and self._pending.shards is None

    def due(self, quantum: Quantum) -> bool:
        """Whether there is to be a checkpoint before a quantum."""
        return quantum.index > self._start and quantum.index % self._config.every == 0

    def reached(self, quantum: Quantum) -> bool:
        """Take the snapshot; False while the one before is not whole, to be asked again."""
        if self._pending is not None:
            return False
        folder = new_folder(self._config.folder, quantum.index)
        self._pending = _Pending(folder=folder, quantum=quantum.index, counts=self._save(folder))
        return True

    def poll(self, stored: int) -> None:
        """Look whether the files are written, and write the manifest if all is there that it stands for.

        Args:
            stored: index of the next chunk that is not in safe hands.

        Raises:
            InputError: it cannot be written.
        """
        pending = self._pending
        if pending is None:
            return
        if pending.shards is None:
            pending.shards = self._saved()
        if pending.shards is None or stored < pending.counts["chunks"]:
            return
        commit(
            Checkpoint(
                folder=pending.folder,
                quantum=pending.quantum,
                counts=pending.counts,
                fingerprint=self._fingerprint,
                shards=pending.shards,
            )
        )
        self._pending = None
