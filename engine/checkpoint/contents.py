"""What a checkpoint's files hold: states as named tensors and plain values, and back.

It knows neither paths nor ranks' messages.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from engine.kv.buffer import KVState
from engine.kv.layout import KVSettings
from engine.kv.views import LayerKV
from engine.request import Request
from engine.reuse.flags import FlagState
from engine.reuse.memory import ComputedStep
from engine.reuse.policy import ReuseSettings
from engine.video import KVOp, VideoState
from models.protocols import Pipeline

RUN_FILE = "run.safetensors"
_FORMAT = 8
_DECODER, _COURSE = "decoder.", "course."
_PARTS = ("kv", "queries", "origin")  # of a `LayerKV`


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a file holds."""

    tensors: Mapping[str, Tensor]  # on the CPU
    values: Mapping[str, Any]  # plain JSON


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank}.safetensors"


def fingerprint(
    request: Request, pipeline: Pipeline, identity: str, layout: Mapping[str, int], reuse: ReuseSettings, kv: KVSettings
) -> dict[str, Any]:
    """All that must be the same when a checkpoint is taken up, as plain JSON values.

    `pipeline` may be the first stage; `identity` names the model and its weights, and whatever else the caller wants to
    be the same.
    """
    model, prefix = pipeline.model, request.prefix
    asked = {field.name: getattr(request, field.name) for field in fields(request)}
    asked["prefix"] = None if prefix is None else _digest(prefix)
    if (end := asked.pop("end")) is not None:
        asked["end"] = _digest(end)
    held = {
        "identity": identity,
        "class": type(model).__name__,
        "first_stage_bytes": model.weight_bytes,
        "first_stage_layers": [model.kv.layers.start, model.kv.layers.stop],
        "dtype": str(model.kv.dtype),
    }
    settings = {"layout": dict(layout), "reuse": asdict(reuse), "kv": kv.identity()}
    parts = {"format": _FORMAT, "request": asked, "model": held, **settings}
    plain: dict[str, Any] = json.loads(json.dumps(parts))  # as it looks when it is read again
    return plain


def of_past(fingerprint: Mapping[str, Any], *, begun: int, ends: bool) -> dict[str, Any]:
    """What the state depends on when so many chunks have `begun`: neither prompts that come later, nor the length.

    Unless the video `ends` so soon that it shows; see `Schedule.open_quantum`.
    """
    request = dict(fingerprint["request"])
    request["script"] = [[first, prompt] for first, prompt in request["script"] if first < begun]
    if not ends:
        del request["chunks"]
    return {**fingerprint, "request": request}


def pack_shard(kv: KVState, flags: FlagState, about: Mapping[str, Any]) -> Contents:
    """One rank's shard of a video, copied to the CPU. `about`: plain JSON values that tell it from other ranks'."""
    tensors = {
        f"{branch}.{layer}.{name}": part
        for (branch, layer), state in kv.layers.items()
        for name in _PARTS
        if (part := getattr(state, name)) is not None
    }
    values = {
        "about": dict(about),
        "clean": kv.clean,
        "window": kv.window,
        "published": kv.published,
        "layers": list(kv.layers),
        "flags": list(flags),
    }
    return Contents(tensors=_to_host(tensors), values=values)


def unpack_shard(contents: Contents) -> tuple[KVState, FlagState]:
    """What `pack_shard` was given."""
    values, tensors = contents.values, contents.tensors
    layers = dict[tuple[int, int], LayerKV]()
    for branch, layer in values["layers"]:
        start = f"{branch}.{layer}"
        queries, origin = tensors.get(f"{start}.queries"), tensors.get(f"{start}.origin")
        layers[branch, layer] = LayerKV(tensors[f"{start}.kv"], queries, origin)
    clean = [(chunk, rows) for chunk, rows in values["clean"]]
    state = KVState(clean=clean, window=values["window"], published=values["published"], layers=layers)
    return state, tuple(values["flags"])


def pack_run(state: VideoState, decoder: Mapping[str, Tensor], course: Mapping[str, Tensor]) -> Contents:
    """The state of a run, what its decoder keeps for the next chunk and its `Course` for the next span; copied to the
    CPU."""
    tensors = {f"latents.{chunk}": part for chunk, part in state.latents.items()}
    tensors |= {f"before.{chunk}": part for chunk, part in state.before.items()}
    tensors |= {f"{_DECODER}{name}": part for name, part in decoder.items()}
    tensors |= {f"{_COURSE}{name}": part for name, part in course.items()}
    memory = []
    for chunk, held in state.memory.items():
        for place, one in enumerate(held):
            tensors |= {f"memory.{chunk}.{place}.{part}": tensor for part, tensor in enumerate(one.parts)}
            memory.append([chunk, place, one.step, one.time, len(one.parts)])
    for chunk, solver in state.solvers.items():
        tensors |= {f"solver.{chunk}.{name}": part for name, part in solver.items()}
    values = {
        "latents": list(state.latents),
        "before": list(state.before),
        "ops": [[op.kind, op.chunk] for op in state.ops],
        "leaving": sorted(state.leaving),
        "policy": dict(state.policy),
        "memory": memory,
        "solvers": {chunk: list(solver) for chunk, solver in state.solvers.items()},
        "flags": list(state.flags),
        "unsent": list(state.unsent),
    }
    return Contents(tensors=_to_host(tensors), values=values)


def unpack_run(contents: Contents) -> tuple[VideoState, dict[str, Tensor], dict[str, Tensor]]:
    """What `pack_run` was given."""
    values, tensors = contents.values, contents.tensors
    memory: dict[int, list[ComputedStep]] = {}
    for chunk, place, step, time, count in values["memory"]:
        parts = tuple(tensors[f"memory.{chunk}.{place}.{part}"] for part in range(count))
        memory.setdefault(chunk, []).append(ComputedStep(step, time, parts))
    solvers = {
        int(chunk): {name: tensors[f"solver.{chunk}.{name}"] for name in names}
        for chunk, names in values["solvers"].items()
    }
    decoder, course = (
        {name.removeprefix(start): part for name, part in tensors.items() if name.startswith(start)}
        for start in (_DECODER, _COURSE)
    )
    state = VideoState(
        latents={chunk: tensors[f"latents.{chunk}"] for chunk in values["latents"]},
        before={chunk: tensors[f"before.{chunk}"] for chunk in values["before"]},
        ops=tuple(KVOp(kind=kind, chunk=chunk) for kind, chunk in values["ops"]),
        leaving=frozenset(values["leaving"]),
        policy=values["policy"],
        memory=memory,
        solvers=solvers,
        flags=tuple(values["flags"]),
        unsent=tuple(values["unsent"]),
    )
    return state, decoder, course


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which later writes do not touch; a GPU is waited for once for all."""
    copies, devices = {}, {part.device for part in tensors.values() if part.is_cuda}
    for name, part in tensors.items():
        copies[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        copies[name].copy_(part.detach(), non_blocking=part.is_cuda)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _digest(frames: Tensor) -> str:
    shape = ",".join(str(size) for size in frames.shape)
    return hashlib.blake2b(frames.cpu().contiguous().numpy().tobytes(), digest_size=16, key=shape.encode()).hexdigest()
