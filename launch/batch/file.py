"""Reading a batch file: one JSON object per line, each a video; a broken line does not stop the others.

A line is checked as `flowcache generate` checks its options, and gets a file name that says what the video depends on.
How videos are made, and which of them are there already, is the business of others.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from launch.media import Bounds
from launch.model.resolve import plan_model
from launch.option_fields import declared
from launch.options import Options, threads_of_a_rank
from launch.output.display import one_line
from launch.plan import Plan, plan_video, slug
from launch.resume.saved import video_digest
from models.errors import InputError

_OF_LINES = tuple(one for one in declared(Options) if one.line or one.name in ("cache", "kv_budget"))
"""Options of a line: those of a video, and of how a gang makes it those that may differ from one to the next."""
_EITHER = {("seconds", "chunks"): "how long it is", ("image", "video"): "what it starts from"}


def _line_model() -> type[BaseModel]:
    """What a line may say: options, a priority and a name."""
    keys: dict[str, Any] = {"prompt": (str, Field(min_length=1, max_length=10_000))}
    for one in _OF_LINES:
        path, (low, high) = one.value_type is Path, one.within or (None, None)
        limits = Field(default=None, ge=low, le=high, min_length=1 if path else None)
        keys[one.name] = ((str if path else one.value_type) | None, limits)
    keys["priority"] = (int, Field(default=0, ge=-1_000_000, le=1_000_000))
    keys["name"] = (str | None, Field(default=None, min_length=1, max_length=200))
    config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    return create_model("BatchLine", __config__=config, **keys)


_LINE = _line_model()


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchItem:
    """A video to make."""

    line: int  # of the file, counted from 1
    priority: int  # higher goes first
    digest: str  # of all that the video depends on. Of several equal lines each has its own
    plan: Plan  # checked; its `out` is the file to write


def read_batch(path: Path, base: Options, out: Path) -> tuple[list[BatchItem], dict[int, str]]:
    """Read a batch file. Blank lines are skipped, paths in it are relative to its folder.

    The options `base` hold where a line says nothing; `out` is the folder of the videos, and is there.

    Returns:
        What can be made, in the order of the lines; and by the number of each line that cannot be used, one line that
        says what is wrong, where, and what to do.

    Raises:
        InputError: the file itself cannot be read, or there is no such model.
    """
    plan_model(base)  # what is wrong for all lines is said once
    items: list[BatchItem] = []
    problems: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for number, raw in enumerate(_lines(path), start=1):
        try:
            if raw.strip():
                items.append(_item(number, check_line(read_object(raw)), path.parent, base, out, seen))
        except InputError as error:
            problems[number] = f"{path} line {number}: {one_line(str(error))}"
    return items, problems


def _lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the batch file {path}: {error.strerror or error}") from None
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors begin a file with a byte order mark


def _item(number: int, line: dict[str, Any], folder: Path, base: Options, out: Path, seen: Counter[str]) -> BatchItem:
    plan = plan_line(line, folder, base, out=out)
    threads = threads_of_a_rank(plan.options)
    first = video_digest(plan, threads)
    digest = video_digest(plan, threads, seen[first]) if seen[first] else first
    seen[first] += 1
    name = f"{number:03}-{slug(line.get('name') or line['prompt']) or 'video'}-{digest}.mp4"
    return BatchItem(line=number, priority=line.get("priority", 0), digest=digest, plan=replace(plan, out=out / name))


def plan_line(line: dict[str, Any], folder: Path, base: Options, *, out: Path, bounds: Bounds | None = None) -> Plan:
    """The plan of a line that was checked; what it starts from is read within bounds. Errors as in `plan_video`."""
    try:
        return plan_video(line_options(line, folder, base), out=out, bounds=bounds)
    except (ValueError, OverflowError, OSError) as error:  # of values that only a library refuses
        raise InputError(str(error)) from None


def line_options(line: dict[str, Any], folder: Path, base: Options) -> Options:
    """The line on top of the base. What it says of length or start takes the place of both ways to say it."""
    given = {one.name: line[one.name] for one in _OF_LINES if one.name in line}
    for pair in _EITHER:
        if not given.keys().isdisjoint(pair):
            given = {**dict.fromkeys(pair), **given}
    for name in ("image", "video", "script"):
        if given.get(name) is not None:
            given[name] = folder / Path(given[name]).expanduser()
    return replace(base, prompts=[line["prompt"]], **given)


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object; an `InputError` says why it is none."""
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
    return found


def check_line(found: dict[str, Any]) -> dict[str, Any]:
    """What a line says; what it leaves out, or leaves to the command line with null, is not there."""
    try:
        line = _LINE.model_validate(found).model_dump(exclude_none=True)
    except ValidationError as error:
        raise InputError(complaints(error, _LINE)) from None
    for (one, other), what in _EITHER.items():
        if one in line and other in line:
            raise InputError(f"{one} and {other} both say {what}: give one of them")
    return line


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise InputError(f"the key {twice[0]!r} is there twice: leave one of them out")
    return dict(pairs)


def complaints(error: ValidationError, model: type[BaseModel]) -> str:
    """Pydantic's errors of a model, for people."""
    return "; ".join(_complaint(one, model) for one in error.errors())


def _complaint(error: Any, model: type[BaseModel]) -> str:
    if not error["loc"]:  # a key with half a character
        return f"the key {_short(error['input'])} is no text"
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"there is no key {key!r}: known are {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    text = str(error["msg"])
    return f"{key}: {text[:1].lower()}{text[1:]}, not {_short(error['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
