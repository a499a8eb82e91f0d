"""`flowcache generate --launcher ray`: the videos of one command on a gang that Ray places and starts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.decoder import Chunk
from launch.batch.options import BatchOptions, cluster_settings
from launch.ending import CommandFailed
from launch.output.progress import Display, open_display
from launch.output.sinks import VideoSinks
from launch.output.summary import summary_text
from launch.plan import Options
from launch.ray_cluster import ray_cluster
from launch.several import plan_videos
from models.errors import InputError
from parallel.cluster.config import video_size
from parallel.cluster.controller import Controller
from parallel.cluster.messages import (
    Admitted,
    ChunkMade,
    Event,
    GangLost,
    GangReady,
    Progressed,
    VideoDone,
    VideoFailed,
    VideoOrder,
)
from parallel.health.errors import FAILED


def generate_on_ray(options: Options, prompts: Sequence[str]) -> str:
    """Make a video of each prompt on one gang of a Ray cluster, as `generate_videos` does in this process.

    Args:
        options: what was given.
        prompts: one for each video.

    Returns:
        What was made and what it cost, for people.

    Raises:
        InputError: something given cannot be used.
        CommandFailed: a video could not be made.
    """
    ranks = options.ranks
    if options.record is not None or ranks.trace is not None:
        raise InputError("--record and --trace do not work with --launcher ray: leave it out, or use torchrun")
    plans = plan_videos(options, prompts)
    sizes = [
        video_size(plan.config, plan.request, cache=plan.cache, kv=plan.kv, layout=ranks.layout, split=ranks.split)
        for plan in plans
    ]
    world = ranks.layout.world_size
    threads = options.threads or max(1, (os.cpu_count() or 1) // world)
    with open_display() as display, ray_cluster(cpus=world * threads):
        began = time.monotonic()
        display.phase(f"loading {plans[0].name} on {world} ranks (pp {ranks.pp} x cp {ranks.cp})")
        base = BatchOptions(file=Path(), out=options.out, base=options)
        settings = cluster_settings(base, list(zip(plans, sizes, strict=True)), threads)
        with Controller(settings) as engine:
            for index, (plan, size) in enumerate(zip(plans, sizes, strict=True)):
                engine.submit(VideoOrder(video=str(index), request=plan.request, size=size))
            events = engine.run()
            for event in events:
                _say(display, event)
                if isinstance(event, GangReady):
                    break
            with VideoSinks(plans, display, [None] * len(plans), time.monotonic() - began) as filming:
                for event in events:
                    _say(display, event)
                    _film(filming, event)
                making = time.monotonic() - filming.began
    return summary_text(filming.summaries, making=making)


def _say(display: Display, event: Event) -> None:
    if isinstance(event, GangLost):
        display.phase(f"starting again: {event.message}")
    elif isinstance(event, VideoFailed):
        raise CommandFailed(event.message, status=FAILED, shown_here=True)


def _film(filming: VideoSinks, event: Event) -> None:
    """Put what comes into the files."""
    if isinstance(event, Admitted):
        if filming.videos[int(event.video)].sink is None:
            filming.begin(int(event.video))
    elif isinstance(event, Progressed):
        filming.videos[int(event.video)](event.progress)
    elif isinstance(event, ChunkMade):
        chunk = Chunk(
            index=event.index,
            latents=torch.from_numpy(event.latents.copy()),
            frames=torch.from_numpy(event.frames.copy()),
        )
        filming.write(int(event.video), chunk)
    elif isinstance(event, VideoDone):
        filming.end(int(event.video))
