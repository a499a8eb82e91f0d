"""Many clients at once: what becomes of their requests, in which order they are made, and what memory that takes.

The first request of every client is made while nothing else is, then all the others are sent at once. Memory is looked
at after both, when the service rests: between them nothing is under way that would take memory for itself.
"""

import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random

from benchmarks.common import Row, Verdict
from benchmarks.service.client import Service, frames_digest

_PRIORITIES = (0, 1, 2)
_REST, _LOOKS, _LOOK = 3.0, 9, 0.25  # seconds before memory is looked at, how often that is, and between two looks
_WAITED, _AT_ONCE = 1.0, 1.0  # seconds for a request to be in the queue; in which two count as begun at once
_MOST_GROWTH, _SHARE = 0.03, 8  # of memory; one in so many is the one that has waited longest
_COUNTER = re.compile(r"^flowcache_serve_(chunks|videos)_total{.*} ([\d.e+]+)$", re.M)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A request that has ended."""

    number: int  # as the service has numbered it, by age
    priority: int
    status: str
    created: float
    began: float  # when a gang began with it
    frames: str  # digest of them

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts requests as they are to be made: the highest priority first, then the oldest."""
        return -self.priority, self.number


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What came of all requests."""

    wanted: int  # requests
    made: Sequence[Made]
    seconds: float  # from the second round's first request to the last video
    chunks: int  # that gangs have made
    videos: int  # that the service says are completed
    before: int  # bytes of all processes after the first round
    after: int  # and after the last video
    gangs: int

    @property
    def out_of_turn(self) -> tuple[int, int]:
        """Requests that were made though a better one was waiting: because they were the oldest, and for no reason."""
        aged = wrong = 0
        for one in self.made:
            waiting = [other for other in self.made if other.created + _WAITED < one.began < other.began - _AT_ONCE]
            if any(other.rank < one.rank for other in waiting):
                oldest = all(one.number < other.number for other in waiting)
                aged, wrong = aged + oldest, wrong + (not oldest)
        return aged, wrong

    @property
    def verdicts(self) -> list[Verdict]:
        """What they are held to."""
        done, different = sum(one.status == "completed" for one in self.made), len({one.frames for one in self.made})
        wanted, (aged, wrong), growth = self.wanted, self.out_of_turn, self.after / self.before - 1
        most = len(self.made) // _SHARE + self.gangs
        little = f"at most +{_MOST_GROWTH:.0%}"
        once = f"{self.videos} videos, {self.chunks} chunks, {different} different"
        memory = f"{self.before / 2**20:.1f} then {self.after / 2**20:.1f} MiB, {growth:+.1%}"
        return [
            Verdict("requests completed", str(done), str(wanted), done == len(self.made) == wanted),
            Verdict("made once", once, f"{wanted} of each", self.videos == self.chunks == different == wanted),
            Verdict("begun before a better one", str(wrong), "0", not wrong),
            Verdict("begun before a better one, as the oldest", str(aged), f"at most {most}", aged <= most),
            Verdict("memory after the first round and the last", memory, little, growth <= _MOST_GROWTH),
            Verdict("requests per second", f"{len(self.made) / self.seconds:.2f}"),
        ]

    @property
    def rows(self) -> list[Row]:
        """A line for each priority."""
        found = [[one.began - one.created for one in self.made if one.priority == value] for value in _PRIORITIES]
        return [
            {
                "priority": value,
                "requests": len(waits),
                "median_wait_s": statistics.median(waits),
                "longest_s": max(waits),
            }
            for value, waits in zip(_PRIORITIES, found, strict=True)
            if waits
        ]


def run_load(service: Service, requests: int, clients: int, gangs: int, seed: int) -> Load:
    """Have clients send requests of a second each, all with seeds of their own; at least two for each client."""
    draw = Random(seed)
    asked = [(number, draw.choice(_PRIORITIES)) for number in range(requests)]
    with ThreadPoolExecutor(clients) as pool:
        first = list(pool.map(partial(_client, service), [[one] for one in asked[:clients]]))
        before, began = settled_memory(service), time.monotonic()
        rest = list(
            pool.map(partial(_client, service), [asked[start::clients] for start in range(clients, 2 * clients)])
        )
        seconds = time.monotonic() - began
    after = settled_memory(service)
    totals = {"chunks": 0.0, "videos": 0.0}
    for name, value in _COUNTER.findall(service.read("/metrics").decode()):
        totals[name] += float(value)
    return Load(
        wanted=requests,
        made=[one for client in (*first, *rest) for one in client],
        seconds=seconds,
        chunks=round(totals["chunks"]),
        videos=round(totals["videos"]),
        before=before,
        after=after,
        gangs=gangs,
    )


def _client(service: Service, asked: Sequence[tuple[int, int]]) -> list[Made]:
    """Send requests one after the other, wait for all of them and fetch their videos."""
    names = [service.create(seconds=1, seed=seed, priority=priority) for seed, priority in asked]
    found = []
    for name in names:
        status = service.ended(name)
        frames = frames_digest(service.read(f"/v1/videos/{name}/content")) if status == "completed" else ""
        job = service.job(name)
        found.append(
            Made(
                number=job["number"],
                priority=job["line"]["priority"],
                status=status,
                created=job["created_at"],
                began=job["began_at"],
                frames=frames,
            )
        )
    return found


def settled_memory(service: Service) -> int:
    """Bytes of all processes of a service that has nothing to do: the median of some looks."""
    time.sleep(_REST)
    found = []
    for _ in range(_LOOKS):
        time.sleep(_LOOK)
        found.append(service.memory())
    return round(statistics.median(found))
