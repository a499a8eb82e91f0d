"""Configurations from JSON files as checked, frozen dataclasses."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import InputError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Of a dataclass of numbers: unknown keys, infinities and NaN are errors."""
Count = Annotated[int, Field(ge=1, le=1_000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Pixels = Annotated[int, Field(ge=16, le=16_384)]

_Checked = TypeVar("_Checked")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; `what` names it in errors. An `InputError` if the file cannot be read, or
    holds something else."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a JSON object")
    return values


def checked(kind: type[_Checked], values: dict[str, Any], *, source: str) -> _Checked:
    """A pydantic dataclass of decoded values. An `InputError` has the first that does not fit, as
    `source: field: problem`."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        found = error.errors()
    first = found[0]
    where = ".".join(str(part) for part in first["loc"])
    said = re.sub(r"^Value error, | or an instance of \w+", "", first["msg"])
    what = {"missing": "key is missing", "unexpected_keyword_argument": "unknown key"}.get(first["type"], said)
    more = f" (and {len(found) - 1} more problems)" if len(found) > 1 else ""
    raise InputError(f"{source}: {where}: {what}{more}" if where else f"{source}: {what}{more}")
