"""What models take: the list of the command `models`, and whether this machine has so much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.kv.layout import KVSettings
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from models.errors import InputError
from models.magi.presets import PRESETS, Preset
from parallel.cluster.config import video_size
from parallel.mesh import Layout

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_NOTES = """\
Disk: the DiT and the autoencoder as stored; of a released model also T5 (19 GB). Those share autoencoder and T5.
Memory: an estimate for one video of that size on one device: weights, and keys and values of the window and one \
finished chunk (twice with guidance). What the layers work with comes on top; so does T5 (19 GB), of CPU memory for \
4.5B and of GPU memory for 24B.
Weights of released models: huggingface.co/sand-ai/MAGI-1. Put the folder above at downloads/ and its last name, \
ckpt/vae at downloads/vae and ckpt/t5 at downloads/t5_pretrained, as the released configurations say, or name a folder \
with --weights. special_tokens.npz, from the MAGI-1 code's example/assets, goes into the DiT's folder; T5 needs \
pip install 'flowcache-engine[t5]'."""


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


def check_memory(what: str, needed: int) -> None:
    """See that the machine has so many bytes of memory; if not, an `InputError` says both figures."""
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{what} needs {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            "ask for a smaller --height and --width, or a --kv-budget"
        )


def show_models() -> None:
    """Print the presets."""
    console = Console()
    sizes = Table("Model", "Parameters", "Video", "Steps", "Disk", "Memory")
    kinds = Table("Model", "What it is", "Weights")
    kinds.columns[0].no_wrap = kinds.columns[2].no_wrap = True
    for preset in PRESETS.values():
        run = preset.config().runtime_config
        size, disk, memory = f"{run.video_size_w}x{run.video_size_h}", _size(preset.disk), _size(_memory(preset))
        sizes.add_row(preset.name, _count(preset.parameters), size, str(run.num_steps), disk, memory)
        kinds.add_row(preset.name, preset.summary, preset.folder or "ship with the project")
    console.print(sizes)
    console.print(kinds)
    console.print(_NOTES, highlight=False, markup=False)


def _memory(preset: Preset) -> int:
    """Bytes on one device for one video of the preset's size: weights, and keys and values."""
    config = preset.config()
    run = config.runtime_config
    size: dict[str, Any] = {"height": run.video_size_h, "width": run.video_size_w}
    request = Request(prompt="-", chunks=2 * run.window_size, num_steps=run.num_steps, seed=0, **size)
    video = video_size(config, request, reuse=ReuseSettings(), kv=KVSettings(), layout=Layout())
    return preset.weight_bytes + video.kv_bytes


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.0f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.0f} MB"
