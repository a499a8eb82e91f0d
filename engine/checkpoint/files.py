"""Checkpoints of a video on disk: one file for each rank, one for the run, and a manifest that comes last.

A folder belongs to one request. Each checkpoint is a folder in it, `quantum-<quantum>-<token>`: it goes on with that
quantum, and the token keeps apart what two attempts at the same quantum write. One without a manifest does not exist.
Files appear whole: they are written beside their place, flushed to the disk, and renamed. The manifest has size and
digest of every file, and a digest of itself. Once it is there, all others are deleted. What is written does not grow
with the length of the video. The module knows files only, not what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import InputError

_MANIFEST = "manifest.json"
_PLACE = re.compile(r"quantum-(\d{8})-[0-9a-f]{8}")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a manifest that is not whole can raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where and how often.

    Raises:
        InputError: `every` is not positive.
    """

    folder: Path  # of this request alone; all ranks must reach it. Whoever asks for checkpoints deletes it in the end
    every: int  # a checkpoint is made each time this many chunks have entered the window (or would have, at the end)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"a checkpoint every {self.every} chunks cannot be: give 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a file holds: tensors on the CPU by name, and plain JSON values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file that is on the disk."""

    file: str  # its name in the checkpoint's folder
    nbytes: int
    digest: str  # of its bytes, as hexadecimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole checkpoint."""

    place: Path  # its own folder
    quantum: int  # the quantum that it goes on with
    counts: Mapping[str, int]  # of the run so far; `chunks` is the index of the first chunk that will be handed out
    fingerprint: Mapping[str, Any]  # of all that must be the same when it is taken up
    shards: tuple[Shard, ...]

    def check_fits(self, fingerprint: Mapping[str, Any]) -> None:
        """Compare what it was made with to what there is now.

        Raises:
            InputError: they differ; the text says in what.
        """
        for part in sorted({*self.fingerprint, *fingerprint}):
            then, now = self.fingerprint.get(part), fingerprint.get(part)
            if then == now:
                continue
            both = f": {json.dumps(then)}, now {json.dumps(now)}"
            raise InputError(
                f"the checkpoint {self.place} was made with another {part}{both if len(both) < 200 else ''}; "
                "go on as it was made, or delete it"
            )


class AsyncSave:
    """Files on their way to the disk, in a thread of its own.

    Args:
        place: the checkpoint's folder, which is made if need be.
        files: what to write, by name.
        on_done: called in the thread in the end, well or not.
    """

    def __init__(self, place: Path, files: Mapping[str, Contents], on_done: Callable[[], None] = lambda: None) -> None:
        self._place, self._files, self._on_done = place, files, on_done
        self._shards: tuple[Shard, ...] = ()
        self._error: InputError | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writing {place.name}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `shards` would not wait."""
        return self._done.is_set()

    def shards(self) -> tuple[Shard, ...]:
        """The files, once they are on the disk.

        Raises:
            InputError: one cannot be written; the text names it.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._shards

    def _run(self) -> None:
        try:
            self._shards = tuple(_write_contents(self._place / name, what) for name, what in self._files.items())
        except InputError as error:
            self._error = error
        finally:
            self._files = {}
            self._done.set()
            self._on_done()


def new_place(folder: Path, quantum: int) -> Path:
    """Where a new checkpoint goes that will go on with a quantum; nothing is made yet."""
    return folder.absolute() / f"quantum-{quantum:08d}-{secrets.token_hex(4)}"


def read_contents(path: Path) -> Contents:
    """Read a file of a checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            return Contents(tensors={name: file.get_tensor(name) for name in file.keys()}, values=values)
    except (*_DAMAGE, SafetensorError) as error:
        raise InputError(f"cannot read the checkpoint file {path}: {error}") from None


def commit(checkpoint: Checkpoint) -> None:
    """Write the manifest, which makes it whole, and delete all others of its request.

    Raises:
        InputError: it cannot be written; the others are still there.
    """
    body = {
        "quantum": checkpoint.quantum,
        "counts": dict(checkpoint.counts),
        "fingerprint": dict(checkpoint.fingerprint),
        "shards": [asdict(shard) for shard in checkpoint.shards],
    }
    text = json.dumps({"digest": _digest_of(body), "manifest": body}, indent=1) + "\n"
    path = checkpoint.place / _MANIFEST
    part = path.with_name(f".{_MANIFEST}.part")
    try:
        part.write_text(text)
        _settle(part, path)
        _flush(checkpoint.place.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    for place in _places(checkpoint.place.parent):
        if place != checkpoint.place:
            shutil.rmtree(place, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a request; all of its files are read once, to see that they are undamaged.

    Returns:
        It; None where there is none. Damaged ones are passed over.
    """
    for place in sorted(_places(folder), reverse=True):
        found = _load_manifest(place)
        if found is not None and all(_is_whole(place, shard) for shard in found.shards):
            return found
    return None


def discard(folder: Path) -> None:
    """Delete all checkpoints of a request, whole or not."""
    for place in _places(folder):
        shutil.rmtree(place, ignore_errors=True)


def _places(folder: Path) -> list[Path]:
    try:
        return [place for place in folder.absolute().iterdir() if _PLACE.fullmatch(place.name)]
    except OSError:
        return []


def _load_manifest(place: Path) -> Checkpoint | None:
    try:
        loaded = json.loads((place / _MANIFEST).read_text())
        body = loaded["manifest"]
        if loaded["digest"] != _digest_of(body):
            return None
        return Checkpoint(
            place=place,
            quantum=int(body["quantum"]),
            counts={str(name): int(count) for name, count in body["counts"].items()},
            fingerprint=dict(body["fingerprint"]),
            shards=tuple(Shard(**shard) for shard in body["shards"]),
        )
    except _DAMAGE:
        return None


def _is_whole(place: Path, shard: Shard) -> bool:
    try:
        path = place / shard.file
        return path.stat().st_size == shard.nbytes and _digest(path) == shard.digest
    except OSError:
        return False


def _write_contents(path: Path, contents: Contents) -> Shard:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            save_file(dict(contents.tensors), part, metadata={"values": json.dumps(dict(contents.values))})
        shard = Shard(file=path.name, nbytes=part.stat().st_size, digest=_digest(part))
        _settle(part, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise _unwritable(path, error) from None
    return shard


def _settle(part: Path, path: Path) -> None:
    """Let a file that was written beside its place appear there, once it is on the disk."""
    _flush(part)
    os.replace(part, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(
        f"cannot write the checkpoint file {path}: {reason}; make room there or choose another folder. "
        "The checkpoint before it, if there is one, is still whole"
    )


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    digest = _new_hash()
    digest.update(json.dumps(body, sort_keys=True).encode())
    return str(digest.hexdigest())
