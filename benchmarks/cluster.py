"""What do gangs of a Ray cluster bring, and what does Ray cost? Measured on this machine.

    python -m benchmarks.cluster --out results/cluster           # some minutes, on two free cores
    python -m benchmarks.cluster --quick --out /tmp/cluster      # small, no speed to speak of
    python -m benchmarks.cluster --parts overhead --overhead-repeats 9

Throughput: a batch of videos on two gangs of two stages, one video each at a time, against one gang with two videos in
flight. Overhead: the same videos, all in flight on two stages, by ranks that torchrun starts and by a gang of a Ray
cluster, in turn; the model is so large that an item of a stage takes 100 ms or more. Seconds are of denoising, from the
first submission to the last chunk: ranks are loaded and warm. All latents are compared with those of one process.

Exit status 0 if two gangs are not slower than one, Ray adds little enough and no latents differ, 1 if not, 2 for bad
input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import common
from benchmarks.common import Out, Row, Verdict, median
from benchmarks.ray_runs import GangSetup, on_ray
from benchmarks.runs import alone, on_ranks
from benchmarks.workload import Made, ModelSpec, Steps, Width, Workload, differing
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from parallel.mesh import Layout

_PARTS = ("throughput", "overhead")
_STAGES = Layout(pp=2)
_LEAN = ReuseSettings(clean_pass=False, copy_pass=False)
_OVERHEAD_VIDEOS = 2
_BELOW, _OVERHEAD, _ITEM = 0.98, 0.03, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One of the two measurements: the same videos in two ways, in turn."""

    name: str
    workload: Workload
    runs: Mapping[str, Sequence[Made]]  # of each way, by its name: what it is compared with comes first
    problems: Sequence[str]  # what differs from one process

    @property
    def ratio(self) -> float:
        """Time of the first way over that of the second, medians."""
        first, second = (median(one.seconds for one in runs) for runs in self.runs.values())
        return first / second

    @property
    def item(self) -> float:
        """Seconds of a stage's item in the first way."""
        return median(one.item for one in next(iter(self.runs.values())))

    @property
    def verdicts(self) -> list[Verdict]:
        """What it is held to."""
        wrong = len(self.problems)
        if self.name == "throughput":
            wanted = f"not below 1, to within {100 * (1 - _BELOW):.0f}%"
            held = [Verdict("2 gangs over 1 gang", f"{self.ratio:.3f}", wanted, self.ratio >= _BELOW)]
            name = "latents of gangs"
        else:
            share, item, most = 1 / self.ratio - 1, self.item, f"at most {100 * _OVERHEAD:.0f}%"
            held = [
                Verdict("time that Ray adds", f"{100 * share:+.1f}%", most, share <= _OVERHEAD),
                Verdict("an item of a stage", f"{1e3 * item:.0f} ms", f"at least {1e3 * _ITEM:.0f} ms", item >= _ITEM),
            ]
            name = "latents with and without Ray"
        return [*held, Verdict(name, f"{wrong} differ", "as of one process, bit for bit", not wrong)]

    @property
    def rows(self) -> list[Row]:
        """A line for each way."""
        rows, videos = [], self.workload.videos
        for way, runs in self.runs.items():
            seconds = median(one.seconds for one in runs)
            starts = [one.start for one in runs if one.start is not None]
            row: Row = {"part": self.name, "way": way, "videos": videos, "s": round(seconds, 2)}
            row |= {"videos per minute": round(60 * videos / seconds, 2)}
            row |= {"of each repeat": " ".join(f"{one.seconds:.2f}" for one in runs)}
            rows.append(row | {"start-up s": round(median(starts), 1) if starts else "not taken"})
        return rows

    @property
    def csv_rows(self) -> list[Row]:
        """A line for each run."""
        rows, videos = [], self.workload.videos
        for way, runs in self.runs.items():
            for repeat, one in enumerate(runs, 1):
                row: Row = {"part": self.name, "way": way, "repeat": repeat, "videos": videos}
                row |= {"seconds": one.seconds, "start_s": one.start}
                rows.append(row | {"videos_per_minute": 60 * videos / one.seconds, "item_s": one.item or None})
        return rows


