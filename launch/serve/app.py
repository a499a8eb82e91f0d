"""The routes of the service. What they do is done by the store and the maker; here are answers and errors."""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from engine.files import DiskFull
from launch.options import parse_size
from launch.serve.guard import Guard
from launch.serve.metrics import Metrics
from launch.serve.prompts import TooLate
from launch.serve.requests import ANSWER_SECONDS, Service, accept, change_prompt, extend
from launch.serve.schemas import failure, video
from launch.serve.store import Full, Job
from launch.serve.watch import events, fragments
from models.errors import InputError
from parallel.cluster.gang import GangState

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; media-src blob:; connect-src 'self'"
_LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # of answers that go on for as long as a video is made
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    409: "not_ready",
    413: "too_large",
    415: "unsupported_media_type",
}


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application of a service."""
    app = FastAPI(title="flowcache", docs_url=None, redoc_url=None, openapi_url=None)
    options = service.options
    app.add_middleware(Guard, key=options.api_key, most=parse_size(options.max_upload))
    _add_errors(app)
    _add_videos(app, service, metrics)
    _add_one_video(app, service)
    _add_rest(app, service, metrics)
    _add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        text, status = str(error.detail), error.status_code
        if text in ("Not Found", "Method Not Allowed"):  # the framework's own words
            text = f"there is no {request.method} of {request.url.path[:80]!r}"
        return JSONResponse(failure(text, code=_CODES.get(status)), status, error.headers)

    @app.exception_handler(InputError)
    async def unusable(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse(failure(str(error)), 400)

    @app.exception_handler(DiskFull)
    async def no_room(_: Request, error: DiskFull) -> JSONResponse:
        return JSONResponse(failure(str(error), kind="server_error", code="disk_full"), 507)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        return JSONResponse(failure(f"{found['loc'][-1]}: {found['msg'].lower()}"), 400)

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> JSONResponse:
        body = failure(str(error), kind="rate_limit_error", code="full")
        return JSONResponse(body, 429, {"Retry-After": "10"})

    @app.exception_handler(TooLate)
    async def late(_: Request, error: TooLate) -> JSONResponse:
        return JSONResponse(failure(str(error), code="too_late"), 409)

    @app.exception_handler(TimeoutError)
    async def starting(_: Request, error: TimeoutError) -> JSONResponse:
        text = "the gangs do not answer yet: try again later"
        return JSONResponse(failure(text, kind="server_error", code="not_ready"), 503, {"Retry-After": "10"})

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse(failure("the body was cut off"), 400)


def _add_videos(app: FastAPI, service: Service, metrics: Metrics) -> None:
    store, model = service.store, service.model

    @app.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        job = await accept(request, service)
        metrics.asked(job)
        return video(job, model)

    @app.post("/v1/videos/extensions")
    async def extension(request: Request) -> dict[str, Any]:
        job = await extend(request, service)
        metrics.asked(job)
        return video(job, model)

    @app.get("/v1/videos")
    def listed(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        jobs = store.jobs() if order == "asc" else store.jobs()[::-1]
        if after is not None:
            first = service.job(after).number
            jobs = [job for job in jobs if (job.number > first if order == "asc" else job.number < first)]
        data = [video(job, model) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}


def _add_one_video(app: FastAPI, service: Service) -> None:
    store, model = service.store, service.model

    @app.get("/v1/videos/{name}")
    def retrieve(name: str) -> dict[str, Any]:
        return video(service.job(name), model)

    @app.delete("/v1/videos/{name}")
    async def delete(name: str) -> dict[str, Any]:
        job = service.job(name)
        if job.unfinished:
            cancelled = asyncio.wrap_future(service.maker.cancel(job))
            await asyncio.wait_for(asyncio.shield(cancelled), ANSWER_SECONDS)
        else:
            await asyncio.to_thread(service.maker.remove, job)
        return {"id": job.id, "object": "video.deleted", "deleted": True, "status": job.status}

    @app.post("/v1/videos/{name}/prompt")
    async def prompted(name: str, request: Request) -> dict[str, Any]:
        job = service.job(name)
        return {"id": job.id, "object": "video.prompt", **await change_prompt(request, service, job)}

    @app.get("/v1/videos/{name}/events")
    async def watched(name: str) -> StreamingResponse:
        return StreamingResponse(events(service, service.job(name)), media_type="text/event-stream", headers=_LIVE)

    @app.get("/v1/videos/{name}/stream")
    async def streamed(name: str, fragment: Annotated[int, Query(ge=0)] = 0) -> StreamingResponse:
        job = service.job(name)
        if job.status in ("failed", "cancelled"):
            raise _not_there(job)
        return StreamingResponse(fragments(service, job, fragment), media_type="video/mp4", headers=_LIVE)

    @app.get("/v1/videos/{name}/content")
    def content(name: str, variant: Literal["video"] = "video") -> FileResponse:
        job = service.job(name)
        if job.status != "completed":
            raise _not_there(job)
        return FileResponse(store.video(job), media_type="video/mp4", filename=f"{job.id}.mp4")


def _not_there(job: Job) -> HTTPException:
    return HTTPException(409, f"the video {job.id} is {job.status}{f': {job.error}' if job.error else ''}")


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    app.mount("/page", StaticFiles(directory=_PAGE))


def _add_rest(app: FastAPI, service: Service, metrics: Metrics) -> None:
    limit, known = service.limit.request, service.limit.model.config.figures
    model = {"id": service.model, "object": "model", "created": 0, "owned_by": "flowcache"}
    model |= {"size": f"{limit.width}x{limit.height}", "max_seconds": service.options.max_seconds, "fps": known.fps}
    model |= {"chunk_frames": known.chunk_frames}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.get("/health")
    def health() -> JSONResponse:
        gangs = {view.gang: view.state.value for view in service.maker.gangs()}
        ready = GangState.UP.value in gangs.values()
        return JSONResponse({"status": "ok" if ready else "starting", "gangs": gangs}, 200 if ready else 503)

    @app.get("/metrics")
    def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
