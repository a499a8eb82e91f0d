"""Tables and verdicts of the cluster benchmark. It measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cluster_runs import Timed
from benchmarks.report import Cell, csv_text, markdown_table
from benchmarks.verdict import Verdict

_BELOW, _OVERHEAD, _ITEM = 0.98, 0.03, 0.1
CSV = ("part", "way", "repeat", "videos", "seconds", "start_s", "videos_per_minute", "item_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Two gangs against one."""

    videos: int  # of each run
    one: Sequence[Timed]  # runs of one gang with two videos in flight
    two: Sequence[Timed]  # runs of two gangs with one video each
    problems: Sequence[str]  # what differs from one process

    @property
    def ratio(self) -> float:
        """Throughput of two gangs over that of one, medians."""
        return _median(self.one) / _median(self.two)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """One gang on Ray against the same ranks of torchrun."""

    videos: int  # of each run, all in flight
    ranks: Sequence[Timed]  # runs of torchrun
    ray: Sequence[Timed]  # runs on Ray, each beside one without
    problems: Sequence[str]  # what differs from one process

    @property
    def share(self) -> float:
        """Time that Ray adds, as a share of that without; medians."""
        return _median(self.ray) / _median(self.ranks) - 1

    @property
    def item(self) -> float:
        """Seconds of a stage's item."""
        return statistics.median(one.item for one in self.ranks)


def _median(runs: Sequence[Timed]) -> float:
    return statistics.median(one.seconds for one in runs)


def verdicts(throughput: Throughput | None, overhead: Overhead | None) -> list[Verdict]:
    """What the parts that were measured are held to."""
    held = []
    if throughput is not None:
        ratio, wrong = throughput.ratio, len(throughput.problems)
        wanted = f"not below 1, to within {100 * (1 - _BELOW):.0f}%"
        held += [
            Verdict(name="2 gangs over 1 gang", measured=f"{ratio:.3f}", wanted=wanted, passed=ratio >= _BELOW),
            _same("latents of gangs", wrong),
        ]
    if overhead is not None:
        share, item = overhead.share, overhead.item
        held += [
            Verdict(
                name="time that Ray adds",
                measured=f"{100 * share:+.1f}%",
                wanted=f"at most {100 * _OVERHEAD:.0f}%",
                passed=share <= _OVERHEAD,
            ),
            Verdict(
                name="an item of a stage",
                measured=f"{1e3 * item:.0f} ms",
                wanted=f"at least {1e3 * _ITEM:.0f} ms",
                passed=item >= _ITEM,
            ),
            _same("latents with and without Ray", len(overhead.problems)),
        ]
    return held


def _same(name: str, wrong: int) -> Verdict:
    return Verdict(name=name, measured=f"{wrong} differ", wanted="as of one process, bit for bit", passed=not wrong)


def _ways(throughput: Throughput | None, overhead: Overhead | None) -> list[tuple[str, str, int, Sequence[Timed]]]:
    ways: list[tuple[str, str, int, Sequence[Timed]]] = []
    if throughput is not None:
        ways.append(("throughput", "1 gang, 2 in flight", throughput.videos, throughput.one))
        ways.append(("throughput", "2 gangs, 1 in flight each", throughput.videos, throughput.two))
    if overhead is not None:
        ways.append(("overhead", "ranks of torchrun", overhead.videos, overhead.ranks))
        ways.append(("overhead", "1 gang on Ray", overhead.videos, overhead.ray))
    return ways


def table(throughput: Throughput | None, overhead: Overhead | None) -> str:
    """A line for each way."""
    rows: list[tuple[Cell, ...]] = []
    for part, way, videos, runs in _ways(throughput, overhead):
        median = _median(runs)
        each = " ".join(f"{one.seconds:.2f}" for one in runs)
        starts = [one.start for one in runs if one.start is not None]
        start = round(statistics.median(starts), 1) if starts else "not taken"
        rows.append((part, way, videos, round(median, 2), round(60 * videos / median, 2), each, start))
    return markdown_table(("part", "way", "videos", "s", "videos per minute", "of each repeat", "start-up s"), rows)


def csv(throughput: Throughput | None, overhead: Overhead | None) -> str:
    """A line for each run."""
    rows: list[tuple[Cell, ...]] = [
        (part, way, repeat, videos, one.seconds, one.start, 60 * videos / one.seconds, one.item or None)
        for part, way, videos, runs in _ways(throughput, overhead)
        for repeat, one in enumerate(runs, 1)
    ]
    return csv_text(CSV, rows)
