"""For scripts: load a model once, then make videos with it, as frames or as files (docs/library.md).

    from launch.api import load

    engine = load("magi-pocket", cache="flowcache-slow", kv_budget=2)
    for chunk in engine.generate("a red circle moving right", seconds=4):
        print(chunk.index, chunk.frames.shape)

Options have the names, types, defaults and bounds of `flowcache generate`, with underscores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from launch.ending import CommandFailed
from launch.generate import Backend, join_ranks, led_ranks, make_with, serve_stage, started_ranks, this_process
from launch.model.resolve import layout_of, plan_model
from launch.option_fields import declared, from_values
from launch.options import Options, together
from launch.output.display import Display, Summary
from launch.plan import plan_requests, plan_videos
from models.errors import InputError
from parallel.cluster.messages import ChunkMade, VideoFailed, VideoOrder
from parallel.health.exit_codes import FAILED
from parallel.ranks.environment import RankEnv

_OF_VIDEO = {one.name for one in declared(Options) if one.line}
_OF_MODEL = {one.name for one in declared(Options) if one.batch and not one.line}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """A finished chunk of a video."""

    video: int  # place of its prompt
    index: int  # 0 for the first of its video
    frames: NDArray[np.uint8]  # uint8 [F, height, width, 3]
    latents: NDArray[np.float32]  # fp32 [1, C, t, h, w]


def load(model: str | None = None, **options: Any) -> VideoEngine:
    """Load a model.

    With `pp` or `cp` above 1 the other ranks are started on this machine and end with the engine. Under torchrun every
    rank runs the script: rank 0 goes on with it, and the others serve in here until the engine is closed, and then end.

    `model` names a preset; None is magi-pocket, or for `config`. The options are those of reuse, memory, ranks, model
    files and computing; see `VideoEngine` for those of a video. An `InputError` says what cannot be used.
    """
    _check_names(options, _OF_MODEL, "load")
    base = from_values(Options, model=model, **options)
    if base.threads is not None:
        torch.set_num_threads(base.threads)
    return VideoEngine(base)


class VideoEngine:
    """A loaded model that makes videos; made by `load`. A context; or to be closed by `close`.

    A video's own options are `seconds` or `chunks`, `seed`, `height`, `width`, `steps`, and `image` or `video` to start
    from (paths). Videos are made by one call at a time; what a loop leaves unfinished is dropped. Methods raise
    `InputError` for what cannot be used or written, and `CommandFailed` for a video that comes to NaN or infinity.
    """

    def __init__(self, options: Options) -> None:
        self._options, self._began, self._busy = options, time.monotonic(), False
        with ExitStack() as stack:
            self._backend = opened(options, stack)
            self._stack = stack.pop_all()

    def generate(self, prompt: str, **video: Any) -> Iterator[Chunk]:
        """Make a video of a prompt; yields its chunks, in order, as soon as each is finished."""
        return self.generate_many([prompt], **video)

    def generate_many(self, prompts: Sequence[str], **video: Any) -> Iterator[Chunk]:
        """Make a video of each prompt, `concurrency` of them at a time; the n-th has the seed plus n.

        Yields chunks as they are finished, those of one video in order.
        """
        plans = plan_requests(self._video_options(prompts, video), [Path()] * len(prompts))
        return self._chunks([plan.order(str(index)) for index, plan in enumerate(plans)])

    def save(
        self, prompts: str | Sequence[str], out: Path | str, *, record: Path | str | None = None, **video: Any
    ) -> list[Summary]:
        """Make videos into files, as `flowcache generate` does; returns what each video cost.

        `out` is the file of one prompt, named as for `--out`, or the folder of several; `record` is a folder for
        records of the runs.
        """
        options = self._video_options([prompts] if isinstance(prompts, str) else prompts, video)
        plans = plan_videos(replace(options, out=str(out), record=None if record is None else Path(record)))
        with self._taken():
            return make_with(self._backend, plans, Display(Console(quiet=True)), self._began).summaries

    def close(self) -> None:
        """Let go of the model, and of the ranks that hold it."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _video_options(self, prompts: Sequence[str], video: dict[str, Any]) -> Options:
        _check_names(video, _OF_VIDEO, "a video")
        return from_values(Options, self._options, prompts=list(prompts), **video)

    def _chunks(self, orders: Sequence[VideoOrder]) -> Iterator[Chunk]:
        with self._taken():
            for order in orders:
                self._backend.submit(order)
            with closing(self._backend.run()) as events:
                for event in events:
                    if isinstance(event, VideoFailed):
                        raise CommandFailed(event.message, status=FAILED, shown_here=True)
                    if isinstance(event, ChunkMade):
                        video, frames, latents = int(event.video), event.frames, event.latents
                        yield Chunk(video=video, index=event.index, frames=frames, latents=latents)

    @contextmanager
    def _taken(self) -> Iterator[None]:
        if self._busy:
            raise InputError("this engine makes a video already: end its loop first, or make several by one call")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


def opened(options: Options, stack: ExitStack) -> Backend:
    """The backend that the options ask for; on a rank that does not lead, serve and end the process.

    It closes with the stack.
    """
    model, concurrency = plan_model(options), together(options, sys.maxsize)
    if layout_of(options).world_size == 1:
        return stack.enter_context(this_process(model, concurrency))
    env = RankEnv.from_environment()
    gang = stack.enter_context(started_ranks(options) if env is None else join_ranks(env, options))
    if not gang.mesh.leads:
        serve_stage(gang, model)
        stack.close()
        sys.exit(0)
    return stack.enter_context(led_ranks(gang, model, concurrency))


def _check_names(given: dict[str, Any], own: set[str], whose: str) -> None:
    for name in given:
        if name in Options.__slots__ and name not in own:
            raise InputError(f"{name} is no option of {whose}: give it elsewhere (docs/library.md)")
