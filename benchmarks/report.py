"""What every benchmark needs to show its figures: tables, CSV, a line about the machine, figures on disk.

It knows no benchmark. Files appear under their final name only when they are whole.
"""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import typer
from matplotlib.figure import Figure

from models.errors import InputError

Cell = str | int | float | bool | None


def _cell(value: Cell) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table that is also legible as plain text; columns of numbers are right-aligned.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """
    cells = [[_cell(value).replace("|", "\\|") for value in row] for row in (headers, *rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    numbers = [
        bool(rows) and all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        for i in range(len(headers))
    ]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numbers, strict=True)]

    def line(row: Sequence[str]) -> str:
        parts = zip(row, widths, numbers, strict=True)
        return "| " + " | ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in parts) + " |"

    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def csv_text(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Rows as CSV with a header line; numbers keep six digits, None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue()


def machine_line() -> str:
    """The machine and the software that figures were measured with, in one line."""
    device = "no GPU"
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    parts = (
        f"{os.cpu_count()} cores {_cpu_name()}",
        device,
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"PyTorch {torch.__version__}",
        f"{torch.get_num_threads()} threads",
    )
    return ", ".join(parts)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def output_folder(path: Path) -> Path:
    """Make the folder that results go to, before the work that fills it.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write to the folder {path}: choose another with --out")
    return path


def save_text(path: Path, text: str) -> None:
    """Write a text file."""
    _whole(path, lambda part: part.write_text(text if text.endswith("\n") else text + "\n"))


def save_figure(path: Path, figure: Figure, *, dpi: int = 110) -> None:
    """Write a figure in the format of the path's ending."""
    kind = path.suffix.lstrip(".")
    _whole(path, lambda part: figure.savefig(part, dpi=dpi, format=kind))


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark's command line; bad input is one line on standard error.

    Args:
        app: the command.
        name: how it is called.
        arguments: in place of the process's own.

    Returns:
        The exit status: the command's own, or 2 for bad input.
    """
    try:
        return app(arguments, prog_name=name, standalone_mode=False) or 0
    except (InputError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        typer.echo(f"{name}: error: {' '.join(text.split())}", err=True)
        return 2
