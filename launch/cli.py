"""The commands, their help, and how errors are shown; options are declared in `launch/options.py`.

Every command does its work elsewhere and is imported when it is called, so that help is there at once. An error that
the input caused is one line on standard error and exit status 2; a failure of ranks is one line and status 1; a signal
is one line and status 128 and its number. Of several ranks one shows the line.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from engine.machine import settle_heap
from launch import __version__
from launch.ending import CommandFailed, handle_as_rank, shows_bad_input, speaks_for_all, stopped_by
from launch.option_fields import command, declared
from launch.options import GOLDEN_DEVICE, GOLDEN_FILES, BatchOptions, ContinueOptions, Options
from launch.serve.options import ServeOptions
from models.errors import InputError
from parallel.health.exit_codes import BAD_INPUT, INTERRUPTED, NO_OUTPUT, OK
from parallel.ranks.environment import RankEnv, settle_libraries

_HELP_NAMES = {"help_option_names": ["-h", "--help"]}
_PROMPT_AT = "--prompt-at"
_OF_RANKS = ("pp", "cp", "split")

_GENERATE_HELP = """Make a video from a prompt.

The file appears under its name when it is complete; until then NAME.partial.mp4 plays. Stop with Ctrl-C and nothing \
is left behind.

[bold]Examples[/bold]

A clip of four seconds from the small model, on a CPU:
[cyan]flowcache generate "a red circle moving right" --seconds 4 --out demo.mp4[/cyan]

Watched while it is made:
[cyan]flowcache generate "a red circle moving right" --seconds 20 --out - | ffplay -[/cyan]

From a picture, and on from the end of a clip:
[cyan]flowcache generate "a blue cross moving up" --image start.png[/cyan]
[cyan]flowcache generate "a blue cross moving up" --video start.mp4[/cyan]

In a way that goes on after the process was killed:
[cyan]flowcache generate "a red circle moving right" --seconds 60 --checkpoint checkpoints[/cyan]

Faster, on all of the past in the room of two chunks, and with a record to draw:
[cyan]flowcache generate "a red circle moving right" --cache flowcache-fast --kv-budget 2 --record run[/cyan]
[cyan]flowcache plot reuse run[/cyan]

On four processes or GPUs, and several videos that share them:
[cyan]flowcache generate "a red circle moving right" --pp 2 --cp 2[/cyan]
[cyan]flowcache generate "a red circle moving right" "a blue cross moving up" --pp 4 --out videos[/cyan]

A released model, after downloading its weights ([cyan]flowcache models[/cyan] says which):
[cyan]flowcache generate "a cat on a roof" --weights MAGI-1/ckpt/magi/4.5B_distill --steps 16[/cyan]
[cyan]flowcache generate "a cat on a roof" --config 4.5B_base_config.json --weights ckpt/magi/4.5B_base[/cyan]
"""

_CONTINUE_HELP = """Make a finished video longer.

It must have been made with [cyan]--keep-state[/cyan]. The longer video is what it would have been if all of it had \
been asked for at once; its last few chunks before the old end are made again.

[bold]Examples[/bold]

[cyan]flowcache generate "a red circle moving right" --seconds 4 --out demo.mp4 --keep-state[/cyan]
[cyan]flowcache continue demo.mp4 --seconds 4 --prompt "a red circle moving left"[/cyan]
"""

_BATCH_HELP = """Make the videos of a file, several at a time, on many processes or GPUs.

The file has a JSON object in each line: [cyan]{"prompt": "a red circle moving right", "seconds": 4, "seed": 1}[/cyan].
It may also have chunks, image, video, priority (higher goes first), height, width, steps, cache, kv_budget and name;
what a line leaves out is as the options here say.

Run it again and it goes on: videos that are there are kept, those that were begun go on where they were.

[bold]Examples[/bold]

On this machine, two gangs of two processes:
[cyan]flowcache batch prompts.jsonl --out videos --gangs 2 --pp 2[/cyan]

On a Ray cluster, from one of its nodes or as a job:
[cyan]RAY_ADDRESS=auto flowcache batch prompts.jsonl --out /shared/videos --gangs 4 --pp 8[/cyan]
"""

_SERVE_HELP = """Make videos for others over HTTP, on many processes or GPUs, in the convention of video APIs.

POST /v1/videos queues one, GET /v1/videos/ID says how far it is, GET /v1/videos/ID/content sends it. The options of a
video hold where a request says nothing. Stop with Ctrl-C; started again, it goes on with what was queued and begun.

