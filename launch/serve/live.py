"""What can be watched of a video while it is made: a table of chunks and steps, the KV buffer, and the news of both.

Written by the thread of the controller, read by any number of viewers. A viewer keeps nothing but a number: one that is
slow misses news and is shown the whole again, so it costs no memory.
"""

import threading
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

from engine.files import Damaged, read_sealed
from launch.batch.making import Video
from launch.resume.saved import segment_name
from parallel.cluster.messages import Ticked

SEGMENT = 2**30  # bytes of a chunk, at most
_NEWS, _ENDED = 256, 64  # news of a video that are kept; videos that are remembered after their end
_MARKS = ".crxrr"
"""Of a step: not taken, computed, reused (in part, too), extrapolated; by the value of a `Decision` and one."""


class Live:
    """One video."""

    def __init__(self, video: Video) -> None:
        self._lock = threading.Lock()
        self._video: Video | None = video  # None after its end
        self._schedule = schedule = video.plan.size.schedule
        self._rows = [bytearray(schedule.num_steps) for _ in range(schedule.chunks)]
        self._tick, self._kv_fill, self._kept = 0, 0.0, list[float]()
        self._news: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_NEWS)
        self._version = 0

    @property
    def stored(self) -> int:
        """Chunks that are on the disk, from the first on."""
        video = self._video
        return self._schedule.chunks - self._schedule.first if video is None else video.chunks_done

    def segment(self, index: int) -> bytes:
        """A chunk that is on the disk, only its checksum looked at; a Damaged as of `read_sealed`, or after the end."""
        if (video := self._video) is None:
            raise Damaged(Path(), "the video has ended")
        return read_sealed(video.saved.segments.folder / segment_name(index), SEGMENT)

    def end(self) -> None:
        """Let go of all but the table."""
        self._video = None

    @property
    def percent(self) -> int:
        """How much of all ticks is done."""
        return 100 * self._tick // self._schedule.ticks

    def ticked(self, event: Ticked) -> None:
        """A tick is done."""
        with self._lock:
            known = [one for one in event.decisions if one[0] < len(self._rows) and one[1] < len(self._rows[one[0]])]
            for chunk, step, value in known:
                self._rows[chunk][step] = value + 1
            self._tick, self._kv_fill = event.tick + 1, event.kv_fill
            self._kept = self._kept if event.kept is None else list(event.kept)
            cells = [[chunk, step, _MARKS[value + 1]] for chunk, step, value in known]
            news: dict[str, Any] = {"tick": self._tick, "cells": cells, "kv_fill": round(event.kv_fill, 3)}
            self._version += 1
            self._news.append((self._version, news if event.kept is None else {**news, "kept": self._kept}))

    def snapshot(self) -> tuple[int, dict[str, Any]]:
        """All of it as it stands, and the number of the news that it has."""
        with self._lock:
            schedule = self._schedule
            return self._version, {
                "first": schedule.first,
                "window": schedule.window,
                "ticks": schedule.ticks,
                "rows": ["".join(_MARKS[mark] for mark in row) for row in self._rows],
                "tick": self._tick,
                "kv_fill": round(self._kv_fill, 3),
                "kept": self._kept,
            }

    def since(self, version: int) -> tuple[int, list[dict[str, Any]] | None]:
        """The news after a number, and the number after them; None if some are gone."""
        with self._lock:
            missed = self._version - version
            if missed > len(self._news):
                return self._version, None
            return self._version, [news for number, news in self._news if number > version]


class LiveVideos:
    """Those that are made, by name, and the last that have ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._videos: dict[str, Live] = {}
        self._ended: OrderedDict[str, Live] = OrderedDict()

    def begin(self, video: Video) -> None:
        """A video is made from now on."""
        with self._lock:
            self._videos[video.name] = Live(video)

    def get(self, name: str) -> Live | None:
        """A video, unless it has not begun or ended long ago."""
        with self._lock:
            return self._videos.get(name) or self._ended.get(name)

    def end(self, name: str) -> None:
        """A video has ended."""
        with self._lock:
            if (live := self._videos.pop(name, None)) is not None:
                live.end()
                self._ended[name] = live
                if len(self._ended) > _ENDED:
                    self._ended.popitem(last=False)
