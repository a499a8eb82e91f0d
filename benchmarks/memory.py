"""Do long videos take more memory than short ones, or more time per chunk? Measured on magi-pocket.

    python -m benchmarks.memory --chunks 20 600 --kv-budget 2

Each video is made in a process of its own, frames included, which are dropped as they come. Two lengths with a KV
budget are compared, and two without one, where the model's own range bounds what is held. Exit status 0 if KV bytes
are equal, memory grows by less than 2% and a late chunk takes at most 5% longer than an early one; 1 if not; 2 for bad
input.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import common
from benchmarks.common import Out, Row, Verdict, median
from benchmarks.flops import CountingRunner
from benchmarks.workload import PROMPT
from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.machine import settle_heap
from engine.request import Request
from models.checkpoint import Loading
from models.errors import InputError
from models.magi.pipeline import load_pipeline
from models.pocket.clips import SIDE
from models.pocket.preset import pocket_config

_GROWTH, _SLOWER = 1.02, 1.05
_WARM = 10  # chunks after which memory has settled
_NOTES = f"""\
Memory is that of the whole process: warm after {_WARM} chunks (half of a shorter video), at the end, and at most.
Seconds are medians per chunk, decoding included: early from a twelfth to a sixth of the video, late in its last
sixth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongVideo:
    """What making a video took."""

    chunks: int
    budget: int | None  # of the KV buffer in chunks
    kv_bytes: int  # that the KV buffers held, at most
    warm_rss: int  # resident bytes after the first `_WARM` chunks, or half of a shorter video
    end_rss: int  # at the end
    peak_rss: int  # at most
    early: float  # seconds per chunk from a twelfth to a sixth of the video, median, decoding included
    late: float  # the same for the last sixth, without the chunks that are made while the window empties

    @property
    def kv(self) -> str:
        """How much of the past it held, in words."""
        return "own range" if self.budget is None else f"budget {self.budget}"

    @property
    def row(self) -> Row:
        """A line of the table."""
        row: Row = {"chunks": self.chunks, "kv": self.kv}
        sizes = {"kv": self.kv_bytes, "warm": self.warm_rss, "end": self.end_rss, "peak": self.peak_rss}
        row |= {f"{name}_MiB": f"{value / 2**20:.1f}" for name, value in sizes.items()}
        return row | {"early_s": self.early, "late_s": self.late}


def run(
    chunks: Annotated[tuple[int, int], typer.Option(help="Lengths to compare with the budget.")] = (20, 600),
    kv_budget: Annotated[int, typer.Option(min=1, help="KV budget, in chunks.")] = 2,
    own_range: Annotated[tuple[int, int], typer.Option(help="Lengths to compare without a budget.")] = (10, 60),
    out: Out = Path("results/memory"),
) -> int:
    """Make short and long videos and compare what they take."""
    for short, long in (chunks, own_range):
        if not 4 < short < long:
            advice = "give 5 chunks or more, then more than that"
            raise InputError(f"lengths {short} and {long} cannot be compared: {advice}")
    common.output_folder(out)
    videos = [(one, kv_budget) for one in chunks] + [(one, None) for one in own_range]
    threads = torch.get_num_threads()
    made = [common.in_fresh_process(make_long_video, length, budget, threads) for length, budget in videos]
    rows = [one.row for one in made]
    return common.publish(
        out,
        "memory",
        title="Memory of long videos",
        about=f"magi-pocket, {SIDE}x{SIDE} pixels, no reuse. {common.machine_line()}.\n\n{_NOTES}",
        verdicts=[*verdicts(*made[:2]), *verdicts(*made[2:])],
        sections={"Videos": rows},
        data=rows,
    )


def make_long_video(chunks: int, budget: int | None, threads: int) -> LongVideo:
    """Make one video in this process, with a progress bar on standard error."""
    settle_heap()  # as the command line does
    torch.set_num_threads(threads)
    config = pocket_config()
    pipeline = load_pipeline(config, None, Loading())
    runner = CountingRunner(pipeline.model, pipeline.attention, config.model_config)
    engine = Engine(pipeline, runner, kv=KVSettings(budget=budget))
    steps, window = config.runtime_config.num_steps, config.runtime_config.window_size
    request = Request(prompt=PROMPT, chunks=chunks, height=SIDE, width=SIDE, num_steps=steps, seed=0)
    what = f"{chunks} chunks, KV budget {budget or 'of its own range'}"
    seconds, kv_bytes, warm_rss, began = [], 0, 0, time.perf_counter()
    for chunk in common.progress(engine.generate(request), what, chunks):
        seconds.append(time.perf_counter() - began)
        kv_bytes = max(kv_bytes, runner.kv_bytes)
        if chunk.index + 1 == min(_WARM, chunks // 2):
            warm_rss = common.rss()
        began = time.perf_counter()
    return LongVideo(
        chunks=chunks,
        budget=budget,
        kv_bytes=kv_bytes,
        warm_rss=warm_rss,
        end_rss=common.rss(),
        peak_rss=common.peak_rss(),
        early=median(seconds[max(1, chunks // 12) : max(2, chunks // 6)]),
        late=median(seconds[min(chunks * 5 // 6, chunks - window - 1) : chunks - window]),
    )


def verdicts(short: LongVideo, long: LongVideo) -> list[Verdict]:
    """What two lengths of the same setting are held to."""
    pair, own = f"{long.chunks} chunks against {short.chunks}, {long.kv}", f"{long.chunks} chunks, {long.kv}"
    peak, growth, slower = long.peak_rss / short.peak_rss, long.end_rss / long.warm_rss, long.late / long.early
    most, allowed = f"< {_GROWTH - 1:+.0%}", f"<= {_SLOWER - 1:+.0%}"
    held = f"{long.kv_bytes} against {short.kv_bytes}"
    return [
        Verdict(f"{pair}: KV bytes", held, "equal", long.kv_bytes == short.kv_bytes > 0),
        Verdict(f"{pair}: peak memory", f"{peak - 1:+.2%}", most, peak < _GROWTH),
        Verdict(f"{own}: memory at the end against warm", f"{growth - 1:+.2%}", most, growth < _GROWTH),
        Verdict(f"{own}: time of a late chunk against an early one", f"{slower - 1:+.1%}", allowed, slower <= _SLOWER),
    ]


if __name__ == "__main__":
    sys.exit(common.run_command(run, "memory"))
