"""What requests may say, and what is answered: the convention of video APIs, with the names that its clients know.

A request becomes a line of a batch file. Nothing is known here of models; what one can make is checked by the plan.
"""

import base64
import binascii
import json
import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from launch.batch.file import check_line, complaints
from launch.serve.store import Job
from models.errors import InputError

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
_SAME = {"prompt", "priority", "seconds", "seed", "cache", "kv_budget", "fps", "negative_prompt"}
"""Keys of a request that are called so in a batch file too."""
REFERENCE = "reference"
"""What a job starts from, in its folder."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("it is no number")
    return value


def _object(value: Any) -> Any:
    """A form has text alone, which is then JSON."""
    return json.loads(value) if isinstance(value, str) else value


def _reference(value: Any) -> Any:
    if isinstance(value, dict) and set(value) != {"id"}:
        raise ValueError('give {"id": "video_..."}')
    return value


Integer = Annotated[int, BeforeValidator(_no_bool)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Read a body's values; an `InputError` says what cannot be used."""
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise InputError(complaints(error, cls)) from None


class CreateVideo(_Body):
    """The body of `POST /v1/videos`; what it leaves out is as the options of the service say."""

    prompt: str = Field(min_length=1, max_length=10_000)
    model: str | None = Field(default=None, max_length=1_000)
    seconds: Annotated[float, BeforeValidator(_no_bool)] | None = Field(default=None, gt=0, le=1_000_000)
    size: str | None = Field(default=None, pattern=r"^\d{1,6}x\d{1,6}$")
    seed: Integer | None = None
    num_inference_steps: Integer | None = None
    fps: Integer | None = None
    negative_prompt: str | None = Field(default=None, max_length=10_000)
    cache: str | None = None
    kv_budget: Integer | None = None
    prompts: Annotated[dict[str, str], BeforeValidator(_object)] | None = Field(default=None, max_length=10_000)
    priority: Integer = 0
    input_reference: Annotated[dict[str, JsonValue], BeforeValidator(_object)] | None = None

    def line(self) -> dict[str, Any]:
        """The same as a line of a batch file, but for the files that it names; an `InputError` as in a batch."""
        line = self.model_dump(include=_SAME) | {"steps": self.num_inference_steps}
        if self.size is not None:
            line["width"], line["height"] = map(int, self.size.split("x"))
        return check_line(line)

    def reference(self) -> bytes | None:
        """The picture or clip that stands in the request itself, as `{"image_url": "data:image/png;base64,..."}`."""
        if self.input_reference is None:
            return None
        url = self.input_reference.get("image_url")
        if not isinstance(url, str) or (found := _DATA.match(url)) is None:
            raise InputError('input_reference: upload a file, or give {"image_url": "data:image/png;base64,..."}')
        try:
            return base64.b64decode(url[found.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise InputError("input_reference: this is no base64") from None


class ExtendVideo(_Body):
    """The body of `POST /v1/videos/extensions`."""

    video: Annotated[str | dict[str, str], BeforeValidator(_reference)]
    seconds: Annotated[float, BeforeValidator(_no_bool)] = Field(gt=0, le=1_000_000)
    prompt: str | None = Field(default=None, min_length=1, max_length=10_000)

    @property
    def name(self) -> str:
        """The id of the video that is to be longer."""
        return self.video if isinstance(self.video, str) else self.video["id"]


class NewPrompt(_Body):
    """The body of `POST /v1/videos/{id}/prompt`."""

    prompt: str = Field(min_length=1, max_length=10_000, pattern=r"\S")


def video(job: Job, model: str) -> dict[str, Any]:
    """A job as the object `video`."""
    return {
        "id": job.id,
        "object": "video",
        "model": model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "prompt": job.line["prompt"],
        "prompts": job.prompts,
        "size": job.size,
        "seconds": f"{job.seconds:g}",
        "continues": job.continues,
        "error": None if job.error is None else {"code": "video_failed", "message": job.error},
    }


def failure(message: str, *, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error, as clients read it."""
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": None, "code": code}}
