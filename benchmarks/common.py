"""What every benchmark is made of: its command, tables, verdicts, files, a plot's style, a search, fresh processes.

It knows no benchmark. Memory of a process is resident memory, as Linux counts it.
"""

import csv
import ctypes
import gc
import io
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from engine.files import atomic_write
from models.errors import InputError
from parallel.health.exit_codes import BAD_INPUT
from parallel.health.failure import GangError

_P = ParamSpec("_P")
_T = TypeVar("_T")
Cell = str | int | float | bool | None
Row = dict[str, Cell]
"""A line of a table, cells by their headers; all lines of a table have the same headers."""
ROOT = Path(__file__).parents[1]
"""The checkout."""
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
"""The option of every command that says where results go."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure that a benchmark is held to; it stands as a line of a table."""

    name: str
    measured: str
    wanted: str = ""  # in words; nothing if the figure is only there to be read
    passed: bool | None = None  # None where nothing is wanted


def _cell(value: Cell) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table that is also legible as plain text; no text where there are none.

    Columns of numbers are right-aligned, and headers have spaces for underscores.
    """
    made = []
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        cells = [name.replace("_", " "), *(_cell(value).replace("|", "\\|") for value in values)]
        width = max(3, *map(len, cells))
        right = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        rule = "-" * (width - 1) + ":" if right else "-" * width
        made.append([(cell.rjust if right else cell.ljust)(width) for cell in (cells[0], rule, *cells[1:])])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*made, strict=True))


def bullets(lines: Iterable[str]) -> str:
    """Lines as a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header line; numbers keep six digits, None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else (), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{one:.6g}" if isinstance(one, float) else one for name, one in row.items()})
    return text.getvalue()


