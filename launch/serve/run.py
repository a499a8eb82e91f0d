"""`flowcache serve`: puts the folder of jobs, the cluster and the HTTP server together, and ends them in order."""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launch.ending import CommandFailed, unwinding_signals
from launch.model.resolve import plan_model
from launch.options import parse_size
from launch.plan import Plan, plan_video
from launch.serve.options import ServeOptions
from launch.serve.store import Store
from models.errors import InputError
from parallel.health.exit_codes import FAILED
from parallel.health.timeouts import POLL_SECONDS

try:
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401 - which forms need when they are read
    import uvicorn
    from fastapi import FastAPI

    from launch.serve.app import make_app
    from launch.serve.engine import Maker
    from launch.serve.metrics import Metrics
    from launch.serve.requests import Service
except ImportError as error:
    raise InputError(
        f"flowcache serve needs its extra, {error.name} is missing: pip install 'flowcache-engine[serve]'"
    ) from None

_PROMPT = "a red circle moving right"  # one that every model reads
_BACKLOG = 1024  # connections that wait to be taken
_START_SECONDS, _END_SECONDS = 20.0, 2.0  # for the server to listen; for answers that are under way at the end


def run_service(options: ServeOptions, *, say: Callable[[str], None]) -> None:
    """Serve until a signal ends it, with lines for people to `say`.

    Raises:
        InputError: it cannot be begun with what was given.
        CommandFailed: the cluster is lost, or its last gang.
    """
    limit = limit_plan(options)
    most = None if options.max_disk is None else parse_size(options.max_disk)
    store = Store(options.out, max_queue=options.max_queue, max_bytes=most, say=say)
    with unwinding_signals(), listening(options) as listener, store:
        metrics = Metrics(limit.model.name, store.counts)
        maker = Maker(options, limit, store, metrics, say)
        service = Service(options=options, limit=limit, store=store, maker=maker)
        with served(make_app(service, metrics), listener):
            host = f"[{options.host}]" if ":" in options.host else options.host
            say(f"{limit.model.name} at http://{host}:{listener.getsockname()[1]}")
            maker.run()


def limit_plan(options: ServeOptions) -> Plan:
    """The plan of the largest video that is made, which gangs are started for."""
    base, known = options.base, plan_model(options.base).config.figures
    parse_size(options.max_upload)
    width, height = base.width or known.width, base.height or known.height
    if options.max_pixels is not None:  # nearly a square, of no fewer pixels
        width = 16 * math.ceil(math.sqrt(options.max_pixels) / 16)
        height = 16 * math.ceil(options.max_pixels / width / 16)
    largest = replace(base, prompts=[_PROMPT], seconds=options.max_seconds, chunks=None, width=width, height=height)
    return plan_video(largest, out=Path(), starts=False)


def listening(options: ServeOptions) -> socket.socket:
    """Listen at the address that is asked for; an `InputError` if it cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        where, reason = f"{options.host}:{options.port}", error.strerror or error
        raise InputError(f"cannot listen at {where}: {reason}; give another --port or --host") from None


@contextmanager
def served(app: FastAPI, listener: socket.socket) -> Iterator[None]:
    """Answer requests on a thread of its own. Signals are the main thread's; nothing is logged but failures of ours."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        loop="asyncio",  # whatever else is installed
        http="h11",
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(_END_SECONDS),
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would warn of every form that is broken
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise CommandFailed("the HTTP server does not start", status=FAILED, shown_here=True)
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(2 * _END_SECONDS)
