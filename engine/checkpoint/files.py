"""Checkpoints of a video on disk: one file for each rank, one for the run, and a manifest that comes last.

A folder belongs to one request. Each checkpoint is a folder in it, `quantum-<quantum>-<token>`: it goes on with that
quantum, and the token keeps apart what two attempts at the same quantum write. One without a manifest does not exist.
The manifest has size and checksum of every file, and a checksum of itself. Once it is there, older ones are deleted but
for the last, in case this one should come to harm. The module knows files only, not what is in them.
"""

import json
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.checkpoint.contents import Contents
from engine.files import Damaged, atomic_name, atomic_write, check_file, digest_of, digest_of_file
from models.errors import InputError

_MANIFEST = "manifest.json"
_WHAT = "the checkpoint file"
_ADVICE = "; make room there or choose another folder. The checkpoint before it, if there is one, is still whole"
_FOLDER = re.compile(r"quantum-(\d{8})-[0-9a-f]{8}")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a manifest that is not whole can raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where and how often to keep how far a video is."""

    folder: Path  # of this request alone; all ranks must reach it. Whoever asks for checkpoints makes the folder around
    # it, and deletes both in the end by `remove_folder`
    every: int  # a checkpoint each time so many chunks have entered the window (or would have, at the end)
    extend: bool = False  # the last one is that which a longer video would go on from

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"a checkpoint every {self.every} chunks cannot be: give 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file that is on the disk."""

    file: str  # its name in the checkpoint's folder
    nbytes: int
    digest: str  # checksum of its bytes, as hexadecimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path  # its own
    quantum: int  # the quantum that it goes on with
    counts: Mapping[str, int]  # of the run so far; `chunks` is the index of the next chunk to hand out
    fingerprint: Mapping[str, Any]  # of all that must be the same when it is taken up
    shards: tuple[Shard, ...]

    def check_fits(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise an InputError that says in what it differs from what there is now, if it does."""
        for part in sorted({*self.fingerprint, *fingerprint}):
            then, now = self.fingerprint.get(part), fingerprint.get(part)
            both = f": {json.dumps(then)}, now {json.dumps(now)}"
            if then != now:
                raise InputError(
                    f"the checkpoint {self.folder} was made with another {part}{both if len(both) < 200 else ''}; "
                    "go on as it was made, or delete it"
                )


def new_folder(folder: Path, quantum: int) -> Path:
    """Where a new checkpoint goes that will go on with a quantum; nothing is made yet."""
    return folder.absolute() / f"quantum-{quantum:08d}-{secrets.token_hex(4)}"


def write_async(
    folder: Path, files: Mapping[str, Contents], on_end: Callable[[tuple[Shard, ...] | Exception], None]
) -> None:
    """Write files, by name, on a thread of their own. The folder is made if need be, and the one around it is not: that
    is gone where nobody wants the checkpoint any more.

    `on_end` is called in the thread once all are on the disk, or with what has gone wrong: an InputError where one
    cannot be written.
    """

    def run() -> None:
        try:
            on_end(tuple(_write(folder / name, contents) for name, contents in files.items()))
        except Exception as error:  # noqa: BLE001 - reported, whatever it is
            on_end(error)

    threading.Thread(target=run, name=f"writing {folder.name}", daemon=True).start()


def read_contents(folder: Path, name: str) -> Contents:
    """Read a file of a whole checkpoint, whose folder is given; a Damaged if it is not as it was written."""
    path, checkpoint = folder / name, _load(folder)
    shards = {} if checkpoint is None else {shard.file: shard for shard in checkpoint.shards}
    if name not in shards:
        raise Damaged(path, "it is in no manifest")
    check_file(path, shards[name].nbytes, shards[name].digest)
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            return Contents(tensors={name: file.get_tensor(name) for name in file.keys()}, values=values)
    except (*_DAMAGE, SafetensorError) as error:
        raise Damaged(path, f"it cannot be read: {error}") from None


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Around taking up what a checkpoint holds; an InputError names it if that is of another size."""
    try:
        yield
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"the checkpoint {path} does not fit: {error}; delete it to start anew") from None


def commit(checkpoint: Checkpoint) -> None:
    """Write the manifest, which makes it whole, and delete those before it but for the last whole one.

    An InputError if it cannot be written; the others are still there.
    """
    body = asdict(checkpoint)
    del body["folder"]
    text = json.dumps({"digest": _digest_of(body), "manifest": body}, indent=1) + "\n"
    path = checkpoint.folder / _MANIFEST
    with atomic_write(path, _WHAT, _ADVICE) as file:
        file.write(text.encode())
    older = [other for other in _folders(checkpoint.folder.parent) if other.name < checkpoint.folder.name]
    spare = max((other for other in older if (other / _MANIFEST).exists()), default=None)
    for other in older:
        if other != spare:
            shutil.rmtree(other, ignore_errors=True)


