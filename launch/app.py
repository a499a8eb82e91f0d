"""The command line: options, help, and how errors are shown.

Every command does its work elsewhere and is imported when it is called, so that help is there at once. An error that
the input caused is one line on standard error and exit status 2; Ctrl-C is exit status 130.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch import __version__
from models.errors import InputError

__all__ = ["app", "main", "run"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_TERMINATED = 143
_BAD_INPUT = 2

_VIDEO, _START, _FILES, _COMPUTE = "The video", "Start from something", "Model files", "How to compute"

app = typer.Typer(
    name="flowcache",
    help="Make videos from prompts, chunk by chunk.\n\n"
    'Try it: [bold]flowcache generate "a red circle moving right"[/bold]',
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Precision(StrEnum):
    """Names of `--precision`."""

    REFERENCE = "reference"
    FAST = "fast"


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

A released model, after downloading its weights ([cyan]flowcache models[/cyan] says which):
[cyan]flowcache generate "a cat on a roof" --model magi-4.5b-distill --steps 16[/cyan]
[cyan]flowcache generate "a cat on a roof" --config 4.5B_base_config.json --weights ckpt/magi/4.5B_base[/cyan]
"""


@app.command(help=_GENERATE_HELP)
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            help='What the video shows. magi-pocket knows a colour, a shape and a motion: "a red circle moving right".'
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="A name from [cyan]flowcache models[/cyan].", show_default="magi-pocket", rich_help_panel=_VIDEO
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Length, rounded up to whole chunks of one second.", rich_help_panel=_VIDEO),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(help="Length in chunks of 24 frames, in place of --seconds.", rich_help_panel=_VIDEO),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the noise; the same seed gives the same video.", rich_help_panel=_VIDEO)
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="The file to write; an older one is replaced.", rich_help_panel=_VIDEO)
    ] = Path("video.mp4"),
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 16; the model's own by default.", rich_help_panel=_VIDEO)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 16; the model's own by default.", rich_help_panel=_VIDEO)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps of a chunk, a multiple of the window (4); the model's own by default.",
            rich_help_panel=_VIDEO,
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture that the video begins with.", rich_help_panel=_START)
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="A clip that the video goes on from.", rich_help_panel=_START)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A released MAGI-1 JSON, as it is, in place of --model.", rich_help_panel=_FILES),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the weights, in place of the configured one; an autoencoder in its sub-folder vae and "
            "text encoders in t5 are taken first.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="auto, sdpa, flash-attn or xformers.", rich_help_panel=_COMPUTE)
    ] = "sdpa",
    precision: Annotated[
        Precision,
        typer.Option(
            help="reference computes what was released; fast leaves out its fp32 output projections.",
            rich_help_panel=_COMPUTE,
        ),
    ] = Precision.REFERENCE,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default.", rich_help_panel=_COMPUTE)
    ] = None,
) -> None:
    """Make a video from a prompt."""
    from launch.generate import Options, generate_video

    summary = generate_video(
        Options(
            prompt=prompt,
            model=model,
            seconds=seconds,
            chunks=chunks,
            seed=seed,
            out=out,
            height=height,
            width=width,
            steps=steps,
            image=image,
            video=video,
            config=config,
            weights=weights,
            attention=attention,
            precise=precision is Precision.REFERENCE,
            threads=threads,
        )
    )
    typer.echo(summary.text())


@app.command()
def models() -> None:
    """List the models that can be asked for by name, their sizes, and what each needs."""
    from launch.listing import show_models

    show_models()


@app.command()
def conformance(
    files: Annotated[list[Path], typer.Argument(help="Golden files; their weights file lies beside them.")],
) -> None:
    """Recompute golden files of the published code and compare.

    One line for each file. Exit status 0 if all pass, 1 if one fails, 2 if one cannot be read.
    """
    from launch.listing import show_conformance

    raise typer.Exit(show_conformance(files, report_error=_show_error))


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # unwinds, so that nothing is left behind
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; errors of the input are shown, not raised.

    Returns:
        The exit status: 0, 1 where a check failed, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        # Typer turns an interrupt into a status by itself.
        status = app(args=list(arguments), prog_name="flowcache", standalone_mode=False) or 0
    except (InputError, typer.TyperException) as error:
        _show_error(error)
        return _BAD_INPUT
    if status == _INTERRUPTED:
        typer.echo("flowcache: stopped", err=True)
    return int(status)


def _show_error(error: Exception) -> None:
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    if text:  # no arguments at all: typer has shown the help instead
        typer.echo(f"flowcache: error: {' '.join(text.split())}", err=True)
