"""The command line: options, help, and how errors are shown.

Every command does its work elsewhere and is imported when it is called, so that help is there at once. An error that
the input caused is one line on standard error and exit status 2; a failure of ranks is one line and status 1; Ctrl-C
is exit status 130. Of several ranks one shows the line.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from engine.heap import settle_heap
from launch import __version__, options
from launch.batch.command import BATCH_HELP, batch
from launch.cache_presets import DEFAULT_CACHE, CacheOptions, KVOptions
from launch.ending import CommandFailed, has_the_word, speaks_for_all
from models.errors import InputError
from parallel.health.errors import BAD_INPUT, INTERRUPTED
from parallel.ranks.environment import RankEnv

_TERMINATED = 143  # 128 + SIGTERM
_HELP_NAMES = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="flowcache",
    help="Make videos from prompts, chunk by chunk.\n\n"
    'Try it: [bold]flowcache generate "a red circle moving right"[/bold]',
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    context_settings=_HELP_NAMES,
)
plot = typer.Typer(
    help="Draw what a run has recorded.\n\n"
    "First [cyan]flowcache generate PROMPT --record RUN_DIR[/cyan], then [cyan]flowcache plot reuse RUN_DIR[/cyan].",
    no_args_is_help=True,
    context_settings=_HELP_NAMES,
)
app.add_typer(plot, name="plot")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flowcache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


_GENERATE_HELP = """Make a video from a prompt.

The file appears under its name when it is complete; stop with Ctrl-C and nothing is left behind.

[bold]Examples[/bold]

A clip of four seconds from the small model, on a CPU:
[cyan]flowcache generate "a red circle moving right" --seconds 4 --out demo.mp4[/cyan]

From a picture, and on from a clip (its first 32 frames):
[cyan]flowcache generate "a blue cross moving up" --image start.png[/cyan]
[cyan]flowcache generate "a blue cross moving up" --video start.mp4[/cyan]

Faster, on all of the past in the room of two chunks, and with a record to draw:
[cyan]flowcache generate "a red circle moving right" --cache flowcache-fast --kv-budget 2 --record run[/cyan]
[cyan]flowcache plot reuse run[/cyan]

On four processes or GPUs, and several videos that share them:
[cyan]flowcache generate "a red circle moving right" --pp 2 --cp 2[/cyan]
[cyan]flowcache generate "a red circle moving right" "a blue cross moving up" --pp 4 --out videos[/cyan]

