"""The options of the commands, with the help that teaches them; `app.py` puts them together.

Names and texts only, so that help is there at once: what an option does is decided where it is used.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.cache_presets import CacheName, ReuseKind, TokenUnit

_VIDEO, _START, _FILES, _COMPUTE = "The video", "Start from something", "Model files", "How to compute"
_REUSE, _PASSES, _MEMORY, _RECORD, _RANKS = "Reuse", "Extra passes", "Memory", "Record", "Ranks"


class Launcher(StrEnum):
    """Names of `--launcher`."""

    LOCAL = "local"
    RAY = "ray"


class Precision(StrEnum):
    """Names of `--precision`."""

    REFERENCE = "reference"
    FAST = "fast"


Prompts = Annotated[
    list[str],
    typer.Argument(
        metavar="PROMPT...",
        help='What the video shows. magi-pocket knows a colour, a shape and a motion: "a red circle moving right". '
        "Several prompts make several videos.",
    ),
]

# ---- the video

Model = Annotated[
    str | None,
    typer.Option(help="A name from [cyan]flowcache models[/cyan].", show_default="magi-pocket", rich_help_panel=_VIDEO),
]
Seconds = Annotated[
    float | None, typer.Option(help="Length, rounded up to whole chunks of one second.", rich_help_panel=_VIDEO)
]
Chunks = Annotated[
    int | None, typer.Option(help="Length in chunks of 24 frames, in place of --seconds.", rich_help_panel=_VIDEO)
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of the noise; the same seed gives the same video. Several videos count on from it.",
        rich_help_panel=_VIDEO,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The file to write; an older one is replaced. With several prompts, the folder that the videos go into.",
        show_default="video.mp4, or the folder videos",
        rich_help_panel=_VIDEO,
    ),
]
Height = Annotated[
    int | None, typer.Option(help="Pixels, a multiple of 16; the model's own by default.", rich_help_panel=_VIDEO)
]
Width = Annotated[
    int | None, typer.Option(help="Pixels, a multiple of 16; the model's own by default.", rich_help_panel=_VIDEO)
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Denoising steps of a chunk, a multiple of the window (4); the model's own by default.",
        rich_help_panel=_VIDEO,
    ),
]

# ---- what it starts from

Image = Annotated[Path | None, typer.Option(help="A picture that the video begins with.", rich_help_panel=_START)]
Video = Annotated[Path | None, typer.Option(help="A clip that the video goes on from.", rich_help_panel=_START)]

# ---- reuse, and the passes that its presets leave out

Cache = Annotated[
    CacheName,
    typer.Option(
        metavar="PRESET",
        help="Which steps are left out. [bold]flowcache-slow[/bold] and [bold]flowcache-fast[/bold] leave out those "
        "before which a chunk has hardly changed, each chunk for itself: slow stays close to the full computation, "
        "fast saves more. [bold]teacache[/bold] decides once for all chunks of the window, for comparison. "
        "[bold]none[/bold] computes everything. The options below change single figures of the preset.",
        rich_help_panel=_REUSE,
    ),
]
CacheThreshold = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="How much a chunk may change (relative L1, summed up) before it is computed again. Higher is faster, "
        "lower is closer to --cache none. [cyan]flowcache plot distance[/cyan] shows what a model's steps add to it.",
        rich_help_panel=_REUSE,
    ),
]
CacheWarmup = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        help="First steps of a chunk that are always computed: they lay out the picture. With teacache, first steps "
        "of the video.",
        rich_help_panel=_REUSE,
    ),
]
Reuse = Annotated[
    ReuseKind | None,
    typer.Option(
        metavar="KIND",
        help="What stands in for a step that is left out. [bold]residual[/bold]: the change of the last computed step "
        "once more, as published. [bold]velocity[/bold]: its velocity times the size of this step. "
        "[bold]extrapolate[/bold]: the last two velocities, continued to this step.",
        rich_help_panel=_REUSE,
    ),
]
ExtrapolateFrom = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="A middle way: once a chunk has changed by this share of the threshold, extrapolate, whatever --reuse "
        "says. 1 never does.",
        rich_help_panel=_REUSE,
    ),
]
CleanPass = Annotated[
    bool | None,
    typer.Option(
        "--clean-pass/--no-clean-pass",
        help="Run each finished chunk once more, without noise, before others look back at it. With --cache none it "
        "is on; the presets of reuse leave it out, as published.",
        rich_help_panel=_PASSES,
    ),
]
CopyPass = Annotated[
    bool | None,
    typer.Option(
        "--copy-pass/--no-copy-pass",
        help="Distilled models: run the cleanest chunk twice, once without its past, and blend the two. With --cache "
        "none it is on; the presets of reuse leave it out, as published.",
        rich_help_panel=_PASSES,
    ),
]

# ---- memory

KVBudget = Annotated[
    int | None,
    typer.Option(
        metavar="CHUNKS",
        help="Look back at the whole video, its keys and values compressed to the room of so many chunks. By default a "
        "model looks back at the few last chunks that it was released with. Either way a long video needs no more "
        "memory than a short one.",
        rich_help_panel=_MEMORY,
    ),
]
KVRetention = Annotated[
    TokenUnit | None,
    typer.Option(
        help="What the compression keeps or drops as one: single tokens, frames, or chunks.",
        show_default="token",
        rich_help_panel=_MEMORY,
    ),
]
KVQueries = Annotated[
    TokenUnit | None,
    typer.Option(
        help="Who says what is worth keeping: the last 50 tokens of the chunk that was denoised last, its last frame, "
        "or all of it.",
        show_default="token",
        rich_help_panel=_MEMORY,
    ),
]

# ---- record

Record = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR",
        help="Write what happened to this folder: decisions, distances, times, what of the past was kept. "
        "[cyan]flowcache plot[/cyan] draws it. With several prompts, a sub-folder for each video.",
        rich_help_panel=_RECORD,
    ),
]

# ---- ranks

PP = Annotated[
    int,
    typer.Option(
        "--pp",
        metavar="STAGES",
        help="Pipeline: split the layers over so many stages. The chunks of the window flow through them; the result "
        "is the same, bit for bit. pp x cp ranks are started here, unless torchrun has started as many.",
        rich_help_panel=_RANKS,
    ),
]
CP = Annotated[
    int,
    typer.Option(
        "--cp",
        metavar="RANKS",
        help="Context parallelism: share the tokens and heads of each stage among so many ranks; must divide the "
        "model's key heads.",
        rich_help_panel=_RANKS,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        help="Layers of each stage, such as 9,9,8,8. By default the stages are made to cost the same.",
        rich_help_panel=_RANKS,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        metavar="VIDEOS",
        help="With several prompts, how many videos are made at a time. One fills the stages only as far as its window "
        "of chunks goes.",
        show_default="2 on ranks, more from 5 stages on; 1 without ranks",
        rich_help_panel=_RANKS,
    ),
]
LauncherName = Annotated[
    Launcher,
    typer.Option(
        "--launcher",
        help="Who starts the ranks. local: torchrun, or this command on this machine. ray: a Ray cluster, the one that "
        "RAY_ADDRESS names, or one that is started here.",
        rich_help_panel=_RANKS,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="Write what each rank did when, for ui.perfetto.dev or chrome://tracing. With --record it is in RUN_DIR "
        "as trace.json as well, and [cyan]flowcache plot pipeline RUN_DIR[/cyan] draws it.",
        rich_help_panel=_RANKS,
    ),
]

# ---- model files, and how to compute

Config = Annotated[
    Path | None, typer.Option(help="A released MAGI-1 JSON, as it is, in place of --model.", rich_help_panel=_FILES)
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the weights, in place of the configured one; an autoencoder in its sub-folder vae and "
        "text encoders in t5 are taken first.",
        rich_help_panel=_FILES,
    ),
]
Attention = Annotated[str, typer.Option(help="auto, sdpa, flash-attn or xformers.", rich_help_panel=_COMPUTE)]
PrecisionName = Annotated[
    Precision,
    typer.Option(
        help="reference computes what was released; fast leaves out its fp32 output projections.",
        rich_help_panel=_COMPUTE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="CPU threads; by default all cores, shared evenly among ranks (torchrun: 1 each).",
        rich_help_panel=_COMPUTE,
    ),
]

# ---- other commands

GoldenFiles = Annotated[list[Path], typer.Argument(help="Golden files; their weights file lies beside them.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="A folder that [cyan]flowcache generate --record[/cyan] wrote.")
]
PlotOut = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="The picture to write; an older one is replaced. By default it goes into RUN_DIR.",
    ),
]
