"""Finding the parts of a model in folders as they are downloaded."""

from collections.abc import Sequence
from pathlib import Path


def first_with(folders: Sequence[Path], holds: str, what: str, missing: list[str]) -> Path | None:
    """The first folder that holds something of that name; if there is none, `missing` gets a line with the places."""
    for folder in folders:
        if (folder / holds).exists():
            return folder
    # Of the many folders around, those that exist are where somebody would put it.
    places = [folder for folder in folders if folder.parent.is_dir()] or list(folders)
    missing.append(f"no {what} in {', '.join(dict.fromkeys(str(place) for place in places))}")
    return None
