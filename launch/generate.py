"""From options to video files: plan, load, generate, and encode meanwhile; records of the runs if they are wanted.

It knows files and the engine's front; how a video is denoised is the engine's business. The same is done by one
process, and by the lead of a gang of ranks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from engine.engine import Engine
from engine.record import Recorder
from engine.reuse.policy import Decision, Observation
from launch.output.files import file_errors
from launch.output.progress import open_display
from launch.output.sinks import VideoSinks
from launch.output.summary import RankSummary, Summary, summary_text
from launch.plan import Options, Plan, plan_model
from launch.ranks import join_ranks
from launch.several import plan_videos
from models.errors import InputError
from models.magi.pipeline import load_pipeline, load_stage
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import Gang
from parallel.ranks.worker import StageModel
from parallel.topology.split import stage_range
from parallel.trace.counters import RankCounters
from parallel.trace.tracer import Tracer

TRACE_FILE = "trace.json"
"""In a record's folder."""


def generate_video(options: Options) -> Summary:
    """Make the video that the options ask for, with progress on standard error.

    Raises:
        InputError: something given cannot be used, or the disk or the GPU is full. There is no file then, unless it is
            the record alone that could not be written.
    """
    with _memory_errors(options):
        return _make_here(plan_videos(options, [options.prompt]), options).summaries[0]


def generate_videos(options: Options, prompts: Sequence[str]) -> str:
    """Make a video of each prompt, one after another, in this process; as `generate_video`.

    Returns:
        What was made and what it cost, for people.
    """
    with _memory_errors(options):
        filming = _make_here(plan_videos(options, prompts), options)
    return summary_text(filming.summaries, making=time.monotonic() - filming.began)


def generate_on_ranks(options: Options, prompts: Sequence[str], env: RankEnv) -> str | None:
    """Make the videos as one of the ranks.

    Returns:
        What was made and what it cost, on the lead; None elsewhere.

    Raises:
        InputError: another number of ranks was started.
        CommandFailed: something given cannot be used, or a rank has failed.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    traced = options.ranks.trace is not None or options.record is not None
    with join_ranks(env, options.ranks, trace=traced) as gang, _memory_errors(options):
        if gang.mesh.leads:
            return _lead(gang, plan_videos(options, prompts), options)
        _serve(gang, options)
    return None


def _make_here(plans: list[Plan], options: Options) -> VideoSinks:
    """Make the videos in this process."""
    plan = plans[0]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with open_display() as display:
        began = time.monotonic()
        display.phase(f"loading {plan.name}")
        engine = Engine(load_pipeline(plan.config, plan.weights, plan.loading), reuse=plan.cache, kv=plan.kv)
        loading = time.monotonic() - began
        display.phase(_reading(plan))
        traces = [None if one.record is None else Recorder() for one in plans]
        with VideoSinks(plans, display, traces, loading) as filming:
            for index in range(len(plans)):
                video = filming.begin(index)
                for chunk in engine.generate(video.plan.request, video, video.trace):
                    filming.write(index, chunk)
                filming.end(index)
    if options.record is not None:
        with file_errors(options.record):
            (options.record / TRACE_FILE).unlink(missing_ok=True)  # of an earlier run, on ranks
    return filming


def _serve(gang: Gang, options: Options) -> None:
    """Hold a stage's layers for the lead."""
    plan = plan_model(options)
    layers = stage_range(plan.config, gang.mesh, options.ranks.split)
    with gang.loading():
        model = load_stage(plan.config, plan.weights, replace(plan.loading, layers=layers, device=str(gang.device)))
    gang.serve(StageModel(model=model, attention=model.dit.attention))


def _lead(gang: Gang, plans: list[Plan], options: Options) -> str:
    """Make the videos with a gang."""
    plan, ranks = plans[0], options.ranks
    layers = stage_range(plan.config, gang.mesh, ranks.split)
    with open_display() as display:
        began = time.monotonic()
        display.phase(f"loading {plan.name} on {ranks.layout.world_size} ranks (pp {ranks.pp} x cp {ranks.cp})")
        with gang.loading():
            pipeline = load_pipeline(
                plan.config, plan.weights, replace(plan.loading, layers=layers, device=str(gang.device))
            )
        loading = time.monotonic() - began
        display.phase(_reading(plan))
        marks = gang.tracer.wanted and plan.cache.policy != "none"
        traces = [
            _MarkingTrace(gang.tracer, index) if marks or one.record is not None else None
            for index, one in enumerate(plans)
        ]
        with gang.lead(pipeline, plan.cache, plan.kv) as (engine, reports):
            with VideoSinks(plans, display, traces, loading) as filming:
                _make_together(engine, filming, ranks.at_a_time(len(plans)))
            making = time.monotonic() - filming.began
        if files := list(_trace_files(options)):
            gang.write_trace(files[0])
            for path in files[1:]:
                with file_errors(path):
                    shutil.copyfile(files[0], path)
    crew = _crew(options, reports.ranks)
    return summary_text([replace(one, crew=crew) for one in filming.summaries], making=making)


def _make_together(engine: Engine, filming: VideoSinks, at_a_time: int) -> None:
    """Make the videos, some of them at the same time; the next begins when one is complete."""
    waiting, in_flight = list(range(len(filming.videos))), dict[int, int]()
    while waiting or in_flight:
        while waiting and len(in_flight) < at_a_time:
            video = filming.begin(waiting.pop(0))
            in_flight[engine.submit(video.plan.request, on_progress=video, recorder=video.trace)] = video.index
        for made in engine.step():
            filming.write(in_flight[made.video], made.chunk)
        for number in [number for number in in_flight if not engine.running(number)]:
            filming.end(in_flight.pop(number))


class _MarkingTrace(Recorder):
    """A record in the making that also marks the steps that are reused in the trace."""

    def __init__(self, tracer: Tracer, video: int) -> None:
        super().__init__()
        self._timeline, self._video = tracer, video

    def decided(self, seen: Observation, decision: Decision) -> None:
        super().decided(seen, decision)
        if decision is not Decision.COMPUTE:
            self._timeline.mark("reuse", request=self._video, tick=seen.tick, chunk=seen.chunk, step=seen.step)


def _reading(plan: Plan) -> str:
    return "reading the prompt" if plan.request.prefix is None else "reading the prompt and what to start from"


def _trace_files(options: Options) -> Iterator[Path]:
    """Where the trace goes; the first is written, and the others are copies."""
    if options.record is not None:
        with file_errors(options.record):
            options.record.mkdir(parents=True, exist_ok=True)
        yield options.record / TRACE_FILE
    if options.ranks.trace is not None:
        yield options.ranks.trace


def _crew(options: Options, reports: Sequence[RankCounters]) -> RankSummary:
    heads = sorted((report for report in reports if report.cp_rank == 0), key=lambda report: report.stage)
    return RankSummary(
        pp=options.ranks.pp,
        cp=options.ranks.cp,
        layers=tuple(report.layers[1] - report.layers[0] for report in heads),
        weights=tuple(report.weight_bytes for report in reports),
        loading=tuple(report.load_seconds for report in reports),
    )


@contextmanager
def _memory_errors(options: Options) -> Iterator[None]:
    """Say in a line that a GPU is too small."""
    try:
        yield
    except torch.OutOfMemoryError:
        name = options.config or options.model or "the model"
        raise InputError(
            f"{name} does not fit into the GPU's memory: ask for a smaller --height and --width, for a quantised "
            "model, or for more ranks"
        ) from None
