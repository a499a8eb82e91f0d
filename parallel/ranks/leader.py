"""Rank 0 as the engine's runner: it runs the first stage, sends items on, and takes velocities in.

The engine orders the work and decides reuse; the leader sends with each item the flags that come with its work, so a
reused chunk costs no message. A checkpoint goes down the stream of items, so every rank takes its snapshot
at the same point of it.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from engine.checkpoint.contents import Contents
from engine.checkpoint.files import Shard
from engine.executor import NotFinite, Runner
from engine.kv.buffer import KVBuffer
from engine.request import Admission
from engine.video import Work, WorkItem
from models.errors import InputError
from parallel.comm.edges import Edges, RankServices
from parallel.comm.messages import Header, Kind, pack_admit, pack_json, pack_text
from parallel.health.timeouts import POLL_SECONDS
from parallel.ranks.worker import StageWorker, read_velocity, saved_key


class Leader(Runner):
    """Runs the items of videos on a gang; `worker` runs the first stage here."""

    def __init__(self, worker: StageWorker, services: RankServices) -> None:
        self.worker, self._edges, self._store = worker, Edges(services), services.store
        self._monitor, self._tracer = services.monitor, services.tracer
        self.layout = asdict(services.mesh.layout)
        self._one_stage = self._edges.reads_velocity  # results are there at once
        self._undelivered: list[tuple[WorkItem, Tensor]] = []
        self._saving: dict[int, Path] = {}
        self._not_finite: dict[int, NotFinite] = {}
        self._looked, self._outstanding = 0.0, 0

    @property
    def pending(self) -> int:
        return self._outstanding + len(self._undelivered)

    def admit(self, admission: Admission) -> None:
        """Take a video in on all ranks; an InputError if this layout cannot serve it."""
        self.worker.admit(admission)
        self._edges.announce(Header(kind=Kind.ADMIT, request=admission.video), pack_admit(admission))

    def change_text(self, video: int, chunk: int | None, text: Tensor) -> None:
        self.worker.stage.change_text(video, chunk, text)
        self._edges.announce(Header(kind=Kind.TEXT, request=video), pack_text(chunk, text))

    def begin(self, work: Work) -> None:
        """Run an item's first stage and send it on."""
        item, worker = work.item, self.worker
        header = Header(kind=Kind.ITEM, request=item.request, item=item, flags=work.flags, digest=work.digest)
        own, *others = worker.embed(item, work.x)
        for cp_rank, part in enumerate(others, 1):
            self._edges.to_cp_rank(cp_rank, header, part)
        hidden = worker.run(header, own)
        header = worker.mark(header)
        self._edges.send_on(header, hidden)
        if not item.what.weight:
            return
        if self._one_stage:
            self._deliver(*read_velocity(worker, self._edges, header, hidden), self._undelivered)
        else:
            self._outstanding += 1

    def results(self, *, wait: bool) -> list[tuple[WorkItem, Tensor]]:
        results, self._undelivered = self._undelivered, []
        if not self._one_stage:
            wait = wait and not results
            while (message := self._edges.receive_result(wait=wait)) is not None:
                assert message.payload is not None
                wait = False
                self._outstanding -= 1
                self.worker.counters.velocity_bytes += message.nbytes
                self._deliver(message.header, message.payload, results)
        return results

    def _deliver(self, header: Header, velocity: Tensor, results: list[tuple[WorkItem, Tensor]]) -> None:
        item, rank = header.item, header.not_finite
        assert item is not None
        results.append((item, velocity))
        if rank >= 0 and item.request not in self._not_finite:
            self._not_finite[item.request] = NotFinite(item.request, rank=rank, place=item.place)

    def not_finite(self, video: int) -> NotFinite | None:
        """What says that a video cannot be made; its ranks say it with the velocities."""
        return self._not_finite.get(video)

    def kv(self, video: int) -> KVBuffer:
        return self.worker.stage.kv(video)

    def save(self, video: int, folder: Path, run: Contents, on_done: Callable[[], None]) -> None:
        header = self._header(Kind.CHECKPOINT, video)
        self._edges.announce(header, pack_json(str(folder)))
        self.worker.save(header, folder, run, on_done)
        self._saving[video] = folder

    def saved(self, video: int) -> tuple[Shard, ...] | None:
        now = time.monotonic()
        if now - self._looked < POLL_SECONDS:
            return None
        self._looked = now
        keys = [saved_key(self._saving[video], rank) for rank in range(math.prod(self.layout.values()))]
        if not self._store.check(keys):
            return None
        results = [json.loads(raw) for raw in self._store.multi_get(keys)]
        for key in keys:
            self._store.delete_key(key)
        del self._saving[video]
        if (error := next((one for one in results if isinstance(one, str)), None)) is not None:
            raise InputError(error)
        return tuple(Shard(**file) for files in results for file in files)

    def release(self, video: int) -> None:
        header = self._header(Kind.RELEASE, video)
        self._edges.announce(header)
        self.worker.release(header)
        self._saving.pop(video, None)
        self._not_finite.pop(video, None)
        self._undelivered = [result for result in self._undelivered if result[0].request != video]

    def check(self) -> None:
        self._monitor.check()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait: counted, traced, and known to the hang detector."""
        began = time.perf_counter()
        with self._monitor.expecting(self._outstanding):
            yield
        self.worker.counters.waiting += time.perf_counter() - began
        self._tracer.add("wait", began)

    def close(self) -> None:
        """Tell all ranks that nothing more will come, and wait until they have worked off what is under way."""
        self.worker.counters.sent_bytes = self._edges.leave()

    def _header(self, kind: Kind, video: int) -> Header:
        """A header about a video, with the digest of the flags that were sent."""
        return Header(kind=kind, request=video, digest=self.worker.stage.flags(video).digest)
