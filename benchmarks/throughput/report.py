"""Runs as tables, plots and verdicts. It makes no videos and writes no files."""

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.common import Row, Verdict, style
from benchmarks.throughput.measure import Look, Run

_GROWTH, _SLOWER, _SEEN = 1.02, 1.05, 0.8
_WARM = 60  # chunks of every video after which memory has settled; half of shorter ones
_LONG = 100  # chunks from which on a video is long enough to be held to something
_EARLY, _LATE = (1 / 12, 1 / 4), (5 / 6, 1.0)  # parts of a video that are compared: of 600 chunks 50 to 150, 500 to 600
_MIB = 2**20


def name(run: Run) -> str:
    """A run in a few words."""
    case = run.case
    kv = "own range" if case.kv_budget is None else f"budget {case.kv_budget}"
    layout = f"pp {case.pp}" + (f" x cp {case.cp}" if case.cp > 1 else "")
    videos = f"{case.videos} video{'s' * (case.videos > 1)}"
    where = "" if case.launcher == "local" else f", {case.launcher}"
    seed = "" if case.seed is None else f", seed {case.seed}"
    return ", ".join([case.cache or "default", *case.passes, kv, layout, f"{videos}{seed}{where}"])


def _warm(run: Run) -> Look:
    """Memory once it has settled."""
    least = run.case.videos * min(_WARM, run.case.chunks // 2)
    return next((look for look in run.looks if look.chunks >= least), run.looks[-1])


def _in_flight(run: Run) -> list[Look]:
    """What was read while all videos were in flight: one that reuses more ends before the others."""
    end = min(video[max(0, len(video) - 9)] for video in run.chunk_seconds)
    return [look for look in run.looks if look.seconds <= end] or run.looks[:1]


def speed_row(run: Run, base: Run) -> Row:
    """How fast a run was; `base` has the same length and one process without reuse."""
    row: Row = {"run": name(run), "chunks": run.case.chunks, "frames_per_second": run.fps}
    row |= {"speed_up": run.fps / base.fps, "computed": f"{run.computed:.2f}", "first_chunk_s": run.first_chunk}
    row |= {"chunk_s": run.steady(0.0, 1.0), "early_s": run.steady(*_EARLY), "late_s": run.steady(*_LATE)}
    if run.case.chunks >= _LONG:
        work, machine = (of(*_LATE) / of(*_EARLY) - 1 for of in (run.work, run.probe))
        row |= {"work": f"{work:+.1%}", "machine": f"{machine:+.1%}", "late_to_early": f"{_slower(run) - 1:+.1%}"}
    return row | {"decode_s": run.decode, "stages_busy": " ".join(f"{share:.0%}" for share in run.busy)}


def memory_row(run: Run) -> Row:
    """What a run took."""
    warm, last = _warm(run), _in_flight(run)[-1]
    row: Row = {"run": name(run), "chunks": run.case.chunks, "kv_MiB": f"{last.kv_bytes / _MIB:.2f}"}
    row |= {"host_warm_MiB": f"{warm.host_bytes / _MIB:.1f}", "host_end_MiB": f"{last.host_bytes / _MIB:.1f}"}
    return row | {"growth": f"{_growth(run):+.2%}", "device_MiB": f"{last.device_bytes / _MIB:.1f}"}


def minute_rows(run: Run) -> list[Row]:
    """How each minute of the first video looks."""
    rows: list[Row] = []
    for one in run.minutes:
        row: Row = {"run": name(run), "minute": one.minute, "sharpness": f"{one.sharpness:.2f}"}
        row["spread"] = f"{one.spread:.2f}"
        if not math.isnan(one.shape):
            row |= {"colour_right": f"{one.colour:.0%}", "direction_right": f"{one.direction:.0%}"}
            row |= {"overlap": f"{one.shape:.2f}", "boundary_error_px": f"{one.position:.2f}"}
        rows.append(row)
    return rows


def _growth(run: Run) -> float:
    flying = [look.host_bytes for look in _in_flight(run)]
    return statistics.median(flying[-3:]) / _warm(run).host_bytes - 1


def _slower(run: Run) -> float:
    """A late computed step over an early one, in time, each in units of what the machine gave then."""
    late, early = (run.steady(*part) / run.work(*part) / run.probe(*part) for part in (_LATE, _EARLY))
    return late / early


def verdicts(run: Run) -> list[Verdict]:
    """What a long run is held to; nothing for a short one, whose figures are noise."""
    if run.case.chunks < _LONG:
        return []
    kv = {look.kv_bytes for look in _in_flight(run) if look.chunks >= _warm(run).chunks}
    growth, slower = _growth(run), _slower(run)
    own = f"{run.case.chunks} chunks, {name(run)}"
    held = " and ".join(map(str, sorted(kv)))
    first, last = (run.minutes[place].shape for place in (0, -1))
    found = [
        Verdict(f"{own}: KV bytes all along", held, "equal", len(kv) == 1),
        Verdict(f"{own}: memory against warm", f"{growth:+.2%}", f"< {_GROWTH - 1:+.0%}", growth < _GROWTH - 1),
        Verdict(
            f"{own}: a late computed step against an early one",
            f"{slower - 1:+.1%}",
            f"<= {_SLOWER - 1:+.0%}",
            slower <= _SLOWER,
        ),
    ]
    if not math.isnan(first):
        shown, wanted = f"{last:.2f} after {first:.2f}", f">= {_SEEN} of it"
        found.append(
            Verdict(f"{own}: overlap in the last minute after the first", shown, wanted, last >= _SEEN * first)
        )
    return found


def drift(run: Run) -> Row:
    """The last minute against the first, as differences and ratios."""
    first, last = run.minutes[0], run.minutes[-1]
    row: Row = {"run": name(run), "minutes": len(run.minutes), "sharpness": f"x {last.sharpness / first.sharpness:.2f}"}
    row["spread"] = f"x {last.spread / first.spread:.2f}"
    if not math.isnan(first.shape):
        row |= {"colour_right": f"{last.colour - first.colour:+.0%}"}
        row |= {"direction_right": f"{last.direction - first.direction:+.0%}"}
        row |= {"overlap": f"{last.shape - first.shape:+.2f}"}
    return row


def over_the_length(runs: Sequence[Run]) -> Figure:
    """Speed, memory and looks over the length of the videos, a line for each run."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    speed, memory, sharp, shape = figure.subplots(2, 2).flat
    for run in runs:
        label, fps, per = name(run), run.video_fps, run.frames_per_chunk
        times = [sum(times) / len(times) for times in zip(*run.chunk_seconds, strict=True)]
        step = max(1, len(times) // 40)
        ends = range(step, len(times), step)
        made = [run.case.videos * per * step / (times[end] - times[end - step]) for end in ends]
        speed.plot([end * per / fps / 60 for end in ends], made, label=label)
        at = [look.chunks / run.case.videos * per / fps / 60 for look in run.looks]
        memory.plot(at, [look.host_bytes / _MIB for look in run.looks])
        minutes = [one.minute for one in run.minutes]
        sharp.plot(minutes, [one.sharpness for one in run.minutes], marker="o", markersize=3)
        shape.plot(minutes, [one.shape for one in run.minutes], marker="o", markersize=3)
    for axes, title, what in (
        (speed, "Speed", "frames per second"),
        (memory, "Memory of all processes", "MiB"),
        (sharp, "Sharpness", "mean difference of neighbours"),
        (shape, "Overlap with the prompt's shape", "share"),
    ):
        style(axes, title, "minutes of video", what)
        axes.set_ylim(bottom=0)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure
