"""How fast are very long videos made, what do they take, and what becomes of them?

    python -m benchmarks.throughput --minutes 10                       # one setting
    python -m benchmarks.throughput --minutes 10 --set caches          # none, teacache, flowcache slow and fast
    python -m benchmarks.throughput --minutes 10 --set standard        # reuse and compression x stages x videos
    python -m benchmarks.throughput --minutes 10 --set passes          # without reuse, by what runs beside the steps
    python -m benchmarks.throughput --model magi-4.5b-distill --weights random --minutes 1 --pp 8

Videos are made as `flowcache generate` makes them, decoded, by processes of their own. A run's figures are a JSON file,
which another call with the same `--out` does not make again. Memory is resident memory of all processes that take part,
read every few chunks. Exit status 0 if no long run grows, slows down, changes the bytes of its KV buffers or
loses what magi-pocket was to show, 1 if one does, 2 for bad input.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from benchmarks import common
from benchmarks.common import Out
from benchmarks.throughput.measure import CASE, CASES, RUN, RUNS, Case, Run
from benchmarks.throughput.report import drift, memory_row, minute_rows, name, over_the_length, speed_row, verdicts
from benchmarks.workload import POCKET
from engine.files import atomic_write
from launch.options import CacheName
from models.errors import InputError
from parallel.health.exit_codes import INTERRUPTED

_CHUNKS_PER_MINUTE = 60  # of 24 frames
_NOTES = """\
- frames per second: of all videos together, from the first submission to the last chunk, decoded. speed-up: over the
  first line. chunk s: median seconds between two chunks of a video; early and late: chunks 50 to 150 and 500 to 600 of
  600, or the same parts of another length. work: how much greater the share of computed steps was in the late part than
  in the early one; machine: how much longer a fixed computation took, as others have a share of the processor; late to
  early: late over early, less both. decode s: decoding a chunk, by itself; it runs beside the denoising.
- stages busy: share of the time in the layers. host: memory of all processes, warm after 60 chunks of each video, and
  at the end; growth: the median of the last three looks over it. KV: of the leader.
- Minutes: of the first video, the first 5 chunks of each minute; spread: standard deviation of the latents.
- Drift: the last minute against the first."""


class Which(StrEnum):
    """Which runs are made."""

    ONE = "one"
    CACHES = "caches"
    STANDARD = "standard"
    PASSES = "passes"


def cases(which: Which, base: Case) -> Iterator[Case]:
    """The runs of a set; the first is what the others are compared with."""
    if which is Which.ONE:
        yield base
    elif which is Which.CACHES:
        names: tuple[CacheName, ...] = ("none", "teacache", "flowcache-slow", "flowcache-fast")
        for cache in names:
            yield replace(base, cache=cache)
    elif which is Which.PASSES:
        for clean, copy in ((True, True), (True, False), (False, True), (False, False)):
            yield replace(base, cache="none", clean_pass=clean, copy_pass=copy)
    else:
        for pp in (1, 2):
            for videos in (1, 2):
                yield replace(base, cache="none", kv_budget=None, pp=pp, videos=videos)
                yield replace(base, cache="flowcache-slow", kv_budget=base.kv_budget or 2, pp=pp, videos=videos)


def run(
    minutes: Annotated[float, typer.Option(min=0.05, help="Length of a video; a chunk is a second.")] = 10.0,
    which: Annotated[Which, typer.Option("--set", help="Which runs.")] = Which.ONE,
    model: Annotated[str, typer.Option(help="A name from `flowcache models`.")] = POCKET,
    weights: Annotated[str | None, typer.Option(help="Folder of a released model, or random.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a chunk; the model's own by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first video; the others have those that follow.")] = None,
    cache: Annotated[str | None, typer.Option(help="Reuse preset; the model's own by default.")] = None,
    clean_pass: Annotated[bool | None, typer.Option(help="As of `flowcache generate`.")] = None,
    copy_pass: Annotated[bool | None, typer.Option(help="As of `flowcache generate`.")] = None,
    kv_budget: Annotated[int | None, typer.Option(help="KV budget in chunks; the model's own range without.")] = None,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    cp: Annotated[int, typer.Option(help="Ranks of a stage.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Videos, all in flight at once.")] = 1,
    launcher: Annotated[str, typer.Option(help="local, torchrun or ray.")] = "local",
    out: Out = Path("results/throughput"),
) -> int:
    """Make long videos and say how fast, with what memory, and what they look like in the end."""
    chunks = max(2, round(minutes * _CHUNKS_PER_MINUTE))
    values = {"model": model, "weights": weights, "chunks": chunks, "height": height, "width": width, "steps": steps}
    values |= {"seed": seed, "cache": cache, "clean_pass": clean_pass, "copy_pass": copy_pass, "kv_budget": kv_budget}
    values |= {"pp": pp, "cp": cp, "videos": concurrency, "launcher": launcher}
    try:
        base = CASES.validate_python(values)
    except ValidationError as error:
        raise InputError(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
    wanted = list(cases(which, base))
    for case in wanted:
        case.plans()  # what cannot be made is said before anything is
    common.output_folder(out)
    runs = [_made(case, out) for case in wanted]
    return common.publish(
        out,
        "throughput",
        title="Long videos",
        about=f"{model}, {chunks} chunks. {common.machine_line()}. Commit {common.commit()}.\n\n"
        f"`python -m benchmarks.throughput {' '.join(sys.argv[1:])}`\n\n{_NOTES}",
        verdicts=[verdict for one in runs for verdict in verdicts(one)],
        sections={
            "Speed": [speed_row(one, runs[0]) for one in runs],
            "Memory": [memory_row(one) for one in runs],
            "Drift": [drift(one) for one in runs],
            "Minutes": [row for one in runs for row in minute_rows(one)],
        },
        figures={"throughput": over_the_length(runs)},
    )


def _made(case: Case, out: Path) -> Run:
    """The run of a case: read, if it was made by this commit, or made now."""
    path, log = out / f"{case.name}.json", common.new_log()
    if path.exists():
        try:
            found = RUNS.validate_json(path.read_bytes())
        except ValidationError:
            raise InputError(f"{path} is no run of this benchmark: delete it, or choose another --out") from None
        if (found.case, found.commit) == (case, common.commit()):
            log(f"{name(found)}: taken from {path}")
            return found
    with tempfile.TemporaryDirectory(prefix="throughput-") as temporary:
        folder = Path(temporary)
        (folder / CASE).write_bytes(CASES.dump_json(case))
        log(f"{case.name}: {case.videos} x {case.chunks} chunks ...")
        start = common.torchrun_command(case.pp * case.cp) if case.launcher == "torchrun" else [sys.executable]
        try:
            status = subprocess.run([*start, "-m", "benchmarks.throughput.measure", temporary], check=False).returncode
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        if status:
            raise InputError(f"the run {case.name} ended with status {status}: see above; what was made is in {out}")
        text = (folder / RUN).read_bytes()
    with atomic_write(path) as file:
        file.write(text)
    made = RUNS.validate_json(text)
    log(f"{name(made)}: {made.fps:.1f} frames per second")
    return made


if __name__ == "__main__":
    sys.exit(common.run_command(run, "throughput"))
