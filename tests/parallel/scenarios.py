"""What ranks do in tests: `python -m tests.parallel.scenarios NAME OUT ARGUMENTS`, started once for each rank.

The lead saves what it has made to OUT; errors are those of the gang.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine import executor
from engine.checkpoint.files import CheckpointConfig
from engine.files import remove_folder
from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.record import Recorder
from engine.reuse.flags import FlagLog
from engine.reuse.policy import ReuseSettings
from engine.video import WorkItem
from models.checkpoint import Loading
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.pipeline import load_stage
from models.protocols import Pass, PassCondition
from parallel.comm.channel import GroupTransport, Inbox, Link, Outbox
from parallel.comm.messages import Header, Kind
from parallel.health.failure import GangError
from parallel.health.monitor import leave
from parallel.health.timeouts import Timeouts
from parallel.mesh import Layout
from parallel.ranks import worker
from parallel.ranks.environment import RankEnv
from parallel.ranks.gang import open_gang
from parallel.split import stage_range
from tests.parallel.small import one_thread, request, small_config, stage_pipeline


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


class _Slow:
    """A model whose layers take a given time, whatever else the machine does."""

    def __init__(self, model, seconds):
        self._model, self._seconds = model, seconds

    def __getattr__(self, name):
        return getattr(self._model, name)

    def layers(self, *arguments, **named):
        began = time.perf_counter()
        hidden = self._model.layers(*arguments, **named)
        time.sleep(max(0.0, self._seconds * len(self._model.kv.layers) - (time.perf_counter() - began)))
        return hidden


def slow(gang, values, out):
    """As `videos`, at a speed that does not depend on the machine."""
    videos(gang, values, out, wrap=lambda model: _Slow(model, values["layer_seconds"]))


def _raise():
    raise ValueError("a matrix of sorrows")


def _oversleep():
    time.sleep(600)


ACTIONS = {
    "raise": _raise,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sleep": _oversleep,
}


def trouble(gang, values, out):
    """As `videos`, but one rank does something bad after some calls."""
    Path(f"{out}.{gang.mesh.rank}").write_text(str(os.getpid()))
    told = [Path(f"{out}.{rank}") for rank in range(gang.mesh.layout.world_size)]
    while not all(
        path.exists() and path.stat().st_size for path in told
    ):  # before one fails all have said who they are
        time.sleep(0.01)
    if gang.mesh.rank != values["rank"]:
        videos(gang, values, out)
        return
    if values["action"] == "flip":
        executor.FlagLog = _Flipping
        videos(gang, values, out)
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


def separate_payloads(gang):
    """Send payloads as they are sent between GPUs: by themselves, on the main thread."""
    groups = gang._services.groups
    links = {edge: replace(link, payloads=link.headers) for edge, link in groups.links.items()}
    gang._services = replace(gang._services, groups=replace(groups, links=links))


def goldens(gang, values, out):
    from launch.conformance.command import check_on_gang  # which takes as long to import as half of the rest

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
    reports = [first, second]
    torch.save({"latents": [whole, again], "refused": refused, "reports": reports}, out)


def peak_memory():
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load_only(gang, values, out):
    """Load a stage, run nothing, and note how much memory that took."""
    config = MagiConfig.from_dict(values["model"], source="test")
    with torch.device("meta"):
        MagiDiT(config.model_config, layers=range(1))  # imports what the meta device needs
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    before = peak_memory()
    model = load_stage(config, Path(values["weights"]), Loading(layers=stage_range(config, gang.mesh)))
    total = sum(parameter.sum().item() for parameter in model.parameters())  # touches every page
    figures = {"grown": peak_memory() - before, "held": model.weight_bytes, "total": total}
    Path(f"{out}.{gang.mesh.rank}").write_text(json.dumps(figures))


def flood(gang, values, out):
    """Rank 0 sends more than rank 1 receives; nothing is lost, overtaken or overwritten, and `send` never waits."""
    transport = GroupTransport(1 - gang.mesh.rank)
    payloads = None if values["inline"] else transport
    link = Link(peer=1 - gang.mesh.rank, key=b"", headers=transport, payloads=payloads, device=torch.device("cpu"))
    if gang.mesh.leads:
        outbox = Outbox(link, gang.monitor.lost)
        began = time.perf_counter()
        for index in range(40):
            outbox.send(Header(kind=Kind.ITEM, request=index), torch.full((1, 50 + index // 10, 64), float(index)))
        outbox.send(Header(kind=Kind.LEAVE))
        sending = time.perf_counter() - began
        outbox.close(30)
        Path(f"{out}.seconds").write_text(json.dumps([sending, time.perf_counter() - began]))
        return
    inbox = Inbox(link, gang.monitor.lost, gang.monitor.check, limit=2)
    held, seen = [], []
    while (message := inbox.receive()).header.kind is not Kind.LEAVE:
        time.sleep(0.02)
        held.append(message)
        if len(held) == 2:  # the older one must have kept its content till now
            older = held.pop(0)
            seen.append([older.header.request, older.payload.shape[1], *older.payload.unique().tolist()])
    last = held.pop()
    seen.append([last.header.request, last.payload.shape[1], *last.payload.unique().tolist()])
    inbox.close(10)
    Path(out).write_text(json.dumps(seen))


def lost_key(gang, values, out):
    """A thread of rank 0 ends with an error that nobody has foreseen, while both ranks wait."""
    peer = 1 - gang.mesh.rank
    link = Link(peer=peer, key=b"", headers=GroupTransport(peer), payloads=None, device=torch.device("cpu"))

    def lose(began, item):
        raise KeyError("a lost key")

    if gang.mesh.leads:
        Outbox(link, gang.monitor.lost, lose).send(Header(kind=Kind.ITEM, item=some_item()))
    else:
        Inbox(link, gang.monitor.lost, gang.monitor.check, limit=2)
    while True:
        gang.monitor.check()
        time.sleep(0.05)


def some_item():
    condition = PassCondition(times=(0.0,))
    what = Pass(name="denoise", caption="text", branch=0, isolated=False, weight=1.0, condition=condition)
    return WorkItem(request=0, tick=0, chunk=0, step=0, chunks_left=0, what=what, keys_from=None, before=())


def kept(gang, values, out):
    """Videos with checkpoints. Chunks are saved as they are handed out; somebody may be killed on the way."""
    pipeline = stage_pipeline(small_config(**values.get("config", {})), gang.mesh, values.get("split"))
    kill = values.get("kill", {})
    if kill.get("rank") == gang.mesh.rank:
        pipeline.model = _Trap(pipeline.model, kill["calls"], ACTIONS["kill"])
    if not gang.mesh.leads:
        gang.serve(pipeline.stage)
        return
    folder, requests, cut = Path(values["folder"]), wanted(values), kill.get("steps", 0)
    plans = [
        CheckpointConfig(folder=folder / f"video-{video}", every=every) if every else None
        for video, every in enumerate(values["every"])
    ]
    wholes = set()
    with gang.lead(pipeline, *settings(values)) as (engine, reports):
        found = [engine.reader.read(one, plan) for one, plan in zip(requests, plans, strict=True)]
        for one in found:
            engine.submit(one)
        resumed = [one.first for one in found]
        while engine.in_flight:
            for made in engine.step():
                torch.save(made.chunk.latents, folder / f"{made.video}-{made.chunk.index}.pt")
            whole = sorted(path.parent.name[:16] for path in folder.glob("video-*/*/manifest.json"))
            wholes.add(tuple(whole))
            if kill.get("quantum", "quantum-99999999") <= (whole or [""])[-1]:
                cut -= 1
                if not cut:
                    os.kill(os.getpid(), signal.SIGKILL)
    torch.save({"resumed": resumed, "wholes": sorted(wholes), "reports": reports}, out)


def cancelled(gang, values, out):
    """A video is given up while its checkpoint is written: before or after rank 1 has its file on the disk.

    Its folder may be removed just before, so that rank 1 has nowhere to write.
    """
    pipeline = stage_pipeline(small_config(), gang.mesh)
    if not gang.mesh.leads:
        write = worker.write_async

        def write_slowly(folder, files, on_end):
            if values["removed"]:
                threading.Timer(values["seconds"], write, (folder, files, on_end)).start()
                return
            write(folder, files, lambda written: (time.sleep(values["seconds"]), on_end(written)))

        worker.write_async = write_slowly
        gang.serve(pipeline.stage)
        time.sleep(2 * values["seconds"])
        return
    folder = Path(out).with_name("checkpoints")
    with gang.lead(pipeline) as (engine, _):
        number = engine.submit(engine.reader.read(request(chunks=6), CheckpointConfig(folder=folder, every=1)))
        while not list(folder.iterdir()):
            engine.step()
        keys = [worker.saved_key(next(folder.iterdir()), rank) for rank in range(2)]
        while not gang._store.check(keys[:1] if values["seconds"] else keys):
            time.sleep(0.01)
        if values["removed"]:
            remove_folder(folder)
        engine.cancel(number)
    time.sleep(2 * values["seconds"])
    left = [key for key in keys if gang._store.check([key])]
    left += [path.name for path in folder.parent.iterdir() if "checkpoints" in path.name and values["removed"]]
    torch.save(left, out)


class _Held:
    """A gate whose quanta from one on are shut until it is told to open."""

    def __init__(self, quantum):
        self.quantum, self.announced, self.free = quantum, [], threading.Event()

    def announce(self, quantum):
        self.announced.append(quantum)

    def open(self, quantum):
        return quantum < self.quantum or self.free.is_set()


def gated(gang, values, out):
    """Two videos; the first is held at a border until the second is made, and no time is burnt while it is."""
    pipeline = stage_pipeline(small_config(), gang.mesh)
    if not gang.mesh.leads:
        gang.serve(pipeline.stage)
        return
    latents, gates = [[], []], [_Held(3), _Held(100)]
    with gang.lead(pipeline, *settings(values)) as (engine, _):
        for one, gate in zip(wanted(values), gates, strict=True):
            engine.submit(one, gate=gate)

        def step():
            for made in engine.step():
                latents[made.video].append(made.chunk.latents)

        while engine.running(1):
            step()
        first_done = list(gates[0].announced)
        began, computed = time.monotonic(), time.process_time()
        while time.monotonic() - began < 1:
            step()
        computed = time.process_time() - computed

        def open_gate():
            gates[0].free.set()
            engine.wake()

        threading.Timer(0.1, open_gate).start()
        while engine.in_flight:
            step()
    announced = [first_done, *(gate.announced for gate in gates)]
    torch.save({"latents": latents, "computed": computed, "announced": announced}, out)


SCENARIOS = {
    "kept": kept,
    "cancelled": cancelled,
    "gated": gated,
    "slow": slow,
    "flood": flood,
    "lost_key": lost_key,
    "load_only": load_only,
    "abandoned": abandoned,
    "loaded": loaded,
    "videos": videos,
    "trouble": trouble,
    "goldens": goldens,
}


def main():
    name, out, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    one_thread()
    env = RankEnv.from_environment()
    layout = Layout(**values["layout"])
    timeouts = Timeouts(**values.get("timeouts", {}))
    try:
        device = None if values.get("device") == "cuda" else torch.device("cpu")
        with open_gang(env, layout, timeouts=timeouts, device=device) as gang:
            if values.get("inline") is False:
                separate_payloads(gang)
            SCENARIOS[name](gang, values, out)
    except InputError:
        leave(2)
    except GangError as error:
        if not env.launcher_speaks and error.failure.reporter == env.rank:
            sys.stderr.write(f"error: {error}\n")
        if "survives" in values:
            time.sleep(values["survives"])
            Path(out).write_text(str(error))
        leave(error.failure.status)
    except KeyboardInterrupt:
        leave(130)


if __name__ == "__main__":
    main()
