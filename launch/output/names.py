"""What the name of a video says of its file. PyAV, which makes the file, is not needed for that."""

from pathlib import Path

from models.errors import InputError

STREAM = Path("-")
"""In place of a file: standard output."""
FOLDER = ""
"""The ending that stands for a folder of png."""
SUFFIXES = (".mp4", ".webm", ".gif")


def suffix_of(name: str) -> str:
    """The ending that says what a file of that name is to be; an InputError names those that there are."""
    if name.endswith("/"):
        return FOLDER
    if Path(name) == STREAM:
        return ".mp4"
    if (suffix := Path(name).suffix.lower()) not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise InputError(f"cannot write {name}: the name of the video must end in {known}, or in / for a folder of png")
    return suffix
