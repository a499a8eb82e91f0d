"""What ranks do in tests: `python -m tests.parallel.scenarios NAME OUT ARGUMENTS`, started once for each rank.

The lead saves what it has made to OUT; errors are those of the gang.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from engine.cache import CacheSettings
from engine.kv import KVSettings
from engine.record import RunTrace
from engine.request import Prefix
from models.errors import InputError
from models.loading import Loading, load_stage
from parallel.conformance import check_on_gang
from parallel.failure import GangError
from parallel.flags import FlagLog
from parallel.gang import open_gang
from parallel.mesh import Layout
from parallel.monitor import Timeouts, leave
from parallel.seat import Seat
from parallel.stages import stage_range
from tests.parallel.small import one_thread, request, small_config, stage_pipeline


def settings(values):
    cache = CacheSettings(**values.get("cache", {}))
    return cache, KVSettings(budget=values.get("budget"))


def wanted(values):
    made = []
    for changes in values.get("requests", [{}]):
        changes = dict(changes)
        frames = changes.pop("prefix", 0)
        if frames:
            changes["prefix"] = Prefix(frames=torch.zeros(frames, 32, 48, 3, dtype=torch.uint8))
        made.append(request(**changes))
    return made


def videos(gang, values, out, flag_log=FlagLog, wrap=lambda model: model):
    """Make videos; the lead saves latents, flags, counts and the items that its stage was given."""
    config = small_config(**values.get("config", {}))
    pipeline = stage_pipeline(config, gang.mesh, values.get("split"))
    pipeline.model = wrap(pipeline.model)
    if not gang.mesh.leads:
        gang.serve(pipeline.stage, flag_log)
        return
    cache, kv = settings(values)
    requests = wanted(values)
    traces = {video: RunTrace() for video in range(len(requests))} if values.get("trace") else {}
    latents = [[] for _ in requests]
    began = time.perf_counter()
    with gang.lead(pipeline, cache, kv, barrier=values.get("barrier", False)) as (engine, reports):
        for made in engine.generate_many(requests, values.get("concurrency", 1), None, traces):
            assert made.chunk.index == len(latents[made.video])
            latents[made.video].append(made.chunk.latents)
    torch.save(
        {
            "latents": latents,
            "seconds": time.perf_counter() - began,
            "flags": {video: torch.from_numpy(trace.finish({}).flags) for video, trace in traces.items()},
            "kept": {video: torch.from_numpy(trace.finish({}).kept) for video, trace in traces.items()},
            "items": {video: torch.from_numpy(trace.finish({}).tick_items) for video, trace in traces.items()},
            "reports": reports.ranks,
        },
        out,
    )


class _Trap:
    """A model that does something bad in its n-th call."""

    def __init__(self, model, calls, action):
        self._model, self._left, self._action = model, calls, action

    def __getattr__(self, name):
        return getattr(self._model, name)

    def layers(self, *arguments, **named):
        self._left -= 1
        if not self._left:
            self._action()
        return self._model.layers(*arguments, **named)


def _raise():
    raise ValueError("a matrix of sorrows")


def _oversleep():
    time.sleep(600)


ACTIONS = {
    "raise": _raise,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": _oversleep,
}


def trouble(gang, values, out):
    """As `videos`, but one rank does something bad after some calls."""
    Path(f"{out}.{gang.mesh.rank}").write_text(str(os.getpid()))
    if gang.mesh.rank != values["rank"]:
        videos(gang, values, out)
        return
    if values["action"] == "flip":
        videos(gang, values, out, flag_log=_Flipping)
        return
    if values["action"] == "input":
        raise InputError("the weights have gone for a walk")
    action = ACTIONS[values["action"]]
    videos(gang, values, out, wrap=lambda model: _Trap(model, values.get("calls", 20), action))


class _Flipping(FlagLog):
    """Reads one flag the wrong way round."""

    def add(self, flags):
        flags = list(flags)
        if flags and self.count <= 10 < self.count + len(flags):
            flags[10 - self.count] ^= 1
        super().add(flags)


def goldens(gang, values, out):
    verdicts = []
    files = [Path(path) for path in values["files"]]
    check_on_gang(gang, files, split=values["split"], on_verdict=lambda verdict: verdicts.append(asdict(verdict)))
    if gang.mesh.leads:
        Path(out).write_text(json.dumps(verdicts))


def loaded(gang, values, out):
    """As `videos`, with weights from a checkpoint."""
    config = small_config()
    with gang.loading():
        model = load_stage(config, Path(values["weights"]), Loading(layers=stage_range(config, gang.mesh)))
    videos(gang, values, out, wrap=lambda _: model)


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
    reports = [first.ranks, second.ranks]
    torch.save({"latents": [whole, again], "refused": refused, "reports": reports}, out)


SCENARIOS = {"abandoned": abandoned, "loaded": loaded, "videos": videos, "trouble": trouble, "goldens": goldens}


def main():
    name, out, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    one_thread()
    seat = Seat.from_environment()
    layout = Layout(**values["layout"])
    timeouts = Timeouts(**values.get("timeouts", {}))
    try:
        with open_gang(seat, layout, timeouts=timeouts) as gang:
            SCENARIOS[name](gang, values, out)
    except InputError:
        leave(2)
    except GangError as error:
        if not seat.launcher_speaks and error.failure.reporter == seat.rank:
            sys.stderr.write(f"error: {error}\n")
        leave(error.failure.status)
    except KeyboardInterrupt:
        leave(130)


if __name__ == "__main__":
    main()
