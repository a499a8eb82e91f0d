"""What viewers are sent of a video while it is made, one after the other as fast as each of them reads.

A viewer waits for nobody and nobody waits for a viewer: it looks ten times a second what there is since it looked last.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from engine.files import Damaged, read_sealed
from launch.output.segments import FragmentStream
from launch.resume.saved import segment_name
from launch.serve.live import SEGMENT, Live
from launch.serve.requests import Service
from launch.serve.schemas import video
from launch.serve.store import Job

_LOOK, _GANGS, _SIGN = 0.1, 0.5, 15.0  # seconds between looks, news of gangs, and heartbeats to a viewer


async def events(service: Service, job: Job) -> AsyncIterator[str]:
    """Server-sent events of a video, to its end: `video`, `snapshot`, `news`, `chunks` and `gangs`, each as JSON."""
    shown: dict[str, Any] = {}
    live: Live | None = None
    version, gangs_at, sent_at = 0, 0.0, time.monotonic()
    while True:
        now, lines = time.monotonic(), []
        over = not job.unfinished
        found, status = service.maker.live.get(job.id), {**video(job, service.model), "restarts": job.restarts}
        if found is not None:
            news: list[dict[str, Any]] | None = None
            if found is live:
                version, news = live.since(version)
            if news is None:
                live = found
                version, snapshot = found.snapshot()
                lines.append(_event("snapshot", snapshot))
            lines += [_event("news", one) for one in news or ()]
            lines += _changed("chunks", found.stored, shown)
        if now - gangs_at >= _GANGS or over:
            gangs_at = now
            lines += _changed("gangs", gangs(service), shown)
        lines += _changed("video", status, shown)
        if not lines and now - sent_at > _SIGN:
            lines.append(": still here\n\n")
        if lines:
            sent_at = now
            yield "".join(lines)
        if over:
            return
        await asyncio.sleep(_LOOK)


async def fragments(service: Service, job: Job, first: int) -> AsyncIterator[bytes]:
    """The fragmented MP4 of a video, from a fragment on, while it is made; one fragment at a time is in memory."""
    pieces: list[bytes] = []
    stream = FragmentStream(pieces.append)
    index = 0
    while (segment := await _next_segment(service, job, index)) is not None:
        if index < first:
            stream.skip(segment)
        else:
            stream.add(segment)
            piece = b"".join(pieces)
            pieces.clear()
            yield piece
        index += 1


async def _next_segment(service: Service, job: Job, index: int) -> bytes | None:
    """A chunk as soon as it is there; None if there will be no such chunk."""
    while True:
        over = not job.unfinished
        with suppress(Damaged):  # it has just been removed, or is made again
            live = service.maker.live.get(job.id)
            if job.status == "completed":
                path = service.store.stream(job) / segment_name(index)
                return await asyncio.to_thread(read_sealed, path, SEGMENT) if path.exists() else None
            if live is not None and live.stored > index:
                return await asyncio.to_thread(live.segment, index)
        if over:
            return None
        await asyncio.sleep(_LOOK)


def gangs(service: Service) -> list[dict[str, Any]]:
    """All gangs at this moment: how far each is, and what its ranks do."""
    return [
        {
            "gang": view.gang,
            "state": view.state.value,
            "attempt": view.attempt,
            "ranks": [{"rank": rank.rank, "doing": rank.doing} for rank in view.ranks],
        }
        for view in service.maker.gangs()
    ]


def _changed(name: str, values: Any, shown: dict[str, Any]) -> list[str]:
    if shown.get(name) == values:
        return []
    shown[name] = values
    return [_event(name, values)]


def _event(name: str, values: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(values)}\n\n"
