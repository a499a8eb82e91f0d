"""Where the time of each rank went: busy, or idle for which cause. A pure function on the events of a trace.

The idle time before an item is explained by following the awaited item back through the pipeline. At each moment it was

- in transit: one stage had finished it, and the next one, which was free, had not begun it: `transport`;
- queued at a stage that was busy with other items, or computed there after it had been queued: `imbalance`. On a faster
  stage it would have come earlier;
- computed as soon as it arrived, or nowhere at all: `dependency`. A faster link or a better split would not help; only
  more work in flight would.

A stage awaits its next item. The leader awaits the velocity that let it go on: the last one that was computed before it
did. An item that has not begun anywhere waits for such a velocity, and is followed through that.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Event = Mapping[str, Any]
_AT_ONCE = 0.05  # of an item's own time: a rank that waited less before the item came to it straight from other work


class Cause(StrEnum):
    """Why a rank was idle."""

    DEPENDENCY = "dependency"
    TRANSPORT = "transport"
    IMBALANCE = "imbalance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """An item on a rank, with the changes of the KV before it. Times in seconds."""

    key: tuple[int, int, int, str]  # (request, tick, chunk, pass)
    chunk: int
    request: int
    began: float  # start of the KV's change, or of the item
    ended: float
    returns: bool  # its velocity goes back to the leader


@dataclass(frozen=True, kw_only=True, slots=True)
class Idle:
    """A stretch of idle time, in seconds."""

    began: float
    ended: float
    cause: Cause


@dataclass(slots=True)
class RankUse:
    """One rank over the whole trace."""

    rank: int
    stage: int
    cp_rank: int  # among the ranks of its stage
    runs: list[Run] = field(default_factory=list)  # its items in order
    waits: list[tuple[float, float]] = field(default_factory=list)  # when it waited, in order
    idle: list[Idle] = field(default_factory=list)  # its idle time in order
    busy: float = 0.0  # seconds with items
    other: float = 0.0  # seconds with anything else: reading messages, embedding, deciding, reading velocities out

    def idle_seconds(self, cause: Cause) -> float:
        """Seconds idle for one cause."""
        return sum(one.ended - one.began for one in self.idle if one.cause is cause)


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilisation:
    """All ranks, from the start of the first item to the end of the last; seconds on the trace's clock."""

    began: float
    ended: float
    ranks: tuple[RankUse, ...]


def analyse(events: Iterable[Event]) -> Utilisation | None:
    """Explain a trace: what each rank did; None if nothing was computed. Events may be in any order."""
    ranks = _read(events)
    runs = [run for rank in ranks.values() for run in rank.runs]
    if not runs:
        return None
    began, ended = min(run.began for run in runs), max(run.ended for run in runs)
    history = _History(ranks)
    for rank in ranks.values():
        rank.busy = sum(run.ended - run.began for run in rank.runs)
        rank.idle = _joined(history.idle(rank, began, ended))
        rank.other = max(0.0, ended - began - rank.busy - sum(one.ended - one.began for one in rank.idle))
    ordered = sorted(ranks.values(), key=lambda rank: (rank.stage, rank.cp_rank))
    return Utilisation(began=began, ended=ended, ranks=tuple(ordered))


def _read(events: Iterable[Event]) -> dict[int, RankUse]:
    ranks: dict[int, RankUse] = {}
    waits: dict[int, list[tuple[float, float]]] = defaultdict(list)
    changed: dict[tuple[int, tuple[int, int, int, str]], float] = {}
    computed: list[tuple[int, Event]] = []
    for event in events:
        kind, rank = event.get("cat"), int(event.get("pid", -1))
        if event.get("name") == "process_name":
            about = event["args"]
            ranks[rank] = RankUse(rank=rank, stage=int(about.get("stage", rank)), cp_rank=int(about.get("cp_rank", 0)))
        elif kind == "wait":
            began = event["ts"] / 1e6
            waits[rank].append((began, began + event["dur"] / 1e6))
        elif kind == "compress":
            changed[rank, _key(event)] = event["ts"] / 1e6
        elif kind == "compute":
            computed.append((rank, event))
    for rank, event in computed:
        key, about, began = _key(event), event["args"], event["ts"] / 1e6
        run = Run(
            key=key,
            chunk=int(about["chunk"]),
            request=int(about["request"]),
            began=min(began, changed.get((rank, key), began)),
            ended=began + event["dur"] / 1e6,
            returns=bool(about.get("returns", True)),
        )
        ranks.setdefault(rank, RankUse(rank=rank, stage=rank, cp_rank=0)).runs.append(run)
    for use in ranks.values():
        use.runs.sort(key=lambda run: run.began)
        use.waits = sorted(waits[use.rank])
    return ranks


def _key(event: Event) -> tuple[int, int, int, str]:
    about = event["args"]
    return int(about["request"]), int(about["tick"]), int(about["chunk"]), str(about.get("what", event["name"]))