[bold]Examples[/bold]

On this machine: [cyan]flowcache serve --gangs 2 --pp 2[/cyan]

For others: [cyan]FLOWCACHE_API_KEY=... flowcache serve --host 0.0.0.0[/cyan]
"""

_PLOT_HELP = {
    "reuse": "Which steps of which chunk were computed, tick by tick, and which were reused.",
    "distance": """How much each chunk changed from step to step, over its denoising.

A run with [cyan]--cache none[/cyan] shows the model as it is; with reuse, what the run has seen.""",
    "kv": "What of each past chunk's keys and values was still held, over time, and how full the buffer was.",
    "pipeline": """What each rank did when, and where its idle time went; of a run on ranks ([cyan]--pp[/cyan], \
[cyan]--cp[/cyan]).

Prints a table as well: the share of the time that each rank was busy, and what it waited for otherwise.""",
}

_RUN_DIR = typer.Argument(metavar="RUN_DIR", help="A folder that [cyan]flowcache generate --record[/cyan] wrote.")
_PICTURE = typer.Option(
    metavar="FILE.png", help="The picture to write; an older one is replaced. By default it goes into RUN_DIR."
)

app = typer.Typer(
    name="flowcache",
    help="Make videos from prompts, chunk by chunk.\n\n"
    'Try it: [bold]flowcache generate "a red circle moving right"[/bold]',
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    context_settings=_HELP_NAMES,
)
plots = typer.Typer(
    help="Draw what a run has recorded.\n\n"
    "First [cyan]flowcache generate PROMPT --record RUN_DIR[/cyan], then [cyan]flowcache plot reuse RUN_DIR[/cyan].",
    no_args_is_help=True,
    context_settings=_HELP_NAMES,
)


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


@contextmanager
def _imports() -> Iterator[None]:
    """What is imported stays: looking for garbage in it, again and again, takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _generate(arguments: Sequence[str], given: dict[str, Any]) -> None:
    options = Options(**given)
    with _imports():
        from launch.generate import generate

    if (text := generate(options, arguments)) is not None:
        typer.echo(text, err=options.out == "-")


def _continue(_: Sequence[str], given: dict[str, Any]) -> None:
    options = ContinueOptions(**given)
    with _imports():
        from launch.resume.extend import extend

    if (text := extend(options)) is not None:
        typer.echo(text, err=options.out == "-")


def _batch(_: Sequence[str], given: dict[str, Any]) -> None:
    own = {one.name: given.pop(one.name) for one in declared(BatchOptions)}
    options = BatchOptions(**own, base=Options(**given, launcher="ray"))
    with _imports():
        from launch.batch.run import run_batch

    raise typer.Exit(run_batch(options, say=lambda text: typer.echo(text, err=True)))


def _serve(_: Sequence[str], given: dict[str, Any]) -> None:
    own = {one.name: given.pop(one.name) for one in declared(ServeOptions)}
    os.environ.pop("FLOWCACHE_API_KEY", None)  # ranks need not know it
    options = ServeOptions(**own, base=Options(**given, launcher="ray"))
    with _imports():
        from launch.serve.run import run_service

    run_service(options, say=lambda text: typer.echo(text, err=True))


def _conformance(arguments: Sequence[str], given: dict[str, Any]) -> None:
    files, device = given.pop("files"), given.pop("device")
    options = Options(**given)
    with _imports():
        from launch.conformance.command import check_conformance

    raise typer.Exit(check_conformance(files, options, arguments, device=device, report_error=_show_error))


app.command("generate", help=_GENERATE_HELP)(command(declared(Options), _generate))
app.command("continue", help=_CONTINUE_HELP)(command(declared(ContinueOptions), _continue))


