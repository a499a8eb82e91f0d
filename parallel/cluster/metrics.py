"""Metrics of the controller for Prometheus, exported by Ray.

Ray exports them where `ray[default]` is installed; with the bare wheel they go nowhere, and cost nothing.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from parallel.cluster.queue import Figures, RequestState


class RayMetrics:
    """Metrics of Ray, under names that begin with `flowcache_`."""

    def __init__(self) -> None:
        self._chunks = Counter("flowcache_chunks_total", "Chunks made", tag_keys=("again",))
        self._videos = Counter("flowcache_videos_total", "Videos done")
        self._computed = Gauge("flowcache_computed_fraction", "Chunk-steps computed, as a share, of the last video")
        self._restarts = Counter("flowcache_gang_restarts_total", "Gangs started again", tag_keys=("gang",))
        self._queued = Gauge("flowcache_queue_length", "Videos that no gang has taken in")
        self._states = Gauge("flowcache_videos", "Videos by state", tag_keys=("standing",))
        self._used = Gauge("flowcache_gang_utilisation", "Window slots in use, as a share", tag_keys=("gang",))
        self._up = Gauge("flowcache_gang_up", "1 while a gang can be given work", tag_keys=("gang",))

    def chunk(self, *, again: bool) -> None:
        """A chunk was made, or made again after a loss."""
        self._chunks.inc(1, tags={"again": str(again).lower()})

    def video(self, *, computed: float) -> None:
        """A video is done; so much of its chunk-steps was computed."""
        self._videos.inc(1)
        self._computed.set(computed)

    def restart(self, gang: str) -> None:
        """A gang is started again."""
        self._restarts.inc(1, tags={"gang": gang})

    def figures(self, figures: Figures) -> None:
        """The state of the queue and the gangs."""
        self._queued.set(figures.queued)
        for state in RequestState:
            self._states.set(figures.states[state], tags={"standing": state.value})
        for gang in figures.gangs:
            self._used.set(gang.utilisation, tags={"gang": gang.gang})
            self._up.set(float(gang.up), tags={"gang": gang.gang})