def run(
    parts: Annotated[str, typer.Option(help="What to measure: of throughput and overhead.")] = "throughput,overhead",
    layers: Annotated[int, typer.Option(min=2, help="Layers of the random model.")] = 8,
    width: Width = 384,
    steps: Steps = 8,
    videos: Annotated[int, typer.Option(min=1, help="Throughput: videos of a batch.")] = 12,
    chunks: Annotated[int, typer.Option(min=1, help="Throughput: length of a video.")] = 4,
    side: Annotated[int, typer.Option(min=1, help="Throughput: pixels of a frame's side.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Throughput: how often both are measured.")] = 3,
    overhead_chunks: Annotated[int, typer.Option(min=1, help="Overhead: length of a video.")] = 5,
    overhead_side: Annotated[int, typer.Option(min=1, help="Overhead: pixels of a frame's side.")] = 144,
    overhead_repeats: Annotated[int, typer.Option(min=1, help="Overhead: how often both are measured.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of small videos.")] = False,
    out: Out = Path("results/cluster"),
) -> int:
    """Measure gangs of a cluster."""
    chosen = [name.strip() for name in parts.split(",")]
    for name in chosen:
        if name not in _PARTS:
            raise InputError(f"--parts {parts}: there is no part {name!r}; choose from {', '.join(_PARTS)}")
    if quick:
        layers, videos, chunks, repeats = min(layers, 4), min(videos, 4), min(chunks, 2), 1
        overhead_chunks, overhead_side, overhead_repeats = min(overhead_chunks, 2), min(overhead_side, 64), 1
    small = Workload(
        model=ModelSpec(layers=layers, width=width, side=side), chunks=chunks, steps=steps, videos=videos, reuse=_LEAN
    )
    spec = replace(small.model, side=overhead_side)
    large = replace(small, model=spec, chunks=overhead_chunks, videos=_OVERHEAD_VIDEOS)
    one, two = (GangSetup(workload=own, layout=_STAGES, gangs=1, concurrency=2) for own in (small, large))
    for setup in (one, two):
        _ = setup.settings  # checks all of it
    common.output_folder(out)
    made = []
    if "throughput" in chosen:
        pair: dict[str, Callable[[], Made]] = {
            "1 gang, 2 in flight": lambda: on_ray(one),
            "2 gangs, 1 in flight each": lambda: on_ray(replace(one, gangs=2, concurrency=1)),
        }
        made.append(_measure("throughput", small, pair, repeats))
    if "overhead" in chosen:
        ways: dict[str, Callable[[], Made]] = {
            "ranks of torchrun": lambda: on_ranks(_STAGES, [large], torchrun=True)[0],
            "1 gang on Ray": lambda: on_ray(two),
        }
        made.append(_measure("overhead", large, ways, overhead_repeats))
    return _write(out, made)


def _write(out: Path, made: Sequence[Part]) -> int:
    about = "; ".join(f"{part.name}: {part.workload.size}" for part in made)
    return common.publish(
        out,
        "cluster",
        title="Gangs of a Ray cluster",
        about=f"Two stages to a gang; {about}. {common.machine_line()}; one thread per rank.",
        verdicts=[verdict for part in made for verdict in part.verdicts],
        sections={
            "Times": [row for part in made for row in part.rows],
            "What differs": "\n".join(f"- {line}" for part in made for line in part.problems),
        },
        data=[row for part in made for row in part.csv_rows],
    )


def _measure(name: str, workload: Workload, ways: Mapping[str, Callable[[], Made]], repeats: int) -> Part:
    """Make the videos in one process, and then in both ways again and again; which one is first alternates."""
    log = common.new_log()
    log(f"{name}: {workload.videos} videos in one process")
    ((wanted,),) = alone([workload])
    runs: dict[str, list[Made]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in list(ways)[:: -1 if repeat % 2 else 1]:
            made = ways[way]()
            runs[way].append(made)
            log(f"{name}, repeat {repeat + 1} of {repeats}: {way}, {made.seconds:.2f} s")
    problems = differing([one for own in runs.values() for one in own], wanted)
    return Part(name=name, workload=workload, runs=runs, problems=problems)


if __name__ == "__main__":
    sys.exit(common.run_command(run, "cluster"))
