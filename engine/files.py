"""Files that appear whole: written under a hidden name beside their place, flushed to the disk, and renamed.

The hidden name carries the machine and the number of the process, which tell the remains of a killed process from a
file that another one is writing, here or on another machine that shares the folder.

What is read back later has a checksum, BLAKE2b of all its bytes: at its end (`write_sealed`), or in a list of files
(`digest_of_file`, `check_file`). It is checked before anything in the file is believed.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.machine import runs, this_machine
from models.errors import InputError

_PART = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)\.part")
_PARTIAL = ".partial.mp4"
_LONG, _BEGINNING = 200, 40  # bytes of a name, of 255; characters that stay of a longer one
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIGEST_BYTES = 16
_REMOVALS = 3
_NUMBER = re.compile(r"\(os error (\d+)\)|requested and \d+ written")  # as libraries in Rust and NumPy say it


class DiskFull(InputError):
    """There is no room for a file. Another one may fit elsewhere, but here it is of no use to go on."""


class Damaged(Exception):  # noqa: N818 - reads as what it says
    """A file that is read back is not as it was written. The line names it and says `what` is wrong with it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} is damaged: {what}")


def part_of(path: Path) -> Path:
    """The hidden name that a file is written under; different for every process of every machine.

    Of a long name it has the beginning and a digest, so that every name that fits into a folder can be written.
    """
    return path.with_name(f".{_short(path.name)}.{_machine()}-{os.getpid()}.part")


def partial_of(path: Path) -> Path:
    """The name beside a video's that shows what there is of it while it is made; shortened likewise."""
    return path.with_name(f"{_short(path.stem)}{_PARTIAL}")


def _short(name: str) -> str:
    if len(os.fsencode(name)) <= _LONG:
        return name
    return f"{name[:_BEGINNING]}-{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}"


def link_file(source: str, target: str) -> None:
    """Give a file that is never written into another name; on a disk without links, a copy of it.

    What has that name already is replaced: a process that was killed may have left it.
    """
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove_folder(folder: Path) -> None:
    """Remove a folder into which others may still be about to write.

    It is renamed first. So nothing comes under its name any more, unless somebody makes the folder itself again.
    """
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        os.replace(folder, part)
    except OSError:  # it is gone, or a disk of its own
        shutil.rmtree(folder, ignore_errors=True)
    for _ in range(_REMOVALS):  # what was begun within it just before may still appear
        shutil.rmtree(part, ignore_errors=True)
        if not part.exists():
            return


@contextlib.contextmanager
def atomic_name(
    path: Path, what: str = "", advice: str = "", kinds: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """A hidden name for a file that appears under `path` when the context ends well, and leaves nothing otherwise.

    An older file is replaced. If it cannot be written, an InputError names it, `what` it is and what to do; errors of
    libraries count that are of these `kinds`.
    """
    part = part_of(path)
    with write_errors(path, what, kinds, advice):
        try:
            yield part
            _flush(part)
            os.replace(part, path)
            _flush(path.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path, what: str = "", advice: str = "") -> Iterator[BinaryIO]:
    """A binary file that appears as in `atomic_name`."""
    with atomic_name(path, what, advice) as part, part.open("wb") as file:
        yield file


def digest_of(content: bytes | memoryview) -> bytes:
    """The checksum of some bytes."""
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def digest_of_file(path: Path) -> str:
    """The checksum of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def check_file(path: Path, nbytes: int, digest: str) -> None:
    """See that a file is as it was written; a Damaged if it is not."""
    with _read_errors(path):
        if (found := path.stat().st_size) != nbytes:
            raise Damaged(path, f"it has {found:,} of its {nbytes:,} bytes")
        if digest_of_file(path) != digest:
            raise Damaged(path, "it does not match its checksum")


def write_sealed(path: Path, content: bytes | memoryview) -> None:
    """Write a file with its checksum at the end; errors as in `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)
        file.write(digest_of(content))


def read_sealed(path: Path, most: int) -> bytes:
    """What `write_sealed` was given, at `most` so many bytes; a Damaged if the file is missing or another one."""
    with _read_errors(path):
        if (size := path.stat().st_size) > most + _DIGEST_BYTES:
            raise Damaged(path, f"it has {size:,} bytes, more than were ever written")
        content = path.read_bytes()
    body, seal = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if digest_of(body) != seal:
        raise Damaged(path, "it does not match its checksum" if content else "it is empty")
    return body


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise Damaged(path, "it is not a file")
        yield
    except OSError as error:
        raise Damaged(path, f"it cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def write_errors(
    path: Path, what: str = "", kinds: tuple[type[Exception], ...] = (), advice: str = ""
) -> Iterator[None]:
    """Turn errors of the system, and `kinds` of libraries, into one line about the file and what it is."""
    expected: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except expected as error:
        start = f"cannot write {what + ' ' if what else ''}{path}"
        if _number(error) in _FULL:
            text = f"{start}: no space left there, {_free(path)} (the unfinished file was removed){advice}"
            raise DiskFull(text) from None
        raise InputError(f"{start}: {getattr(error, 'strerror', None) or str(error)}{advice}") from None


def _number(error: Exception) -> int | None:
    """The system's number of an error, if it has one."""
    if (found := _NUMBER.search(str(error))) is not None:
        return int(found[1] or errno.ENOSPC)
    return getattr(error, "errno", None)


def _free(path: Path) -> str:
    try:
        existing = next(place for place in path.absolute().parents if place.exists())
        return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB are free"
    except (OSError, StopIteration):
        return "nobody knows how much is free"


def check_target(path: Path, *, suffix: str | None, what: str) -> None:
    """See that a file can be written there, by making and removing one in the same folder; an InputError if not.

    What killed processes of this machine have left unfinished in that folder is removed. The name must end in `suffix`,
    if that is not None, and may be taken by a file only; `what` says what it is, for people.
    """
    if suffix is not None and path.suffix.lower() != suffix:
        raise InputError(f"cannot write {path}: the name of the {what} must end in {suffix}")
    with write_errors(path):
        if not path.parent.exists():
            raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: {path.parent} is not a folder")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: there is something of that name that is not a file")
        _try(path.parent)
    remove_stale_parts(path.parent)


def check_folder(folder: Path) -> None:
    """See that a folder can be filled, or made if missing, and leave nothing behind; an InputError if it cannot."""
    with write_errors(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"cannot write {folder}: {existing} is not a folder")
        _try(existing)
    if existing == folder:
        remove_stale_parts(folder)


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):  # without a name, where the system has such files: nothing can be left
        pass


def remove_stale_parts(folder: Path) -> None:
    """Remove what processes of this machine that are gone have left unfinished. Of others nothing is known."""
    machine = _machine()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _PART.fullmatch(path.name)
            if found is not None and found[1] == machine and not runs(int(found[2])):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in folder.glob(f"*{_PARTIAL}"):
            if path.is_symlink() and not path.exists() and _PART.fullmatch(path.readlink().name):
                path.unlink(missing_ok=True)


def _machine() -> str:
    return hashlib.blake2b(this_machine().encode(), digest_size=4).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
