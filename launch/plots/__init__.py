"""Pictures of a record: computed and reused steps, distances, the KV that is kept, and what each rank did when.

They know records and traces only. Figures are drawn without a display and without matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from engine.files import atomic_write
from engine.record import RunRecord
from launch.output.files import check_target
from launch.plots.distance import distance_figure
from launch.plots.kv import kv_figure
from launch.plots.pipeline import PipelineTrace, pipeline_figure, pipeline_table
from launch.plots.reuse import reuse_figure

_DPI = 150

PLOTS: dict[str, Callable[[RunRecord], Figure]] = {"reuse": reuse_figure, "distance": distance_figure, "kv": kv_figure}


def plot_record(kind: str, folder: Path, out: Path) -> Path:
    """Draw a plot of a record to a PNG file, which appears when it is complete.

    Args:
        kind: one of `PLOTS`.
        folder: of the record.
        out: the file.

    Returns:
        The file.

    Raises:
        InputError: the record is missing or damaged, or the file cannot be written.
    """
    record = RunRecord.load(folder)
    check_target(out, suffix=".png", what="picture")
    return _save(PLOTS[kind](record), out)


def plot_pipeline(folder: Path, out: Path) -> str:
    """Draw what each rank did when to a PNG file, as `plot_record` does.

    Args:
        folder: of the record of a run on ranks.
        out: the file.

    Returns:
        The file, and a table of where each rank's time went.

    Raises:
        InputError: the trace is missing or damaged, or the file cannot be written.
    """
    trace = PipelineTrace.load(folder)
    check_target(out, suffix=".png", what="picture")
    _save(pipeline_figure(trace), out)
    return f"{out}\n{pipeline_table(trace.use)}"


def _save(figure: Figure, out: Path) -> Path:
    with atomic_write(out) as file:
        figure.savefig(file, format="png", dpi=_DPI)
    return out