A released model, after downloading its weights ([cyan]flowcache models[/cyan] says which):
[cyan]flowcache generate "a cat on a roof" --model magi-4.5b-distill --steps 16[/cyan]
[cyan]flowcache generate "a cat on a roof" --config 4.5B_base_config.json --weights ckpt/magi/4.5B_base[/cyan]
"""


@app.command(help=_GENERATE_HELP)
def generate(
    context: typer.Context,
    prompts: options.Prompts,
    model: options.Model = None,
    seconds: options.Seconds = None,
    chunks: options.Chunks = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    image: options.Image = None,
    video: options.Video = None,
    cache: options.Cache = DEFAULT_CACHE,
    cache_threshold: options.CacheThreshold = None,
    cache_warmup: options.CacheWarmup = None,
    reuse: options.Reuse = None,
    extrapolate_from: options.ExtrapolateFrom = None,
    clean_pass: options.CleanPass = None,
    copy_pass: options.CopyPass = None,
    kv_budget: options.KVBudget = None,
    kv_retention: options.KVRetention = None,
    kv_queries: options.KVQueries = None,
    record: options.Record = None,
    pp: options.PP = 1,
    cp: options.CP = 1,
    split: options.Split = None,
    concurrency: options.Concurrency = None,
    trace: options.Trace = None,
    launcher: options.LauncherName = options.Launcher.LOCAL,
    config: options.Config = None,
    weights: options.Weights = None,
    attention: options.Attention = "sdpa",
    precision: options.PrecisionName = options.Precision.REFERENCE,
    threads: options.Threads = None,
) -> None:
    """Make a video from a prompt."""
    from launch.command import generate_command
    from launch.plan import Options
    from launch.ranks import RankOptions

    text = generate_command(
        Options(
            prompt=prompts[0],
            model=model,
            seconds=seconds,
            chunks=chunks,
            seed=seed,
            out=out or Path("video.mp4" if len(prompts) == 1 else "videos"),
            height=height,
            width=width,
            steps=steps,
            image=image,
            video=video,
            cache=CacheOptions(
                preset=cache,
                threshold=cache_threshold,
                warmup=cache_warmup,
                reuse=reuse,
                extrapolate_from=extrapolate_from,
                clean_pass=clean_pass,
                copy_pass=copy_pass,
            ),
            kv=KVOptions(budget=kv_budget, retention=kv_retention, queries=kv_queries),
            record=record,
            config=config,
            weights=weights,
            attention=attention,
            precise=precision is options.Precision.REFERENCE,
            threads=threads,
            ranks=RankOptions(pp=pp, cp=cp, split=split, concurrency=concurrency, trace=trace),
        ),
        prompts,
        context.obj,
        on_ray=launcher is options.Launcher.RAY,
    )
    if text is not None:
        typer.echo(text)


@app.command()
def models() -> None:
    """List the models that can be asked for by name, their sizes, and what each needs."""
    from launch.listing import show_models

    show_models()


@app.command()
def conformance(
    context: typer.Context,
    files: options.GoldenFiles,
    pp: options.PP = 1,
    cp: options.CP = 1,
    split: options.Split = None,
) -> None:
    """Recompute golden files of the published code and compare.

    One line for each file. Exit status 0 if all pass, 1 if one fails, 2 if one cannot be read.
    """
    from launch.command import conformance_command
    from launch.ranks import RankOptions

    ranks = RankOptions(pp=pp, cp=cp, split=split)
    raise typer.Exit(conformance_command(files, ranks, context.obj, report_error=_show_error))


@plot.command("reuse")
def plot_reuse(run_dir: options.RunFolder, out: options.PlotOut = None) -> None:
    """Which steps of which chunk were computed, tick by tick, and which were reused."""
    _plot("reuse", run_dir, out)


@plot.command("distance")
def plot_distance(run_dir: options.RunFolder, out: options.PlotOut = None) -> None:
    """How much each chunk changed from step to step, over its denoising.

    A run with [cyan]--cache none[/cyan] shows the model as it is; with reuse, what the run has seen.
    """
    _plot("distance", run_dir, out)


@plot.command("kv")
def plot_kv(run_dir: options.RunFolder, out: options.PlotOut = None) -> None:
    """What of each past chunk's keys and values was still held, over time, and how full the buffer was."""
    _plot("kv", run_dir, out)


@plot.command("pipeline")
def plot_pipeline(run_dir: options.RunFolder, out: options.PlotOut = None) -> None:
    """What each rank did when, and where its idle time went; of a run on ranks ([cyan]--pp[/cyan], [cyan]--cp[/cyan]).

    Prints a table as well: the share of the time that each rank was busy, and what it waited for otherwise.
    """
    from launch.plots import plot_pipeline as draw

    typer.echo(draw(run_dir, out or run_dir / "pipeline.png"))


def _plot(kind: str, run_dir: Path, out: Path | None) -> None:
    from launch.plots import plot_record

    typer.echo(plot_record(kind, run_dir, out or run_dir / f"{kind}.png"))


app.command(help=BATCH_HELP)(batch)


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    settle_heap()
    if _is_alone():  # a rank is told by its gang, which first finds out why
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # unwinds, so that nothing is left behind
    try:
        status: int | str | None = run(sys.argv[1:])
    except SystemExit as stopped:
        status = stopped.code
    if status and "torch.distributed" in sys.modules and _env() is not None:
        from parallel.health.monitor import leave

        leave(int(status))  # threads that wait for ranks that are gone would hold an orderly exit up
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; errors of the input are shown, not raised.

    Returns:
        The exit status: 0, 1 where a check or a rank failed, 2 for bad input, 130 after Ctrl-C.
    """
    env = None
    try:
        env = _env()
        # Typer quanta an interrupt into a status by itself.
        status = app(args=list(arguments), prog_name="flowcache", standalone_mode=False, obj=tuple(arguments)) or 0
    except (InputError, typer.TyperException) as error:
        if has_the_word(env):
            _show_error(error)
        return BAD_INPUT
    except CommandFailed as ended:
        status = ended.status
        if ended.shown_here and status != INTERRUPTED:
            _show_error(ended)
    if status == INTERRUPTED and speaks_for_all(env):
        typer.echo("flowcache: stopped", err=True)
    return int(status)


def _env() -> RankEnv | None:
    return RankEnv.from_environment()


def _is_alone() -> bool:
    try:
        return _env() is None
    except InputError:  # which is shown later
        return True


def _show_error(error: Exception) -> None:
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    if text:  # no arguments at all: typer has shown the help instead
        typer.echo(f"flowcache: error: {' '.join(text.split())}", err=True)
