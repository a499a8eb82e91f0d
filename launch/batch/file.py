"""Reading a batch file: one JSON object per line, each a video; a broken line does not stop the others.

A line is checked as `flowcache generate` checks its options, and gets a file name that says what the video depends on.
How videos are made, and which of them are there already, is the business of others.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.output.files import file_errors
from launch.plan import Options, Plan, plan_model, plan_video
from models.errors import InputError

DIGEST_LENGTH = 12
"""Hexadecimal digits in a file name: 48 bits, so that even 100,000 videos do not meet."""
_SLUG_LENGTH = 40
_DIGEST_FORM = 1  # to be raised when the same options begin to make another video


class BatchLine(BaseModel):
    """What a line may say; what it leaves out is as on the command line."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=10_000)
    seconds: float | None = Field(default=None, gt=0, le=1e6)
    chunks: int | None = Field(default=None, ge=1, le=1_000_000)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    image: str | None = Field(default=None, min_length=1)
    video: str | None = Field(default=None, min_length=1)
    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000)
    height: int | None = Field(default=None, ge=1, le=16_384)
    width: int | None = Field(default=None, ge=1, le=16_384)
    steps: int | None = Field(default=None, ge=1, le=10_000)
    name: str | None = Field(default=None, min_length=1, max_length=200)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchItem:
    """A video to make."""

    line: int  # of the file, counted from 1
    priority: int  # higher goes first
    digest: str  # of all that the video depends on. Of several equal lines each has its own
    chunks: int  # length
    options: Options  # checked; `plan_video` makes a plan of them, and their `out` is the file to write

    @property
    def name(self) -> str:
        """Of the file."""
        return self.options.out.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A line that cannot be used."""

    line: int  # of the file, counted from 1
    message: str  # one line that says what is wrong, where, and what to do


def read_batch(path: Path, base: Options, out: Path) -> tuple[list[BatchItem], list[Problem]]:
    """Read a batch file. Blank lines are skipped.

    Args:
        path: of the file; paths in it are relative to its folder.
        base: options that hold where a line says nothing; its prompt and target do not matter.
        out: folder of the videos; it is there.

    Returns:
        What can be made and what cannot be read, both in the order of the lines.

    Raises:
        InputError: the file itself cannot be read, or there is no such model.
    """
    plan_model(base)  # what is wrong for all lines is said once
    items: list[BatchItem] = []
    problems: list[Problem] = []
    reader = _Reader(path.parent, base, out)
    for number, raw in enumerate(_lines(path), start=1):
        try:
            if raw.strip():
                items.append(reader.item(number, raw))
        except InputError as error:
            problems.append(Problem(line=number, message=f"{path} line {number}: {_plain(str(error))}"))
    return items, problems


def _lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the batch file {path}: {error.strerror or error}") from None
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors begin a file with a byte order mark


class _Reader:
    """Turns lines into items; knows which were there before."""

    def __init__(self, folder: Path, base: Options, out: Path) -> None:
        self._folder, self._base, self._out = folder, base, out
        self._seen: Counter[str] = Counter()
        self._media: dict[Path, str] = {}

    def item(self, number: int, raw: bytes) -> BatchItem:
        line = _parse(raw)
        options = self._options(number, line)
        try:
            plan = plan_video(options)
        except (ValueError, OverflowError, OSError) as error:  # of values that only a library refuses
            raise InputError(str(error)) from None
        same = self._digest(plan, options, 0)
        digest = self._digest(plan, options, self._seen[same]) if self._seen[same] else same
        self._seen[same] += 1
        name = f"{number:03}-{_slug(line.name or line.prompt)}-{digest}.mp4"
        return BatchItem(
            line=number,
            priority=line.priority,
            digest=digest,
            chunks=plan.request.chunks,
            options=replace(options, out=self._out / name),
        )

    def _options(self, number: int, line: BatchLine) -> Options:
        """The line on top of the base. What it says of length or start takes the place of both ways to say it."""
        base = self._base
        has_length, has_start = (line.seconds, line.chunks) != (None, None), (line.image, line.video) != (None, None)
        return replace(
            base,
            prompt=line.prompt,
            out=self._out / f"{number:03}.mp4",
            seed=base.seed if line.seed is None else line.seed,
            seconds=line.seconds if has_length else base.seconds,
            chunks=line.chunks if has_length else base.chunks,
            image=self._path(line.image) if has_start else base.image,
            video=self._path(line.video) if has_start else base.video,
            height=base.height if line.height is None else line.height,
            width=base.width if line.width is None else line.width,
            steps=base.steps if line.steps is None else line.steps,
            record=None,
        )

    def _path(self, given: str | None) -> Path | None:
        return None if given is None else self._folder / Path(given).expanduser()

    def _digest(self, plan: Plan, options: Options, repeat: int) -> str:
        """Of all that the video depends on, as far as the command line can know it.

        Args:
            plan: the video, with what the line left out filled in: a default that is written out changes nothing.
            options: that the plan was made of.
            repeat: how many equal lines come before this one.
        """
        request = plan.request
        what = {
            "form": _DIGEST_FORM,
            "repeat": repeat,
            "prompt": request.prompt,
            "seed": request.seed,
            "chunks": request.chunks,
            "size": [request.height, request.width],
            "steps": request.num_steps,
            "image": self._content(options.image),
            "video": self._content(options.video),
            "model": asdict(plan.config),
            "weights": None if plan.weights is None else str(plan.weights.resolve()),
            "attention": plan.loading.attention,
            "precise": plan.loading.precise,
            "cache": asdict(plan.cache),
            "kv": asdict(plan.kv),
        }
        text = json.dumps(what, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]

    def _content(self, path: Path | None) -> str | None:
        if path is None:
            return None
        if path not in self._media:
            with file_errors(path), path.open("rb") as file:
                self._media[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._media[path]


def _parse(raw: bytes) -> BatchLine:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("this is not UTF-8 text: save the file as UTF-8") from None
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise InputError(f"this is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"this cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError('this is no JSON object: write {"prompt": "..."}')
    try:
        line = BatchLine.model_validate(found)
    except ValidationError as error:
        raise InputError("; ".join(_complaint(one) for one in error.errors())) from None
    for one, other, what in (("seconds", "chunks", "how long it is"), ("image", "video", "what it starts from")):
        if getattr(line, one) is not None and getattr(line, other) is not None:
            raise InputError(f"{one} and {other} both say {what}: give one of them")
    return line


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise InputError(f"the key {twice[0]!r} is there twice: leave one of them out")
    return dict(pairs)


def _complaint(error: Any) -> str:
    """One of pydantic's errors, for people."""
    if not error["loc"]:  # a key with half a character
        return f"the key {_short(error['input'])} is no text"
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"there is no key {key!r}: known are {', '.join(BatchLine.model_fields)}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    text = str(error["msg"])
    return f"{key}: {text[:1].lower()}{text[1:]}, not {_short(error['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(text: str) -> str:
    """On one line, and without what would move a cursor."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _slug(text: str) -> str:
    """A text as part of a file name: small letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_LENGTH].strip("-") or "video"
