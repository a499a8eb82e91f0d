"""From the body of a request to a queued job: read in bounds, checked as a line of a batch is, and put on the disk."""

import asyncio
import io
import math
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from engine.files import link_file, write_errors
from launch.batch.file import line_options, read_object
from launch.media import is_clip
from launch.plan import Plan
from launch.serve.engine import Maker
from launch.serve.options import ServeOptions
from launch.serve.prompts import TooLate, chunk_seconds, prompts_of, script_of, write_prompts
from launch.serve.schemas import REFERENCE, CreateVideo, ExtendVideo, NewPrompt
from launch.serve.store import Job, Store
from models.errors import InputError
from models.families import family_of

_FIELDS, _FIELD_BYTES = 40, 2**20  # of a form
ANSWER_SECONDS = 20.0  # for the controller to hear of what is asked for
_READING = threading.Lock()  # one picture is decoded at a time, whoever sends them


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

    def check_model(self, name: str) -> None:
        """A 404 for any other one: gangs were started for this."""
        if name != self.model:
            raise HTTPException(404, f"there is no model {name[:80]!r} here: this service has {self.model}")

    def job(self, name: str) -> Job:
        """The job of an id, which may be any text; a 404 if there is none."""
        if (job := self.store.get(name)) is None:
            raise HTTPException(404, f"there is no video {name[:80]!r}")
        return job


async def accept(request: Request, service: Service) -> Job:
    """Queue the video that a request asks for; an `InputError`, an HTTPException or a `Full` if it cannot be."""
    async with _body(request) as (values, upload):
        return await run_in_threadpool(_accept, service, values, None if upload is None else upload.file)


async def extend(request: Request, service: Service) -> Job:
    """Queue a longer video that goes on from the end of a finished one; errors as in `accept`."""
    async with _body(request) as (values, upload):
        if upload is not None:
            raise InputError('video: a file cannot be made longer here, give {"id": "video_..."}')
        return await run_in_threadpool(_extend, service, ExtendVideo.of(values))


async def change_prompt(request: Request, service: Service, job: Job) -> dict[str, Any]:
    """Make what has not begun of a job's video of another prompt; errors as in `accept`, or a `TooLate`.

    Returns where it holds, as `prompts_of` has it.
    """
    async with _body(request) as (values, upload):
        if upload is not None:
            raise InputError("a prompt is text: leave the file out")
        prompt = NewPrompt.of(values).prompt
    config = service.limit.model.config
    await run_in_threadpool(family_of(config).check_prompt, config, prompt)
    if not job.unfinished:
        raise TooLate(f"the video {job.id} is {job.status}")
    return await asyncio.wait_for(asyncio.wrap_future(service.maker.change_prompt(job, prompt)), ANSWER_SECONDS)


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
    """The values of a form, in which clients write an object as `name[key]`, and its file."""
    values: dict[str, Any] = {}
    upload = None
    for name, value in form.multi_items():
        outer, _, inner = name.removesuffix("]").partition("[")
        if isinstance(value, UploadFile):
            if name not in ("input_reference", "video"):
                raise InputError(f"there is a file for {name[:80]!r}: only input_reference is one")
            upload = value
        elif inner and isinstance(values.setdefault(outer, {}), dict) and inner not in values[outer]:
            values[outer][inner] = value
        elif inner or name in values:
            raise InputError(f"the key {name[:80]!r} is there twice: leave one of them out")
        else:
            values[name] = value
    if upload is not None and "input_reference" in values:
        raise InputError("input_reference is there twice: leave one of them out")
    return values, upload


def _accept(service: Service, values: dict[str, Any], upload: BinaryIO | None) -> Job:
    asked = CreateVideo.of(values)
    if asked.model is not None:
        service.check_model(asked.model)
    line, embedded = asked.line(), asked.reference()
    _check_size(line, service)
    with _new_job(service) as folder:
        reference = io.BytesIO(embedded) if embedded is not None else upload
        if reference is not None:
            with write_errors(folder / REFERENCE), (folder / REFERENCE).open("wb") as file:
                shutil.copyfileobj(reference, file)
            with _READING:
                line["video" if is_clip(folder / REFERENCE, service.maker.bounds) else "image"] = REFERENCE
        if asked.prompts:
            line["script"] = write_prompts(asked.prompts, folder)
        return _queue(service, line, folder)


def _extend(service: Service, asked: ExtendVideo) -> Job:
    store = service.store
    old = service.job(asked.name)
    if not old.continues:
        why = "it is not finished" if old.unfinished else "only a service with --keep-state can make it longer"
        raise HTTPException(409, f"the video {old.id} is {old.status}: {why}")
    with _new_job(service) as folder:
        for name in filter(None, map(old.line.get, ("image", "video", "script"))):
            link_file(str(store.folder(old) / name), str(folder / name))
        plan = service.maker.plan(old.line, folder)
        chunks, chunk = plan.size.chunks, chunk_seconds(plan)
        line = {name: value for name, value in old.line.items() if name != "seconds"}
        line["chunks"] = plan.request.chunks + math.ceil(round(asked.seconds / chunk, 6))
        if asked.prompt is not None:
            line["script"] = write_prompts({**script_of(plan), f"{chunks * chunk:.6f}s": asked.prompt}, folder)
        _check_size(line, service)
        with write_errors(folder):
            shutil.copytree(service.maker.state(old.id), service.maker.state(folder.name), copy_function=link_file)
        return _queue(service, line, folder)


@contextmanager
def _new_job(service: Service) -> Iterator[Path]:
    """A folder for a job, which is removed if it does not become one."""
    folder = service.store.new_folder()
    try:
        yield folder
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(service.maker.state(folder.name), ignore_errors=True)
        if isinstance(error, InputError):  # which must not say where the files of the service are
            raise type(error)(str(error).replace(f"{folder}/", "").replace(REFERENCE, "input_reference")) from None
        raise


def _queue(service: Service, line: dict[str, Any], folder: Path) -> Job:
    with _READING:
        plan = service.maker.plan(line, folder)
    request = plan.request
    seconds, size = round(request.chunks * chunk_seconds(plan), 3), f"{request.width}x{request.height}"
    job = service.store.add(folder, line, seconds=seconds, size=size, prompts=prompts_of(plan))
    service.maker.queue(job, plan)
    return job


def _check_size(line: dict[str, Any], service: Service) -> None:
    options = line_options(line, Path(), service.options.base)
    known, largest = service.limit.model.config.figures, service.limit.request
    width, height = options.width or known.width, options.height or known.height
    most = service.options.max_pixels or largest.width * largest.height
    if width * height > most:
        raise HTTPException(413, f"size: {width}x{height} has more than the {most:,} pixels that are made here")
    frames = known.frames if options.chunks is None else options.chunks * known.chunk_frames
    seconds = options.seconds or frames / (options.fps or known.fps)
    if seconds > service.options.max_seconds:
        raise HTTPException(413, f"seconds: {seconds:g} is more than the {service.options.max_seconds:g} made here")
