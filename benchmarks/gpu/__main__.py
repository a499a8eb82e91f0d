"""What one GPU does, by one command: `python -m benchmarks.gpu --out DIR`.

Parts come one after another, the most important first, each kept as soon as it is done. Weights are random and nothing
is downloaded. It runs in a plain checkout with torch, numpy, safetensors, pydantic, typer, rich and matplotlib: what it
imports needs neither PyAV nor Ray nor transformers.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import Cell, Out, Row, new_log, output_folder, run_command
from benchmarks.gpu.bench import TINY, Bench, Part, new_bench, problem
from benchmarks.gpu.checks import conformance, gpu_tests
from benchmarks.gpu.operations import attention, decode, peaks, projection, selection
from benchmarks.gpu.passes import layer, layer_ways, passes
from benchmarks.gpu.report import REPORT, write_report
from benchmarks.gpu.results import Result, Results
from benchmarks.gpu.videos import video
from launch.options import CacheName
from models.attention import available_backends
from models.errors import InputError
from parallel.health.exit_codes import FAILED, OK

_PEAK = 758.0  # TFLOP/s of bf16 products, where the parts take as long as they say
_TINY = 0.03  # share of that time that the smallest preset takes
_INTERRUPTED = 130
_KEPT_EVERY = 2.0  # seconds, of what a part has so far
_CACHES: tuple[CacheName, ...] = ("none", "flowcache-slow", "flowcache-fast", "teacache")


def all_parts(device: str) -> list[Part]:
    """Everything that is measured on a device of this machine, the most important first."""
    (first, *compiled), *others = [_passes(name, device) for name in available_backends()]
    *reuse, last = [_part(f"video-{cache}", 130, partial(video, cache=cache)) for cache in _CACHES]
    return [
        _part("conformance", 55, conformance),
        _part("tests", 50, gpu_tests),
        _part("peaks", 3, peaks),
        _part("attention", 5, attention),
        first,
        *compiled,
        _part("selection", 5, selection),
        _part("decode", 5, decode),
        *reuse,
        _part("layer", 5, layer),
        _part("layer-ways", 40, layer_ways),
        _part("projection", 5, projection),
        *(part for of_backend in others for part in of_backend),
        last,
    ]


def _passes(backend: str, device: str) -> list[Part]:
    """Passes as they are, and compiled, which is for GPUs."""
    parts = [_part(f"pass-{backend}", 30, partial(passes, backend=backend))]
    if device == "cuda":
        parts.append(_part(f"pass-{backend}-compiled", 45, partial(passes, backend=backend, compiled=True)))
    return parts


def _part(name: str, seconds: float, measure: Callable[[Bench], Iterator[Row]]) -> Part:
    said = measure.func if isinstance(measure, partial) else measure
    return Part(name=name, about=said.__doc__ or "", seconds=seconds, measure=measure)


def main(
    out: Out = Path("results/gpu"),
    minutes: Annotated[float, typer.Option(min=0, help="Time for all; what does not fit into it is left out.")] = 9.0,
    preset: Annotated[str, typer.Option(help="A model of `flowcache models`, or tiny.")] = "magi-4.5b-distill",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    only: Annotated[list[str] | None, typer.Option(help="Measure this part; may be given several times.")] = None,
) -> int:
    """Measure what one GPU does, part by part, and report it. The same command goes on with parts that are missing."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the commands, which take a GPU where there is one
    parts = all_parts(device)
    if unknown := set(only or ()) - {part.name for part in parts}:
        raise InputError(f"unknown part {unknown.pop()!r}: choose from {', '.join(part.name for part in parts)}")
    bench = new_bench(preset, device, output_folder(out), minutes=minutes)
    results, log, left_out = Results(out, bench), new_log(), list[str]()
    there = {part.name: results.read(part.name) for part in parts}
    wanted = [part for part in parts if not (result := there[part.name]) or not result.complete]
    wanted = [part for part in wanted if not only or part.name in only]
    try:
        for place, part in enumerate(wanted, 1):
            needed = _needed(part, results)
            log(f"{place} of {len(wanted)}: {part.name}, about {needed:.0f} s, {max(0, bench.left):.0f} s are left")
            if needed > bench.left:
                left_out.append(part.name)
                continue
            _measure(part, results, log)
            write_report(results, parts, left_out, new=part.name)
        status = _status(results, parts)
    except KeyboardInterrupt:
        log("interrupted: the same command goes on with what is missing")
        status = _INTERRUPTED
    write_report(results, parts, left_out)
    typer.echo((out / REPORT).read_text())
    return status


def _needed(part: Part, results: Results) -> float:
    """Seconds that a part is expected to take, on a card as fast as this one is at products."""
    if results.bench.preset == TINY:
        return _TINY * part.seconds
    return part.seconds * max(1.0, _PEAK / (results.peak() or _PEAK))


def _measure(part: Part, results: Results, log: Callable[[str], None]) -> None:
    """Measure a part; its rows are kept as they come, so that nothing is lost with the process."""
    rows, began, bench = list[Row](), time.monotonic(), results.bench
    complete, error, kept = False, "", began

    def keep() -> None:
        seconds = time.monotonic() - began
        results.write(part.name, Result(rows=rows, seconds=seconds, complete=complete, error=error))

    try:
        for row in part.measure(bench):
            rows.append(row)
            log(f"{part.name}: {', '.join(f'{key} {_plain(cell)}' for key, cell in row.items())}")
            if bench.left < 0:
                break
            if time.monotonic() - kept > _KEPT_EVERY:
                keep()
                kept = time.monotonic()
        else:
            complete = True
    except Exception as failed:  # noqa: BLE001 - the time with a GPU is short: the other parts are measured all the same
        log(f"{part.name} failed: {''.join(traceback.format_exception(failed))}")
        error = problem(failed, 400)
    finally:
        keep()
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()


def _status(results: Results, parts: Sequence[Part]) -> int:
    """Whether what was measured is right."""
    for part in parts:
        result = results.read(part.name)
        if result and (result.error or any(row.get("passed") is False for row in result.rows)):
            return FAILED
    return OK


def _plain(cell: Cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    sys.exit(run_command(main, "gpu"))
