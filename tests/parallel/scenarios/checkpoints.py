"""Ranks whose videos are kept, given up and held at chunk boundaries."""

import os
import signal
import threading
import time
from pathlib import Path

import torch

from engine.checkpoint.files import CheckpointConfig
from engine.files import remove_folder
from parallel.ranks import worker
from tests.parallel.scenarios.trouble import ACTIONS, Trap
from tests.parallel.scenarios.videos import settings, wanted
from tests.parallel.small import request, small_config, stage_pipeline


def kept(gang, values, out):
    """Videos with checkpoints. Chunks are saved as they are handed out; somebody may be killed on the way."""
    pipeline = stage_pipeline(small_config(**values.get("config", {})), gang.mesh, values.get("split"))
    kill = values.get("kill", {})
    if kill.get("rank") == gang.mesh.rank:
        pipeline.model = Trap(pipeline.model, kill["calls"], ACTIONS["kill"])
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
