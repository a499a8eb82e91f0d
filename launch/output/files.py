"""Checks of where something is to be written, before the work that fills it; `engine/files.py` writes."""

from __future__ import annotations

import contextlib
from pathlib import Path

from engine.files import part_of, remove_stale_parts, write_errors
from models.errors import InputError


def check_target(path: Path, *, suffix: str, what: str) -> None:
    """See that a file can be written there, by making and removing one in the same folder.

    What processes that were killed have left unfinished in that folder is removed. The name must end in `suffix`;
    `what` says what it is, for people.

    Raises:
        InputError: the name ends otherwise, the folder is missing or not writable, or the name is taken by something
            that is not a file.
    """
    if path.suffix.lower() != suffix:
        raise InputError(f"cannot write {path}: the name of the {what} must end in {suffix}")
    with write_errors(path):
        if not path.parent.exists():
            raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: {path.parent} is not a folder")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: there is something of that name that is not a file")
        _try(path)
    remove_stale_parts(path.parent)


def check_folder(folder: Path) -> None:
    """See that a folder can be filled, or made where it is missing. Nothing is left behind.

    Raises:
        InputError: it cannot, or a part of its path is a file.
    """
    with write_errors(folder):
        standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not standing.is_dir():
            raise InputError(f"cannot write {folder}: {standing} is not a folder")
        _try(standing / (folder.name or "folder"))
    if standing == folder:
        remove_stale_parts(folder)


def _try(path: Path) -> None:
    part = part_of(path)
    try:
        part.touch()
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
