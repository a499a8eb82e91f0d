"""Files that are written whole: checked before the work that fills them, and there only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(path: Path, *, suffix: str, what: str) -> None:
    """See that a file can be written there, by making and removing one in the same folder.

    Args:
        path: of the file.
        suffix: what its name must end in.
        what: it is, for people.

    Raises:
        InputError: the name ends otherwise, the folder is missing or not writable, or the name is taken by something
            that is not a file.
    """
    if path.suffix.lower() != suffix:
        raise InputError(f"cannot write {path}: the name of the {what} must end in {suffix}")
    with file_errors(path):
        if not path.parent.exists():
            raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: {path.parent} is not a folder")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: there is something of that name that is not a file")
        _try(path.parent, path.name)


def check_folder(folder: Path) -> None:
    """See that a folder can be filled, or made where it is missing. Nothing is left behind.

    Raises:
        InputError: it cannot, or a part of its path is a file.
    """
    with file_errors(folder):
        standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not standing.is_dir():
            raise InputError(f"cannot write {folder}: {standing} is not a folder")
        _try(standing, folder.name)


def part_of(path: Path) -> Path:
    """The hidden name beside a file that it is written under; different for every process."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def file_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Quantum errors of the system into one line about the file.

    Args:
        path: that is written.
        kinds: errors to treat likewise.
    """
    expected: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except expected as error:
        code = getattr(error, "errno", None)
        if code in _FULL:
            reason = "no space left there (the unfinished file was removed)"
        else:
            reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {path}: {reason}") from None


def _try(folder: Path, name: str) -> None:
    part = folder / f".{name}.{os.getpid()}.part"
    try:
        part.touch()
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
