"""What the service counts, for Prometheus. Ray's own metrics of the same gangs are Ray's (docs/cluster.md)."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from launch.serve.store import Job, Status
from parallel.cluster import messages
from parallel.cluster.messages import Event

_SECONDS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counts events, and shows with them how many `jobs` of each status there are when somebody looks.

    Events come on one thread; anybody may ask for the text.
    """

    def __init__(self, model: str, jobs: Callable[[], Mapping[Status, int]]) -> None:
        self._registry, self._jobs, self._model = CollectorRegistry(), jobs, model
        own: dict[str, Any] = {"registry": self._registry}
        gang = ("model", "gang")
        self._chunks = Counter("flowcache_serve_chunks", "Chunks made", gang, **own)
        self._videos = Counter("flowcache_serve_videos", "Videos completed", ("model",), **own)
        self._computed = Gauge(
            "flowcache_serve_computed_fraction", "Chunk-steps computed, as a share, of the last video", gang, **own
        )
        self._kv = Gauge("flowcache_serve_kv_fill", "KV rows in use, as a share, of the last progress", gang, **own)
        self._up = Gauge("flowcache_serve_gang_up", "1 while a gang can be given work", gang, **own)
        self._first = Histogram(
            "flowcache_serve_first_chunk_seconds",
            "From a request to its first chunk",
            ("model",),
            buckets=_SECONDS,
            **own,
        )
        self._real_time = Gauge(
            "flowcache_serve_real_time_factor",
            "Seconds of video made in a second, of the last video",
            ("model",),
            **own,
        )
        self._asked: dict[str, float] = {}
        self._registry.register(self)

    def asked(self, job: Job) -> None:
        """A request has come."""
        self._asked[job.id] = time.monotonic()

    def handle(self, event: Event) -> None:
        """Count what has happened on a gang."""
        labels = {"model": self._model, "gang": event.gang}
        if isinstance(event, messages.ChunkMade):
            self._chunks.labels(**labels).inc()
            if (asked := self._asked.pop(event.video, None)) is not None:
                self._first.labels(model=self._model).observe(time.monotonic() - asked)
        elif isinstance(event, messages.Progressed):
            self._computed.labels(**labels).set(event.progress.computed_fraction)
            self._kv.labels(**labels).set(event.progress.kv_fill)
        elif isinstance(event, messages.GangReady | messages.GangLost | messages.GangDown):
            self._up.labels(**labels).set(isinstance(event, messages.GangReady))

    def forget(self, job: Job) -> None:
        """A job has ended without a chunk."""
        self._asked.pop(job.id, None)

    def done(self, job: Job) -> None:
        """A video is there."""
        self._videos.labels(model=self._model).inc()
        if job.began_at is not None and job.completed_at is not None:
            took = max(1e-3, job.completed_at - job.began_at)
            self._real_time.labels(model=self._model).set(job.seconds / took)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is so at this moment, as Prometheus' client asks for it."""
        requests = GaugeMetricFamily("flowcache_serve_requests", "Requests by status", labels=("model", "status"))
        for status, count in self._jobs().items():
            requests.add_metric((self._model, status), count)
        yield requests

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)
