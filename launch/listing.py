"""What the command `models` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from models.magi.presets import PRESETS, Preset

_NOTES = """\
Disk: the DiT and the autoencoder as stored; of a released model also T5 (19 GB). Those share autoencoder and T5.
Memory: an estimate for one video of that size on one device: weights, and keys and values of the window and one \
finished chunk (twice with guidance). What the layers work with comes on top; so does T5 (19 GB), of CPU memory for \
4.5B and of GPU memory for 24B.
Weights of released models: huggingface.co/sand-ai/MAGI-1. Put the folder above at downloads/ and its last name, \
ckpt/vae at downloads/vae and ckpt/t5 at downloads/t5_pretrained, as the released configurations say, or name a folder \
with --weights. special_tokens.npz, from the MAGI-1 code's example/assets, goes into the DiT's folder; T5 needs \
pip install 'flowcache-engine[t5]'."""


def show_models() -> None:
    """Print the presets: their sizes, and where their weights are."""
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
    import torch

    from engine.kv.size import KVSettings, plan_kv
    from engine.schedule import Schedule
    from models.magi.sampling import MagiSampling

    config = preset.config()
    run, model = config.runtime_config, config.model_config
    sampling = MagiSampling(config=config, num_steps=run.num_steps)
    schedule = Schedule(first=0, chunks=2 * run.window_size, num_steps=run.num_steps, window=run.window_size)
    tokens = config.chunk_tokens(run.video_size_h, run.video_size_w)
    plan = plan_kv(sampling, schedule, KVSettings(), chunk_tokens=tokens)
    return preset.weight_bytes + plan.nbytes(model.kv_geometry(range(model.num_layers), torch.device("cpu")))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.0f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.0f} MB"
