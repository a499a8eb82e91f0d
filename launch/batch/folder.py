"""The folder of a batch: which videos are there, and a line of results for each.

It knows files and names; what a video depends on is in its name, and `launch/batch/file.py` has put it there.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import struct
from pathlib import Path
from typing import Self

from engine.files import check_folder, write_errors
from launch.output.display import Row, State
from launch.resume.saved import DIGEST_LENGTH
from models.errors import InputError

RESULTS = "results.jsonl"
_HEADER_BYTES = 1024  # of an array in a file, and more
_VIDEO = re.compile(rf"\d{{3,}}-.+-([0-9a-f]{{{DIGEST_LENGTH}}})\.mp4")
_BOX = struct.Struct(">I4sQ")  # length, kind, and the real length where the first is 1


class OutputFolder:
    """The folder while a batch is made, as a context; made if it is missing. Only one batch at a time can have it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.done: set[str] = set()
        """Digests of the whole videos that were there at the start, whatever the rest of their names."""
        self.recorded: set[str] = set()
        """Those of videos that the results say are done. A command that was killed may have left one out."""

    def __enter__(self) -> Self:
        """Take the folder, unless another batch has it; what killed processes have left unfinished is removed."""
        check_folder(self._folder)
        with write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._results = _open_results(self._folder / RESULTS)
            for path in self._folder.iterdir():
                if (video := _VIDEO.fullmatch(path.name)) and is_whole(path):
                    self.done.add(video[1])
            lines = (self._folder / RESULTS).read_bytes().split(b"\n")
            self.recorded |= {digest for line in lines if (digest := _done(line))}
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()

    def record(self, row: Row, *, name: str, seconds: float) -> None:
        """Add a video to the results, `seconds` after its first admission. The line is there as a whole or not at all.

        Raises:
            InputError: it cannot be written; what is there already is kept.
        """
        result = {
            "name": name,
            "line": row.line,
            "prompt": row.title,
            "status": "failed" if row.state is State.FAILED else "done",
            "seconds": seconds,
            "chunks": row.chunks_done,
            "computed": row.computed,
            "gang": row.gang,
            "restarts": row.restarts,
            "error": row.error,
        }
        line = json.dumps(result).encode() + b"\n"
        with write_errors(self._folder / RESULTS):
            end = self._results.seek(0, os.SEEK_END)
            try:
                if self._results.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._results.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._results.truncate(end)
                raise


def is_whole(path: Path) -> bool:
    """Whether a file is a complete MP4: its boxes fill it to the last byte, and the index of frames is among them.

    The form of boxes is that of ISO/IEC 14496-12, section 4.2.
    """
    at, found = 0, False
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while at < size:
                file.seek(at)
                length, kind, large = _BOX.unpack(file.read(_BOX.size).ljust(_BOX.size, b"\0"))
                length = large if length == 1 else length
                if length < 8:
                    return False
                found |= kind == b"moov"
                at += length
    except OSError:
        return False
    return found and at == size


def _open_results(path: Path) -> io.FileIO:
    file = io.FileIO(path, "a+")  # without a buffer, which would keep what a full disk has refused
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"another batch is writing to {path.parent}: wait for its end, or give another folder with --out"
        ) from None
    # A batch that was killed while it wrote may have left part of a line.
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def _done(line: bytes) -> str | None:
    """The digest of a video, if a line of results says that it is done; anybody may have written to that file."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        result = json.loads(line)
        if result["status"] == "done" and (video := _VIDEO.fullmatch(result["name"])):
            return video[1]
    return None