def publish(
    out: Path,
    name: str,
    *,
    title: str,
    about: str,
    verdicts: Sequence[Verdict] = (),
    sections: Mapping[str, str | Sequence[Row]] | None = None,
    data: Sequence[Row] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> int:
    """Write what a benchmark has found into a folder, and print it: Markdown, CSV, plots by the names of their files.

    Sections are Markdown or rows of a table by their headings, and come after the verdicts; empty ones are left out.
    `data` are the rows of the CSV file, by default those of the first table. Returns the exit status: 0 if no verdict
    has failed, else 1.
    """
    parts = [f"# {title}", about]
    if verdicts:
        words = {None: "", True: "PASS", False: "FAIL"}
        rows: list[Row] = [
            {"figure": one.name, "measured": one.measured, "wanted": one.wanted, "verdict": words[one.passed]}
            for one in verdicts
        ]
        parts.append(f"## Verdicts\n\n{table(rows)}")
    for heading, part in (sections or {}).items():
        if part:
            parts.append(f"## {heading}\n\n{part if isinstance(part, str) else table(part)}")
    text = "\n\n".join(parts)
    save_text(out / f"{name}.md", text)
    tables = (part for part in (sections or {}).values() if not isinstance(part, str))
    save_text(out / f"{name}.csv", csv_text(next(tables, ()) if data is None else data))
    for file, figure in (figures or {}).items():
        save_figure(out / f"{file}.png", figure)
    typer.echo(f"{text}\n\nwritten to {out}")
    return int(any(one.passed is False for one in verdicts))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_line() -> str:
    """The machine and the software that figures were measured with, in one line."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    parts = (
        f"{os.cpu_count()} cores {_field('/proc/cpuinfo', 'model name') or platform.processor()}",
        f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "no GPU",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"PyTorch {torch.__version__}",
        f"{torch.get_num_threads()} threads",
    )
    return ", ".join(parts)


def commit() -> str:
    """The commit of this checkout, if git knows it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _field(path: str, name: str) -> str | None:
    """The first line of that name in a file of the kernel; None if there is none, or this is not Linux."""
    try:
        lines = [line.partition(":") for line in Path(path).read_text().splitlines()]
    except OSError:
        return None
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def output_folder(path: Path) -> Path:
    """Make the folder that results go to, before the work that fills it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write to the folder {path}: choose another with --out")
    return path


def save_text(path: Path, text: str) -> None:
    """Write a text file that ends with a newline."""
    with atomic_write(path) as file:
        file.write((text if text.endswith("\n") else text + "\n").encode())


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with atomic_write(path) as picture:
        figure.savefig(picture, dpi=110, format="png")


def new_plot(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one plot, its labels and a light grid."""
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.add_subplot()
    style(axes, title, x, y)
    return figure, axes


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Give a plot its labels and a light grid."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Put a plot's legend below the figure, if there is anything to name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def run_command(command: Callable[..., int], name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark's command line and hand back its exit status; what goes wrong is one line on standard error.

    The parameters of `command` are the options; `arguments` are in place of those of the process.
    """
    app = typer.Typer(add_completion=False)
    app.command()(command)
    try:
        return int(app(arguments, prog_name=name, standalone_mode=False) or 0)
    except GangError as error:
        text, status = str(error), error.failure.status
    except (InputError, typer.TyperException) as error:
        text, status = error.format_message() if isinstance(error, typer.TyperException) else str(error), BAD_INPUT
    typer.echo(f"{name}: error: {' '.join(text.split())}", err=True)
    return status


def new_log() -> Callable[[str], None]:
    """A function that writes lines to standard error."""
    return partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)


def progress(items: Iterable[_T], what: str, total: int) -> Iterable[_T]:
    """The items, with a progress bar on standard error."""
    return track(items, what, total, console=Console(stderr=True))


def search(
    measure: Callable[[float], float],
    target: float,
    known: dict[float, float],
    *,
    tries: int,
    near: float = 0.0,
    geometric: bool = False,
) -> dict[float, float]:
    """Search the place where something that falls reaches a value, by halving between known places or doubling beyond.

    `measure` gives the value at a place, which may jump, and rise a little where it should fall. All that it gives is
    added in order to `known`, where a bound that is not measured has an infinite value; see `nearest`. The search ends
    after so many `tries`, or with a value that is no further than `near` from the target. With `geometric`, ratios are
    halved in place of differences, and places have three digits, as in a preset.
    """
    for _ in range(tries):
        if abs(known[nearest(known, target)] - target) <= near:
            break
        places = sorted(known)
        above = sum(value > target for value in itertools.accumulate((known[place] for place in places), min))
        if above in (0, len(places)):
            place = places[-1] * 2 if above else places[0] / 2
        else:
            low, high = places[above - 1 : above + 1]
            place = math.sqrt(low * high) if geometric else (low + high) / 2
        place = float(f"{place:.3g}") if geometric else place
        if place in known:
            break
        known[place] = measure(place)
    return known


def nearest(known: Mapping[float, float], target: float) -> float:
    """The place whose value is nearest to a target; of equals the least."""
    return min(known, key=lambda place: (abs(known[place] - target), place))


def in_fresh_processes(copies: int, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> list[_T]:
    """Run a function of a module in new Python processes at the same time and hand back what each returns.

    Each is a session of its own, as every rank of a gang is: Linux shares a busy machine among sessions.

    Raises:
        InputError: a process was killed, most likely because memory ran out; or what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=copies, mp_context=context, initializer=os.setsid) as pool:
        try:
            waiting = [pool.submit(function, *args, **kwargs) for _ in range(copies)]
            return [one.result() for one in waiting]
        except BrokenProcessPool:
            raise InputError("a measurement's process was killed, likely for want of memory: measure less") from None
        except BaseException:
            for child in multiprocessing.active_children():  # Ctrl-C does not reach other sessions
                child.kill()
            raise


def in_fresh_process(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The same in one process."""
    return in_fresh_processes(1, function, *args, **kwargs)[0]


def torchrun_command(ranks: int) -> list[str]:
    """A command that starts the Python program which follows it on so many ranks of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def seconds_of(
    function: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Time of a call: of a GPU by its events, without the launch; elsewhere by a clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = clock()
    function()
    return clock() - began


def rss() -> int:
    """Resident bytes of this process now; memory that was freed is given back to the system first."""
    gc.collect()
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_rss() -> int:
    """Highest resident bytes of this process, since `reset_peak` where that works."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Set the peak back to what is resident now; tells whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    found = _field("/proc/self/status", name)
    if found is None:
        raise InputError("memory is read from /proc: run this on Linux")
    return int(found.split()[0]) * 1024


def median(values: Iterable[float]) -> float:
    """The median; not a number where there are no values."""
    known = list(values)
    return statistics.median(known) if known else float("nan")
