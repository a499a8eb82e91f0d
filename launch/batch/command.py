"""The options of `flowcache batch`, with the help that teaches them; what they do is decided where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch import options
from launch.cache_presets import DEFAULT_CACHE, CacheOptions, KVOptions

_CLUSTER, _SAFETY = "Gangs", "When something goes wrong"

BATCH_HELP = """Make the videos of a file, several at a time, on many processes or GPUs.

The file has a JSON object in each line: [cyan]{"prompt": "a red circle moving right", "seconds": 4, "seed": 1}[/cyan].
It may also have chunks, image, video, priority (higher goes first), height, width, steps and name; what a line leaves
out is as the options here say.

Run it again and it goes on: videos that are there are kept, those that were begun go on where they were.

[bold]Examples[/bold]

On this machine, two gangs of two processes:
[cyan]flowcache batch prompts.jsonl --out videos --gangs 2 --pp 2[/cyan]

On a Ray cluster, from one of its nodes or as a job:
[cyan]RAY_ADDRESS=auto flowcache batch prompts.jsonl --out /shared/videos --gangs 4 --pp 8[/cyan]
"""

BatchFile = Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A JSON object in each line.")]
OutFolder = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the videos; made if it is missing.")]
Gangs = Annotated[
    int,
    typer.Option(
        metavar="COUNT",
        help="Groups of pp x cp ranks. Each holds the whole model and makes videos of its own.",
        rich_help_panel=_CLUSTER,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        metavar="VIDEOS",
        help="How many videos a gang makes at a time.",
        show_default="2, more from 6 stages on",
        rich_help_panel=_CLUSTER,
    ),
]
KVMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of each rank for keys and values, such as 8GB; a gang takes in no more videos than fit.",
        show_default="enough for --concurrency",
        rich_help_panel=_CLUSTER,
    ),
]
CheckpointEvery = Annotated[
    int,
    typer.Option(
        metavar="CHUNKS",
        help="Note how far a video is each time so many chunks have entered the window; 0 for never. After a loss it "
        "goes on from there.",
        rich_help_panel=_SAFETY,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of checkpoints; every node must see it. They are deleted with the end of a video.",
        show_default="in the folder of the videos",
        rich_help_panel=_SAFETY,
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        metavar="COUNT",
        help="How often gangs may be started again, all together; after that the lost ones stay lost.",
        rich_help_panel=_SAFETY,
    ),
]


def batch(
    file: BatchFile,
    out: OutFolder = Path("videos"),
    gangs: Gangs = 1,
    pp: options.PP = 1,
    cp: options.CP = 1,
    split: options.Split = None,
    concurrency: Concurrency = None,
    kv_memory: KVMemory = None,
    checkpoint_every: CheckpointEvery = 4,
    checkpoints: Checkpoints = None,
    max_restarts: MaxRestarts = 20,
    model: options.Model = None,
    seconds: options.Seconds = None,
    chunks: options.Chunks = None,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
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
    config: options.Config = None,
    weights: options.Weights = None,
    attention: options.Attention = "sdpa",
    precision: options.PrecisionName = options.Precision.REFERENCE,
    threads: options.Threads = None,
) -> None:
    """Make the videos of a file."""
    from launch.batch.options import BatchOptions, parse_size
    from launch.batch.run import run_batch
    from launch.plan import Options
    from launch.ranks import RankOptions

    base = Options(
        prompt="",
        out=out,
        model=model,
        seconds=seconds,
        chunks=chunks,
        seed=seed,
        height=height,
        width=width,
        steps=steps,
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
        config=config,
        weights=weights,
        attention=attention,
        precise=precision is options.Precision.REFERENCE,
        threads=threads,
        ranks=RankOptions(pp=pp, cp=cp, split=split, concurrency=concurrency),
    )
    status = run_batch(
        BatchOptions(
            file=file,
            out=out,
            base=base,
            gangs=gangs,
            checkpoint_every=checkpoint_every,
            checkpoints=checkpoints,
            max_restarts=max_restarts,
            kv_memory=None if kv_memory is None else parse_size(kv_memory),
        ),
        say=lambda text: typer.echo(text, err=True),
    )
    raise typer.Exit(status)