@app.command()
def models() -> None:
    """List the models that can be asked for by name, their sizes, and what each needs."""
    from launch.model.inspect import show_models

    show_models()


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of weights, as for [cyan]--weights[/cyan].")],
    height: Annotated[int | None, typer.Option(help="Pixels of the video that memory is worked out for.")] = None,
    width: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Its length.", show_default="10")] = None,
    kv_budget: Annotated[int | None, typer.Option(metavar="CHUNKS", help="As in [cyan]generate[/cyan].")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights, and compare with checksums that lie beside them.")
    ] = False,
    special_tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", envvar="SPECIAL_TOKEN_PATH", help="As in [cyan]generate[/cyan]."),
    ] = None,
) -> None:
    """Say what a folder of weights holds: which model, what is missing, and what each layout takes of memory.

    Exit status 0 if it is complete, 1 if something is missing or damaged, 2 if there is no model in it.

    [cyan]flowcache inspect MAGI-1/ckpt/magi/4.5B_distill[/cyan]
    """
    from launch.model.inspect import inspect_folder

    wanted = Options(height=height, width=width, chunks=chunks, kv_budget=kv_budget)  # says what is out of bounds
    raise typer.Exit(inspect_folder(folder, wanted, tokens=special_tokens, verify=verify))


app.command(
    "conformance",
    help="Recompute golden files of the published code and compare.\n\n"
    "One line for each file. Exit status 0 if all pass, 1 if one fails, 2 if one cannot be read.",
)(command([GOLDEN_FILES, GOLDEN_DEVICE, *(one for one in declared(Options) if one.name in _OF_RANKS)], _conformance))
_SHARED = [one for one in declared(Options) if one.batch]  # options of `generate` that `batch` has too
app.command("batch", help=_BATCH_HELP)(command([*declared(BatchOptions), *_SHARED], _batch))
app.command("serve", help=_SERVE_HELP)(command([*declared(ServeOptions), *_SHARED], _serve))
app.add_typer(plots, name="plot")


def _plot_command(kind: str) -> Callable[..., None]:
    def draw(run_dir: Annotated[Path, _RUN_DIR], out: Annotated[Path | None, _PICTURE] = None) -> None:
        from launch.plots import plot

        typer.echo(plot(kind, run_dir, out or run_dir / f"{kind}.png"))

    return draw


for _kind, _help in _PLOT_HELP.items():
    plots.command(_kind, help=_help)(_plot_command(_kind))


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    settle_heap()
    settle_libraries()
    status = run(sys.argv[1:])
    # What would end in order may wait for ranks that are gone, or for threads that were interrupted.
    ends_at_once = stopped_by() is not None or (status != OK and RankEnv.from_environment() is not None)
    if ends_at_once and "torch.distributed" in sys.modules:
        from parallel.health.monitor import leave

        leave(status)
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; errors of the input are shown, not raised.

    Gives the exit status: 0, 1 where a check or a rank failed, 2 for bad input, 3 if standard output cannot be written,
    128 and the number of a signal, such as 130 after Ctrl-C.
    """
    env = None
    try:
        env = RankEnv.from_environment()
        handle_as_rank(env)
        # Typer turns an interrupt into a status by itself.
        given = _joined(arguments)
        status = int(app(args=given, prog_name="flowcache", standalone_mode=False, obj=given) or OK)
        sys.stdout.flush()
    except (InputError, typer.TyperException) as error:
        status = BAD_INPUT
        if stopped_by() is None and shows_bad_input(env):
            _show_error(str(error) if isinstance(error, InputError) else error.format_message())
    except CommandFailed as ended:
        status = ended.status
        if ended.shown_here and status != INTERRUPTED:
            _show_error(str(ended))
    except SystemExit as ended:
        status = int(ended.code or OK)
    except OSError as error:
        if not _lost_output():
            raise
        status = NO_OUTPUT
        _show_error(f"cannot write to standard output: {error.strerror}; what was made is there")
    if (number := stopped_by()) is not None:
        status = 128 + number
    if (number is not None or status == INTERRUPTED) and speaks_for_all(env):
        typer.echo("flowcache: stopped", err=True)
    return status


def _lost_output() -> bool:
    """Whether standard output cannot be written; what it was to get is then given up."""
    try:
        os.write(1, b"\n")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


def _show_error(text: str) -> None:
    if text:  # no arguments at all: typer has shown the help instead
        ours = text.replace("Value error, ", "").replace("Input should be", "it must be")  # pydantic's words
        typer.echo(f"flowcache: error: {' '.join(ours.split())}", err=True)


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--prompt-at TIME PROMPT` as one, since an option that may be repeated takes one value."""
    joined, rest = list[str](), iter(arguments)
    for argument in rest:
        joined.append(argument)
        if argument == _PROMPT_AT:
            time = next(rest, None)
            prompt = None if time is None or " " in time else next(rest, None)
            joined += [time if prompt is None else f"{time} {prompt}"] if time is not None else []
    return joined
