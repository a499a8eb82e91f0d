"""What a record says of the run that it belongs to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launch import __version__
from launch.output.summary import Summary
from launch.plan import Plan
from parallel.topology.split import stage_sizes


def record_settings(plan: Plan, summary: Summary) -> dict[str, Any]:
    """Settings and totals of a finished run, as plain JSON values; docs/records.md lists them."""
    request, runtime = plan.request, plan.config.runtime_config
    return {
        "version": __version__,
        "model": plan.name,
        "prompt": request.prompt,
        "seed": request.seed,
        "chunks": request.chunks,
        "prefix_frames": 0 if request.prefix is None else len(request.prefix.frames),
        "height": request.height,
        "width": request.width,
        "steps": request.num_steps,
        "window": runtime.window_size,
        "device": str(plan.loading.device),
        "pp": plan.ranks.pp,
        "cp": plan.ranks.cp,
        "layers": list(stage_sizes(plan.config, plan.ranks.pp, plan.ranks.split)),
        "cache_preset": plan.cache_name.value,
        "cache": asdict(plan.cache),
        "kv": asdict(plan.kv),
        "computed_fraction": summary.computed,
        "kv_bytes": summary.kv_bytes,
        "seconds": {"loading": summary.loading, "making": summary.making},
    }
