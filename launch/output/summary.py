"""What a finished video cost: a text for people, and what a record says of its run."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch import __version__
from launch.options import Options
from launch.plan import Plan
from parallel.topology.split import stage_sizes
from parallel.trace.counters import RankCounters

_TRANSFERS = {
    "nccl": "over NCCL",
    "host": "through host memory, as not every rank has a GPU of its own",
    "gloo": "over gloo",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What was made and what it cost."""

    plan: Plan  # that it was made of; its `out` is the file
    frames: int  # frames in it
    chunks: int  # chunks made
    loading: float  # seconds to load the model
    making: float  # seconds from the loaded model, or from the video's own start, to the finished file
    computed: float  # computed chunk-steps as a share of all
    kv_bytes: int  # size of the KV buffers; on ranks, of the leader's part
    memory: int  # peak of the process, bytes; on ranks, of the leader
    gpu_memory: int | None  # peak of tensors on the GPU, bytes; None without one
    ranks: str | None = None  # a line on the ranks that made it; None for this process alone

    def text(self) -> str:
        """Three lines for people, and one more for ranks."""
        return (
            f"{self.headline()}\n"
            f"made in {self.making:.1f} s, {self.making / self.chunks:.2f} s per chunk, "
            f"after {self.loading:.1f} s of loading\n"
            f"{self.computed:.0%} of the steps computed ({self.plan.options.cache}); {_memory(self)}"
        )

    def headline(self) -> str:
        """What was made, in a line."""
        size = f"{self.plan.request.width}x{self.plan.request.height}"
        seconds = self.frames / self.plan.model.config.runtime_config.fps
        return f"{self.plan.out}: {self.frames} frames of {size}, {seconds:.1f} s of video"


def summary_text(summaries: Sequence[Summary], *, making: float) -> str:
    """One video's summary, or a line for each of several and what they cost together, in `making` seconds."""
    last = summaries[-1]
    if len(summaries) == 1:
        return last.text()
    chunks = sum(one.chunks for one in summaries)
    computed = sum(one.computed * one.chunks for one in summaries) / chunks
    return "\n".join(
        [
            *(one.headline() for one in summaries),
            f"{len(summaries)} videos made in {making:.1f} s, {making / chunks:.2f} s per chunk, "
            f"after {last.loading:.1f} s of loading",
            f"{computed:.0%} of the steps computed ({last.plan.options.cache}); {_memory(last)}",
        ]
    )


def rank_line(options: Options, counters: Sequence[RankCounters]) -> str:
    """A line on the ranks that made videos."""
    first = sorted((one for one in counters if one.cp_rank == 0), key=lambda one: one.stage)
    layers = ",".join(str(one.layers[1] - one.layers[0]) for one in first)
    loading = [one.load_seconds for one in counters]
    return (
        f"{len(counters)} rank{'s' if len(counters) > 1 else ''}, pp {options.pp} x cp {options.cp}, layers {layers}; "
        f"weights {', '.join(_size(one.weight_bytes) for one in counters)}, "
        f"loaded in {min(loading):.1f} to {max(loading):.1f} s; tensors moved {_TRANSFERS[counters[0].transfer]}"
    )


def _memory(summary: Summary) -> str:
    """What was held; figures of a process are those of the leader where there are ranks."""
    peak = _size(summary.memory)
    if summary.gpu_memory is not None:
        peak += f", on the GPU {_size(summary.gpu_memory)}"
    text = f"keys and values {_size(summary.kv_bytes)}, peak memory {peak}"
    return text if summary.ranks is None else f"on the leader {text}\n{summary.ranks}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def peak_memory() -> int:
    """Largest size that this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kilobytes elsewhere


def record_settings(summary: Summary) -> dict[str, Any]:
    """Settings and totals of a finished run, as plain JSON values; docs/records.md lists them."""
    plan = summary.plan
    request, options, config = plan.request, plan.options, plan.model.config
    return {
        "version": __version__,
        "model": plan.model.name,
        "prompt": request.prompt,
        "seed": request.seed,
        "chunks": request.chunks,
        "prefix_frames": 0 if request.prefix is None else len(request.prefix.frames),
        "height": request.height,
        "width": request.width,
        "steps": request.num_steps,
        "window": config.runtime_config.window_size,
        "device": str(plan.model.loading.device),
        "pp": options.pp,
        "cp": options.cp,
        "layers": list(stage_sizes(config, options.pp, options.split)),
        "reuse_preset": options.cache.value,
        "cache": asdict(plan.model.reuse),
        "kv": asdict(plan.model.kv),
        "computed_fraction": summary.computed,
        "kv_bytes": summary.kv_bytes,
        "seconds": {"loading": summary.loading, "making": summary.making},
    }
