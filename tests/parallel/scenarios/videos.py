"""Ranks that make videos."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.record import Recorder
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from tests.parallel.small import Timed, request, small_config, stage_pipeline


def settings(values):
    cache = ReuseSettings(**values.get("cache", {}))
    selection = SelectionSettings(**values.get("selection", {}))
    return cache, KVSettings(budget=values.get("budget"), selection=selection, offload=values.get("offload", False))


def wanted(values):
    made = []
    for changes in values.get("requests", [{}]):
        changes = dict(changes)
        frames = changes.pop("prefix", 0)
        if frames:
            changes["prefix"] = torch.zeros(frames, 32, 48, 3, dtype=torch.uint8)
        made.append(request(**changes))
    return made


def videos(gang, values, out, wrap=lambda model: model):
    """Make videos; the lead saves latents, flags, counts and the items that its stage was given."""
    config = small_config(**values.get("config", {}))
    pipeline = stage_pipeline(config, gang.mesh, values.get("split"), device=gang.device)
    pipeline.model = wrap(pipeline.model)
    if not gang.mesh.leads:
        gang.serve(pipeline.stage)
        return
    cache, kv = settings(values)
    requests = wanted(values)
    traces = {video: Recorder() for video in range(len(requests))} if values.get("trace") else {}
    latents = [[] for _ in requests]
    began = time.perf_counter()
    with gang.lead(pipeline, cache, kv, barrier=values.get("barrier", False)) as (engine, reports):
        waiting = list(enumerate(requests))
        while waiting or engine.in_flight:
            while waiting and engine.in_flight < values.get("concurrency", 1):
                video, one = waiting.pop(0)
                assert engine.submit(one, recorder=traces.get(video)) == video
            for made in engine.step():
                assert made.chunk.index == len(latents[made.video])
                latents[made.video].append(made.chunk.latents.cpu())
    torch.save(
        {
            "latents": latents,
            "transfer": gang.transfer,
            "seconds": time.perf_counter() - began,
            "flags": {video: torch.from_numpy(trace.finish({}).flags) for video, trace in traces.items()},
            "kept": {video: torch.from_numpy(trace.finish({}).kept) for video, trace in traces.items()},
            "items": {video: torch.from_numpy(trace.finish({}).tick_items) for video, trace in traces.items()},
            "reports": reports,
        },
        out,
    )


def slow(gang, values, out):
    """As `videos`, at a speed that does not depend on the machine."""
    videos(gang, values, out, wrap=lambda model: Timed(model, values["layer_seconds"]))


def goldens(gang, values, out):
    from launch.conformance.command import check_on_gang  # which takes as long to import as half of the rest

    verdicts = []
    files = [Path(path) for path in values["files"]]
    check_on_gang(gang, files, split=values["split"], on_verdict=lambda verdict: verdicts.append(asdict(verdict)))
    if gang.mesh.leads:
        Path(out).write_text(json.dumps(verdicts))


def abandoned(gang, values, out):
    """The lead walks away from a video, asks for one that cannot be made, and goes on with the gang."""
    pipeline = stage_pipeline(small_config(), gang.mesh)
    if not gang.mesh.leads:
        gang.serve(pipeline.stage)
        gang.serve(pipeline.stage)
        return
    with gang.lead(pipeline) as (engine, first):
        begun = engine.generate(request(chunks=6))
        next(begun)
        begun.close()
        kept = engine.submit(request(seed=1))
        engine.step()
        try:
            engine.submit(request(num_steps=10))
        except InputError as error:
            refused = str(error)
        whole = []
        while engine.in_flight:
            whole += [made.chunk.latents for made in engine.step() if made.video == kept]
    with gang.lead(pipeline) as (engine, second):
        again = [chunk.latents for chunk in engine.generate(request(seed=2))]
    reports = [first, second]
    torch.save({"latents": [whole, again], "refused": refused, "reports": reports}, out)
