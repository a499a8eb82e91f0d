"""From the body of a request to a queued job: read in bounds, checked as a line of a batch is, and put on the disk."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from engine.files import write_errors
from launch.batch.file import line_options, read_object
from launch.media import is_clip
from launch.options import Options
from launch.plan import Plan
from launch.serve.engine import Maker
from launch.serve.options import ServeOptions
from launch.serve.schemas import REFERENCE, CreateVideo, write_prompts
from launch.serve.store import Job, Store
from models.errors import InputError

_FIELDS, _FIELD_BYTES = 40, 2**20  # of a form
_READING = threading.Lock()  # one picture is decoded at a time, whoever sends them
_UNCHANGED = {
    "fps": "frames per second of this service are {}",
    "cache": "this service reuses steps by {}",
    "kv_budget": "the KV budget of this service is {}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What the routes work with."""

    options: ServeOptions
    limit: Plan  # of the largest video that is made
    store: Store
    maker: Maker

    @property
    def model(self) -> str:
        """Its name."""
        return self.limit.model.name


async def accept(request: Request, service: Service) -> Job:
    """Queue the video that a request asks for; an `InputError`, an HTTPException or a `Full` if it cannot be."""
    async with _body(request) as (values, upload):
        return await run_in_threadpool(_accept, service, values, None if upload is None else upload.file)


@asynccontextmanager
async def _body(request: Request) -> AsyncIterator[tuple[dict[str, Any], UploadFile | None]]:
    """The values of a body, JSON or a form, and the file that came with it."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield read_object(await request.body()), None
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES) as form:
            yield _read_form(form)
    else:
        raise HTTPException(415, f"a body of {kind[:80]!r} is not read: send JSON or multipart/form-data")


def _read_form(form: FormData) -> tuple[dict[str, Any], UploadFile | None]:
    values: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    upload = None
    for name, value in form.multi_items():
        inner = name.removeprefix("input_reference[").removesuffix("]")
        if isinstance(value, UploadFile):
            if name != "input_reference":
                raise InputError(f"there is a file for {name[:80]!r}: only input_reference is one")
            upload = value
        elif name in values or inner in parts:
            raise InputError(f"the key {name[:80]!r} is there twice: leave one of them out")
        elif inner != name:  # as clients write an object in a form
            parts[inner] = value
        else:
            values[name] = value
    if len([one for one in (upload, parts, values.get("input_reference")) if one]) > 1:
        raise InputError("input_reference is there twice: leave one of them out")
    return (values | {"input_reference": parts} if parts else values), upload


def _accept(service: Service, values: dict[str, Any], upload: BinaryIO | None) -> Job:
    asked = CreateVideo.of(values)
    _check_model(asked, service)
    line, embedded = asked.line(), asked.reference()
    _check_size(line_options(line, Path(), service.options.base), service)
    folder = service.store.new_folder()
    try:
        reference = io.BytesIO(embedded) if embedded is not None else upload
        if reference is not None:
            with write_errors(folder / REFERENCE), (folder / REFERENCE).open("wb") as file:
                shutil.copyfileobj(reference, file)
            with _READING:
                line["video" if is_clip(folder / REFERENCE, service.maker.bounds) else "image"] = REFERENCE
        if asked.prompts:
            line["script"] = write_prompts(asked.prompts, folder)
        with _READING:
            plan = service.maker.plan(line, folder)
        runtime, request = plan.model.config.runtime_config, plan.request
        frames = request.chunks * runtime.chunk_width * runtime.temporal_downsample_factor
        size = f"{request.width}x{request.height}"
        job = service.store.add(folder, line, seconds=round(frames / runtime.fps, 3), size=size)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, InputError):  # which must not say where the files of the service are
            raise type(error)(str(error).replace(f"{folder}/", "").replace(REFERENCE, "input_reference")) from None
        raise
    service.maker.queue(job, plan)
    return job


def _check_model(asked: CreateVideo, service: Service) -> None:
    """A service has one model, and gangs that were started for it: what they cannot change is refused."""
    model = service.limit.model
    if asked.model is not None and asked.model != model.name:
        raise HTTPException(404, f"there is no model {asked.model[:80]!r} here: this service has {model.name}")
    if asked.negative_prompt:
        raise InputError("negative_prompt: models of this engine have no text of that kind, leave it out")
    own = {"fps": model.config.runtime_config.fps, "cache": model.cache, "kv_budget": model.kv.budget}
    for name, text in _UNCHANGED.items():
        if (given := getattr(asked, name)) is not None and given != own[name]:
            raise InputError(f"{name}: {text.format(own[name])}, so leave it out, or start a service with another")


def _check_size(options: Options, service: Service) -> None:
    runtime, largest = service.limit.model.config.runtime_config, service.limit.request
    width, height = options.width or runtime.video_size_w, options.height or runtime.video_size_h
    most = service.options.max_pixels or largest.width * largest.height
    if width * height > most:
        raise HTTPException(413, f"size: {width}x{height} has more than the {most:,} pixels that are made here")
    chunk = runtime.chunk_width * runtime.temporal_downsample_factor
    frames = runtime.num_frames if options.chunks is None else options.chunks * chunk
    seconds = options.seconds or frames / runtime.fps
    if seconds > service.options.max_seconds:
        raise HTTPException(413, f"seconds: {seconds:g} is more than the {service.options.max_seconds:g} made here")
