"""What a video takes of a rank's memory, worked out before anything is allocated; and what would make it fit.

An estimate: weights, keys and values are exact, what passes through a layer and through the autoencoder is rounded up
from its largest tensors. `flowcache inspect` prints it, `flowcache generate` refuses by it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.kv.layout import KVSettings
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from models.families import family_of
from models.family import ModelConfig
from parallel.cluster.config import video_size
from parallel.mesh import Layout
from parallel.split import stage_layers, stage_sizes

_STREAMS = 4  # copies of the hidden states that a layer holds at once: input, normed, attention's, output
_FRAME_COPIES = 8  # bytes for each value of a chunk's frames: as tiles, blended, in fp32 or bf16, and as uint8
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_BUDGETS, _STAGES = (4, 2, 1), (2, 4, 8)  # what is tried for advice


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes on one rank."""

    weights: int  # of its layers, and on the leader of the autoencoder
    kv: int  # of all videos that are made at a time
    texts: int  # likewise, keys and values of the longest texts
    work: int  # what passes through a layer, or through the autoencoder
    host: int  # of the machine's memory beside a GPU's, for keys and values of finished chunks

    @property
    def total(self) -> int:
        """All of it but what is on the host."""
        return self.weights + self.kv + self.texts + self.work


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be made, of which model and how."""

    config: ModelConfig
    vae_bytes: int  # of its autoencoder
    request: Request
    reuse: ReuseSettings
    kv: KVSettings
    layout: Layout
    split: str | None = None  # layers of each stage; None balances them
    videos: int = 1  # made at a time

    def stages(self) -> list[Needs]:
        """What a rank of each stage needs; an `InputError` if the model cannot make the video, or does not fit."""
        sizes = stage_sizes(self.config, self.layout.pp, self.split)
        size = video_size(self.config, self.request, reuse=self.reuse, kv=self.kv, layout=self.layout, split=self.split)
        known, family, request = self.config.figures, family_of(self.config), self.request
        tokens = math.ceil(self.config.chunk_tokens(request.height, request.width) / self.layout.cp)
        hidden = tokens * (_STREAMS * known.hidden + known.mlp) * known.dtype.itemsize
        frames = known.chunk_frames * request.height * request.width * 3
        weights = [family.stage_bytes(self.config, stage_layers(sizes, stage)) for stage in range(len(sizes))]
        kv, host = self.videos * size.kv_bytes, self.videos * size.kv_host_bytes
        rows = self.videos * (known.window + 2) * known.text_rows  # of the texts in `PassInputs`
        texts = rows * known.text_values * known.dtype.itemsize
        stages = [Needs(weights=of_stage, kv=kv, texts=texts * count, work=hidden, host=host)
                  for of_stage, count in zip(weights, sizes, strict=True)]  # fmt: skip
        work = max(hidden, _FRAME_COPIES * frames)
        return [replace(stages[0], weights=weights[0] + self.vae_bytes, work=work), *stages[1:]]

    def total(self, *, shared: bool) -> int:
        """Bytes on the rank that needs most, or of all ranks together if they share one memory."""
        stages = self.stages()
        if shared:
            return self.layout.cp * sum(stage.total + stage.host for stage in stages)
        return max(stage.total for stage in stages)

    def check(self, device: str) -> None:
        """See that it fits into what is free, of this machine and of the GPU; an `InputError` has the figures, and what
        would fit. A GPU that this process does not use is not asked; ranks are taken to be on this machine."""
        free = free_bytes(), None if device == "cpu" else _free_gpu_bytes(alone=self.layout.world_size == 1)
        short = self._short(device, *free)
        if not short:
            return
        size = f"{self.request.width}x{self.request.height} pixels and {self.request.chunks:,} chunks"
        together = f", {self.videos} at a time," if self.videos > 1 else ""
        advice = ", ".join(self._advice(device, *free)) or "ask for a smaller --height and --width"
        raise InputError(f"a video of {size}{together} needs {short}: {advice}")

    def _short(self, device: str, host: int | None, gpu: int | None) -> str:
        """What is needed and not free, in words; empty if it fits."""
        if device == "cpu":
            needed, free, where = self.total(shared=True), host, ""
        else:
            needed, free, where = self.total(shared=False), gpu, " a GPU" if self.layout.world_size > 1 else ""
            if free is None or needed <= free:
                needed = self.layout.cp * sum(stage.host for stage in self.stages())
                free, where = host, " of the machine's memory for --kv-offload"
        return "" if free is None or needed <= free else f"{_gb(needed)}{where}, {_gb(free)} are free"

    def _advice(self, device: str, host: int | None, gpu: int | None) -> Iterator[str]:
        """Of each kind of change the first that fits, with what it needs."""
        budgets = [(f"--kv-budget {budget}", replace(self.kv, budget=budget)) for budget in _BUDGETS]
        changes = [[(option, replace(self, kv=kv)) for option, kv in budgets]]
        if device != "cpu":  # more processes on one machine need more memory, not less
            offload = not self.kv.offload
            option = "--kv-offload" if offload else "--no-kv-offload"
            changes.insert(0, [(option, replace(self, kv=replace(self.kv, offload=offload)))])
            layouts = [Layout(pp=pp, cp=self.layout.cp) for pp in _STAGES if pp > self.layout.pp]
            changes.append([(f"--pp {one.pp}", replace(self, layout=one, split=None)) for one in layouts])
        for kind in changes:
            for option, job in kind:
                try:
                    fits = not job._short(device, host, gpu)
                except InputError:  # the model cannot be laid out so
                    continue
                if fits:
                    each = " a GPU" if device != "cpu" and job.layout.world_size > 1 else ""
                    yield f"{option} needs {_gb(job.total(shared=device == 'cpu'))}{each}"
                    break


def free_bytes() -> int | None:
    """Bytes of memory that this process may still take, swap included; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        free = sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def _free_gpu_bytes(*, alone: bool) -> int | None:
    # Asking takes memory of the GPU, so whoever only starts ranks must not.
    return torch.cuda.mem_get_info()[0] if alone or torch.cuda.is_initialized() else None


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
