"""The checkpoints of one video: one at a time, from the chunk boundary where it is due to the manifest.

A snapshot is taken when a quantum is about to begin. The checkpoint is whole once every rank has its file on the disk
and the chunks that were finished before it are in safe hands; only then is the manifest written. The next snapshot
waits until then, so a slow disk holds up this video and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoint.files import Checkpoint, CheckpointConfig, Shard, commit, new_folder
from engine.schedule import Quantum

Save = Callable[[Path], Mapping[str, int]]
"""Takes the snapshot and begins to write it to a folder; the counts of the video so far."""


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
        self._pending: Checkpoint | None = None
        self.writing = False
        """Some rank has a file that is not on the disk yet."""

    def due(self, quantum: Quantum) -> bool:
        """Whether there is to be a checkpoint before a quantum."""
        return quantum.index > self._start and quantum.index % self._config.every == 0

    def reached(self, quantum: Quantum) -> bool:
        """Take the snapshot; False while the one before is not whole, to be asked again."""
        if self._pending is not None:
            return False
        folder = new_folder(self._config.folder, quantum.index)
        self._pending = Checkpoint(
            folder=folder, quantum=quantum.index, counts=self._save(folder), fingerprint=self._fingerprint, shards=()
        )
        self.writing = True
        return True

    def poll(self, stored: int) -> None:
        """Look whether the files are written, and write the manifest if all is there that it stands for.

        `stored` is the index of the next chunk that is not in safe hands. An InputError says what cannot be written.
        """
        if self._pending is not None and self.writing and (shards := self._saved()) is not None:
            self._pending, self.writing = replace(self._pending, shards=shards), False
        if self._pending is not None and not self.writing and stored >= self._pending.counts["chunks"]:
            commit(self._pending)
            self._pending = None