class _History:
    """Follows items back through the pipeline."""

    def __init__(self, ranks: Mapping[int, RankUse]) -> None:
        self._at = {(rank.stage, rank.cp_rank): rank for rank in ranks.values()}
        self._last = max(stage for stage, _ in self._at)
        self._index = {place: {run.key: n for n, run in enumerate(rank.runs)} for place, rank in self._at.items()}
        tail = self._at.get((self._last, 0))
        self._returned = sorted((run for run in tail.runs if run.returns), key=lambda run: run.ended) if tail else []
        self._ends = [run.ended for run in self._returned]

    def idle(self, rank: RankUse, began: float, ended: float) -> Iterator[Idle]:
        """A rank's idle time from the trace's start to its end."""
        before = began
        for run in rank.runs:
            if waits := list(_waits(rank, before, run.began)):
                # From the gap's end backwards, as far as the gap goes.
                pieces = list(self._back(run, (rank.stage, rank.cp_rank), before))[::-1]
                for start, end in waits:
                    yield from _cut(pieces, start, end)
            before = run.ended
        if ended > before:
            yield Idle(began=before, ended=ended, cause=Cause.DEPENDENCY)  # no further item comes

    def _back(self, run: Run, place: tuple[int, int], until: float) -> Iterator[Idle]:
        """Where the awaited item was, backwards from its start at a place, a (stage, cp_rank), until a time."""
        awaited, now = run, run.began
        while now > until:
            if place == (0, 0):  # the leader
                upstream, since = self._released_by(awaited)
                source = self._last, 0
            elif place[0] == 0:  # other ranks of its stage: it sends them an item when it begins the item itself
                upstream, source = self._find(awaited, (0, 0)), (0, 0)
                since = until if upstream is None else upstream.began
            else:
                source = place[0] - 1, place[1]
                upstream = self._find(awaited, source)
                since = until if upstream is None else upstream.ended
            yield from self._between(since, now, place)
            if upstream is None:
                return
            if since > upstream.began:  # it was computed there
                cause = Cause.IMBALANCE if self._queued(upstream, source) else Cause.DEPENDENCY
                yield Idle(began=upstream.began, ended=upstream.ended, cause=cause)
            place, awaited, now = source, upstream, upstream.began

    def _between(self, since: float, now: float, place: tuple[int, int]) -> Iterator[Idle]:
        """On the way to a place: queued while that rank is busy with other items, else in transit; backwards."""
        runs = self._at[place].runs
        index = bisect_left(runs, now, key=lambda run: run.began) - 1
        while index >= 0 and now > since and runs[index].ended > since:
            other = runs[index]
            if now > other.ended:
                yield Idle(began=other.ended, ended=now, cause=Cause.TRANSPORT)
                now = other.ended
            start = max(since, other.began)
            yield Idle(began=start, ended=now, cause=Cause.IMBALANCE)
            now, index = start, index - 1
        if now > since:
            yield Idle(began=since, ended=now, cause=Cause.TRANSPORT)

    def _released_by(self, run: Run) -> tuple[Run | None, float]:
        """The velocity that let the leader begin an item, and when it was computed."""
        index = bisect_right(self._ends, run.began) - 1
        if self._queued(run, (0, 0)):  # it was ready before: with the last step of its own chunk
            own = run.request, run.chunk
            while index >= 0 and (self._returned[index].request, self._returned[index].chunk) != own:
                index -= 1
        found = self._returned[index] if index >= 0 else None
        return found, run.began if found is None else found.ended

    def _queued(self, run: Run, place: tuple[int, int]) -> bool:
        """Whether an item was queued until a rank had finished another one."""
        rank, index = self._at[place], self._index[place][run.key]
        if not index:
            return False
        previous = rank.runs[index - 1]
        if place[0] > 0:
            upstream = self._find(run, (place[0] - 1, place[1]))
            return upstream is not None and upstream.ended < previous.ended
        waited = sum(end - start for start, end in _waits(rank, previous.ended, run.began))
        return waited < _AT_ONCE * (run.ended - run.began)

    def _find(self, run: Run, place: tuple[int, int]) -> Run | None:
        if place not in self._at or run.key not in self._index[place]:
            return None
        return self._at[place].runs[self._index[place][run.key]]


def _waits(rank: RankUse, after: float, before: float) -> Iterator[tuple[float, float]]:
    """When a rank waited between two times; its waits do not overlap."""
    for began, ended in rank.waits[max(0, bisect_left(rank.waits, (after, 0.0)) - 1) :]:
        if began >= before:
            return
        if min(ended, before) > max(began, after):
            yield max(began, after), min(ended, before)


def _cut(pieces: list[Idle], began: float, ended: float) -> Iterator[Idle]:
    """The pieces within a stretch; the gaps between them are dependencies on items that were nowhere."""
    at = began
    for piece in pieces:
        start, end = max(piece.began, at), min(piece.ended, ended)
        if end <= start:
            continue
        if start > at:
            yield Idle(began=at, ended=start, cause=Cause.DEPENDENCY)
        yield Idle(began=start, ended=end, cause=piece.cause)
        at = end
    if at < ended:
        yield Idle(began=at, ended=ended, cause=Cause.DEPENDENCY)


def _joined(idle: Iterable[Idle]) -> list[Idle]:
    """Adjacent stretches of one cause as one."""
    joined: list[Idle] = []
    for one in idle:
        if joined and joined[-1].cause is one.cause and one.began <= joined[-1].ended:
            joined[-1] = Idle(began=joined[-1].began, ended=max(one.ended, joined[-1].ended), cause=one.cause)
        else:
            joined.append(one)
    return joined
