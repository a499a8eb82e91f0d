"""Pictures of what a run has written down: of a video's record, and of the trace of ranks."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from engine.files import atomic_write, check_target
from engine.record import RunRecord
from launch.ending import deferred_signals
from launch.plots.pipeline import PipelineTrace, pipeline_figure, pipeline_table
from launch.plots.record import distance_figure, kv_figure, reuse_figure, reuse_table

PLOTS: dict[str, Callable[[RunRecord], Figure]] = {"reuse": reuse_figure, "distance": distance_figure, "kv": kv_figure}


def plot(kind: str, folder: Path, out: Path) -> str:
    """Draw a plot of a run's record to the PNG file `out`; `kind` is one of `PLOTS`, or `pipeline`, drawn of a trace.

    Gives the name of the file; for `pipeline` also a table of where each rank's time went, for `reuse` one of the steps
    where all chunks reuse the same ones. An `InputError` says that the record or the trace is missing or damaged, or
    that the file cannot be written.
    """
    if kind == "pipeline":
        trace = PipelineTrace.load(folder)
        figure, text = pipeline_figure(trace), f"{out}\n{pipeline_table(trace.use)}"
    else:
        record = RunRecord.load(folder)
        figure, text = PLOTS[kind](record), "\n".join([str(out), *(reuse_table(record) if kind == "reuse" else ())])
    check_target(out, suffix=".png", what="picture")
    figure.savefig(picture := BytesIO(), format="png", dpi=150)
    with deferred_signals(), atomic_write(out) as file:
        file.write(picture.getbuffer())
    return text