def newest(
    folder: Path,
    *,
    stored: int | None = None,
    on_damage: Callable[[Path, Damaged], None] = lambda place, damage: None,
) -> Checkpoint | None:
    """The newest whole checkpoint of a request, if any, that comes after no more than the `stored` chunks.

    All its files are read. One that is damaged is passed over, and its folder given to `on_damage`.
    """
    for place in sorted(_folders(folder), reverse=True):
        try:
            found = _load(place)
            if found is None or (stored is not None and found.counts["chunks"] > stored):
                continue
            for shard in found.shards:
                check_file(place / shard.file, shard.nbytes, shard.digest)
        except Damaged as damage:
            on_damage(place, damage)
            continue
        return found
    return None


def furthest(folder: Path) -> int:
    """The last quantum that a checkpoint of a request goes on with, whole or not; 0 if there is none."""
    return max((int(place.name.split("-")[1]) for place in _folders(folder)), default=0)


def discard(folder: Path, *, whole: bool = True) -> None:
    """Delete all checkpoints of a request; those alone that were never finished, if not the `whole` ones too."""
    for place in _folders(folder):
        if whole or not (place / _MANIFEST).exists():
            shutil.rmtree(place, ignore_errors=True)


class Checkpointer:
    """Keeps how far one video is, at its chunk boundaries: one checkpoint at a time, from its snapshot to its manifest.

    A snapshot is taken when a quantum is about to begin. The checkpoint is whole once every rank has its file on the
    disk and the chunks that were finished before it are in safe hands; only then is the manifest written. The next
    snapshot waits until then, so a slow disk holds up this video and nothing else.
    """

    def __init__(
        self,
        config: CheckpointConfig,  # where and how often
        fingerprint: Callable[[int], Mapping[str, Any]],  # of what must be the same for the state before a quantum
        last: int,  # the quantum that a longer video would go on with
        start: int,  # the quantum that the video has begun with
        save: Callable[[Path], Mapping[str, int]],  # takes a snapshot, begins to write it, gives counts so far
        saved: Callable[[], tuple[Shard, ...] | None],  # the last one's files, once on the disk
    ) -> None:
        self.folder, self._every = config.folder, config.every
        self.fingerprint = fingerprint
        self._start, self._last = start, last if config.extend else None
        self._save, self._saved = save, saved
        self._pending: Checkpoint | None = None
        self.writing = False  # some rank has a file that is not on the disk yet

    @property
    def waits(self) -> bool:
        """Something has to be written before the video may end: its folder may be deleted, or go on, after that."""
        return self.writing or (self._last is not None and self._pending is not None)

    def due(self, quantum: int) -> bool:
        """Whether there is to be a checkpoint before a quantum."""
        if quantum <= self._start or (self._last is not None and quantum > self._last):
            return False
        return quantum % self._every == 0 or quantum == self._last

    def reached(self, quantum: int) -> bool:
        """Take the snapshot; False while the one before is not whole, to be asked again."""
        if self._pending is not None:
            return False
        folder = new_folder(self.folder, quantum)
        counts, fingerprint, self.writing = self._save(folder), self.fingerprint(quantum), True
        self._pending = Checkpoint(folder=folder, quantum=quantum, counts=counts, fingerprint=fingerprint, shards=())
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


def _folders(folder: Path) -> list[Path]:
    try:
        return [place for place in folder.absolute().iterdir() if _FOLDER.fullmatch(place.name)]
    except OSError:
        return []


def _load(folder: Path) -> Checkpoint | None:
    """What the manifest says, None without one; a Damaged if it is not as it was written."""
    path = folder / _MANIFEST
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is not a file")
        loaded = json.loads(path.read_text())
        body = loaded["manifest"]
        if loaded["digest"] != _digest_of(body):
            raise Damaged(path, "it does not match its checksum")
        shards = tuple(Shard(**shard) for shard in body.pop("shards"))
        return Checkpoint(folder=folder, shards=shards, **body)
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        raise Damaged(path, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _write(path: Path, contents: Contents) -> Shard:
    with atomic_name(path, _WHAT, _ADVICE, (SafetensorError,)) as part:
        path.parent.mkdir(exist_ok=True)
        with torch.no_grad():
            save_file(dict(contents.tensors), part, metadata={"values": json.dumps(dict(contents.values))})
        return Shard(file=path.name, nbytes=part.stat().st_size, digest=digest_of_file(part))


def _digest_of(body: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(body, sort_keys=True).encode()).hex()
