"""One run of long videos, as a user would have it made, and what was seen while it lasted.

`python -m benchmarks.throughput.measure FOLDER` makes the run that `FOLDER/case.json` says and leaves `run.json`. It is
the program of one process, of the leader that starts its ranks, and of each rank under torchrun.
"""

import gc
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from benchmarks.adherence import adherence, scene_of
from benchmarks.common import commit, machine_line, rss
from benchmarks.workload import POCKET, PROMPT
from engine.files import atomic_write
from engine.machine import settle_heap
from launch.api import opened
from launch.ending import CommandFailed
from launch.generate import Backend, EngineBackend, make_videos
from launch.option_fields import from_values
from launch.options import CacheName, Options
from launch.plan import Plan, plan_requests
from models.errors import InputError
from parallel.cluster import messages
from parallel.cluster.messages import Event
from parallel.health.exit_codes import BAD_INPUT, INTERRUPTED
from parallel.health.processes import descendants
from parallel.mesh import Layout, Mesh

CASE, RUN = "case.json", "run.json"
EVERY = 10  # chunks of all videos between two looks at memory
SHOWN = 5  # chunks of each minute whose frames are measured
_FIGURES = ConfigDict(ser_json_inf_nan="constants")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is made: videos of one length with one setting."""

    model: str = POCKET
    weights: str | None = None
    chunks: int
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    seed: int | None = None
    cache: CacheName | None = None
    clean_pass: bool | None = None
    copy_pass: bool | None = None
    kv_budget: int | None = None
    pp: int = 1
    cp: int = 1
    videos: int = 1  # all in flight at once
    launcher: Literal["local", "torchrun", "ray"] = "local"

    @property
    def name(self) -> str:
        """Of its files, and of its lines in tables."""
        layout = f"pp{self.pp}" + (f"xcp{self.cp}" if self.cp > 1 else "")
        kv = "range" if self.kv_budget is None else f"kv{self.kv_budget}"
        own = "" if self.model == POCKET else f"{self.model}-"
        where = "" if self.launcher == "local" else f"-{self.launcher}"
        seed = "" if self.seed is None else f"-seed{self.seed}"
        reuse = "-".join([self.cache or "default", *(part.replace(" ", "-") for part in self.passes)])
        return f"{own}{self.chunks}-{reuse}-{kv}-{layout}-{self.videos}video{seed}{where}"

    @property
    def passes(self) -> list[str]:
        """What is said of the passes beside the steps, in words."""
        given = {"clean pass": self.clean_pass, "copy pass": self.copy_pass}
        return [f"{'with' if on else 'no'} {what}" for what, on in given.items() if on is not None]

    def plans(self) -> list[Plan]:
        """Plans of the videos; an `InputError` says what cannot be used."""
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "videos"}
        given |= {"concurrency": self.videos, "launcher": "ray" if self.launcher == "ray" else "local"}
        options = from_values(Options, **given, prompts=[PROMPT] * self.videos)
        return plan_requests(options, [Path()] * self.videos)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was read while the videos were made."""

    chunks: int  # made by then, of all videos
    seconds: float  # since the first video's submission
    host_bytes: int  # resident, of this process and those that it has started
    device_bytes: int  # most that this process's GPU has held so far; 0 without one
    kv_bytes: int  # of the leader's buffers, of all videos in flight; what is in host memory counted
    steps: int  # of all chunks of all videos by then
    computed: float  # steps of them that were computed and not reused
    probe: float  # seconds of a fixed computation on the leader's CPU: how fast the machine is at that moment


@dataclass(frozen=True, kw_only=True, config=_FIGURES)
class Minute:
    """How one minute of the first video looks: of its first chunks, or of as many as there are."""

    minute: int  # from 1
    sharpness: float  # mean absolute difference of neighbouring pixels, of 255
    spread: float  # standard deviation of the latents, the mean of its chunks
    colour: float = math.nan  # magi-pocket: share of chunks whose colour is the prompt's; NaN for other models
    direction: float = math.nan  # likewise its motion
    shape: float = math.nan  # mean overlap with the prompt's shape
    position: float = math.nan  # pixels, mean error after a chunk boundary; infinite where no object is seen


@dataclass(frozen=True, kw_only=True, config=_FIGURES)
class Run:
    """What came of a case."""

    case: Case
    frames_per_chunk: int
    video_fps: int  # of the video's own time
    ready: float  # seconds from start to the loaded model
    chunk_seconds: list[list[float]]  # of each video, when each chunk came, since the first submission
    computed: float  # share of the chunk-steps
    decode: float  # seconds of decoding one chunk, measured by itself afterwards; it runs beside the denoising
    busy: list[float]  # share of the time that each stage's ranks were in their layers; empty for one process and Ray
    looks: list[Look]
    minutes: list[Minute] = field(default_factory=list)
    machine: str = ""  # that it was made on, and the software
    commit: str = ""  # of the checkout that made it

    @property
    def seconds(self) -> float:
        """From the first submission to the last chunk."""
        return max(video[-1] for video in self.chunk_seconds)

    @property
    def first_chunk(self) -> float:
        """Seconds from the first submission to the first chunk."""
        return min(video[0] for video in self.chunk_seconds)

    @property
    def fps(self) -> float:
        """Frames made in a second, of all videos."""
        return sum(map(len, self.chunk_seconds)) * self.frames_per_chunk / self.seconds

    def steady(self, first: float, last: float) -> float:
        """Median seconds between two chunks of a video, over a part of its length (0 to 1)."""
        found = []
        for video in self.chunk_seconds:
            gaps = np.diff(video)[: max(1, len(video) - 4)]  # at the end the window empties
            found += list(gaps[int(first * len(gaps)) : max(1, int(last * len(gaps)))])
        return float(np.median(found)) if found else math.nan

    def probe(self, first: float, last: float) -> float:
        """Median seconds of the probe over a part of the length."""
        return float(np.median([look.probe for look in self._looks(first, last)]))

    def work(self, first: float, last: float) -> float:
        """Share of the steps that were computed, over a part of the length."""
        looks = self._looks(first, last)
        return (looks[-1].computed - looks[0].computed) / (looks[-1].steps - looks[0].steps)

    def _looks(self, first: float, last: float) -> list[Look]:
        """Those in a part of the length; all where that has no two."""
        total = self.case.videos * self.case.chunks
        found = [look for look in self.looks if first <= look.chunks / total <= last]
        return found if len(found) > 1 else self.looks


CASES, RUNS = TypeAdapter(Case), TypeAdapter(Run)


class _Probe:
    """Matrix products of the size of magi-pocket's, whose time says what a shared machine gives at the moment."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(384, 256, generator=generator)
        self._wide = torch.randn(256, 1024, generator=generator) / 16
        self._narrow = torch.randn(1024, 256, generator=generator) / 16

    def __call__(self) -> float:
        """The least seconds of three tries, each of some milliseconds."""
        return min(self._try() for _ in range(3))

    def _try(self) -> float:
        began = time.perf_counter()
        for _ in range(2):
            (self._rows @ self._wide).relu_() @ self._narrow
        return time.perf_counter() - began


class _Watch:
    """Takes the events of a run; frames go to a file, since what is measured must not grow by what measures."""

    def __init__(self, plans: list[Plan], folder: Path, root: int) -> None:
        self._file, self._root, self._began = (folder / "frames").open("wb"), root, 0.0
        self._spread: list[float] = []  # of the chunks whose frames are in the file
        self._shape: tuple[int, ...] = ()
        self._probe = _Probe()
        self.chunks: list[list[float]] = [[] for _ in plans]
        self.looks: list[Look] = []
        self.last: NDArray[np.float32] | None = None  # latents of a chunk
        self.computed: list[float] = []
        self._kv: dict[str, int] = {}
        self._steps: dict[str, tuple[int, float]] = {}  # of each video: all, and those computed
        self._per_minute = max(1, round(60 * plans[0].model.config.figures.fps / 24))

    def begin(self) -> None:
        gc.collect()
        gc.freeze()  # a look collects garbage again; to go through what is loaded would take 0.13 s each time
        self._began = time.perf_counter()

    def handle(self, event: Event) -> None:
        """Note what an event brings."""
        match event:
            case messages.VideoFailed():
                raise InputError(event.message)
            case messages.Progressed():
                self._kv[event.video] = event.progress.kv_bytes + event.progress.kv_host_bytes
                steps = event.progress.steps_done
                self._steps[event.video] = steps, steps * event.progress.computed_fraction
            case messages.VideoDone():
                self.computed.append(event.computed)
                self._kv.pop(event.video, None)
            case messages.ChunkMade():
                self._made(event)

    def _made(self, event: messages.ChunkMade) -> None:
        self.chunks[int(event.video)].append(time.perf_counter() - self._began)
        if event.video == "0" and event.index % self._per_minute < SHOWN:
            self._shape = event.frames.shape
            self._file.write(np.ascontiguousarray(event.frames).tobytes())
            self._spread.append(float(np.std(event.latents)))
            self.last = event.latents
        made = sum(map(len, self.chunks))
        if made % EVERY == 0:
            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            host = rss() + sum(map(_resident, ({self._root} | descendants(self._root)) - {os.getpid()}))
            self.looks.append(
                Look(
                    chunks=made,
                    seconds=time.perf_counter() - self._began,
                    host_bytes=host,
                    device_bytes=gpu,
                    kv_bytes=sum(self._kv.values()),
                    steps=sum(steps for steps, _ in self._steps.values()),
                    computed=sum(computed for _, computed in self._steps.values()),
                    probe=self._probe(),
                )
            )

    def minutes(self, pocket: bool) -> list[Minute]:
        """The minutes of the first video."""
        self._file.close()
        frames = np.memmap(self._file.name, np.uint8, "r").reshape(-1, *self._shape)
        chunks = len(self.chunks[0])
        counts = [min(SHOWN, chunks - start) for start in range(0, chunks, self._per_minute)]
        ends = np.cumsum(counts)
        return [
            _minute(number, frames[end - count : end], float(np.mean(self._spread[end - count : end])), pocket)
            for number, (count, end) in enumerate(zip(counts, ends, strict=True), 1)
        ]


def _minute(number: int, chunks: NDArray[np.uint8], spread: float, pocket: bool) -> Minute:
    """Measure some chunks, uint8 [N, F, height, width, 3], with latents of a standard deviation."""
    sharp = float(np.mean([np.abs(np.diff(chunk[::6].astype(np.int16), axis=2)).mean() for chunk in chunks]))
    if not pocket:
        return Minute(minute=number, sharpness=sharp, spread=spread)
    scene, whole = scene_of(PROMPT), torch.from_numpy(np.concatenate(chunks))
    each = [adherence(torch.from_numpy(np.array(chunk)), scene) for chunk in chunks]
    errors = adherence(whole, scene).boundary_errors
    return Minute(
        minute=number,
        sharpness=sharp,
        spread=spread,
        colour=float(np.mean([one.colour_right for one in each])),
        direction=float(np.mean([one.motion_right for one in each])),
        shape=float(np.mean([one.overlap for one in each])),
        position=float(np.mean(errors)) if errors else math.nan,
    )


def _resident(pid: int) -> int:
    """Bytes of another process that no other one shares."""
    try:
        size, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(size) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def make(case: Case, folder: Path) -> Run:
    """Make the videos of a case with files in a folder. A rank that does not lead ends in here."""
    settle_heap()  # as the command line does
    plans, began = case.plans(), time.perf_counter()
    known = plans[0].model.config.figures
    watch = _Watch(plans, folder, os.getppid() if case.launcher == "torchrun" else os.getpid())
    with ExitStack() as stack:
        backend = _backend(plans, stack)
        ready = time.perf_counter() - began
        watch.begin()
        make_videos(backend, [plan.order(str(index)) for index, plan in enumerate(plans)], watch.handle)
    assert watch.last is not None
    seconds = max(video[-1] for video in watch.chunks)
    return Run(
        case=case,
        frames_per_chunk=known.chunk_frames,
        video_fps=known.fps,
        ready=ready,
        chunk_seconds=watch.chunks,
        computed=float(np.mean(watch.computed)),
        decode=_decode_seconds(plans[0], torch.from_numpy(np.array(watch.last))),
        busy=_busy(backend, case.pp, seconds),
        looks=watch.looks,
        minutes=watch.minutes(case.model == POCKET and case.weights is None),
        machine=machine_line(),
        commit=commit(),
    )


def _backend(plans: list[Plan], stack: ExitStack) -> Backend:
    options = plans[0].options
    if options.launcher == "ray":
        from launch.cluster import on_ray

        return stack.enter_context(on_ray(plans))
    return opened(options, stack)


def _busy(backend: Backend, stages: int, seconds: float) -> list[float]:
    counters = backend.counters if isinstance(backend, EngineBackend) else ()
    shares = [[one.busy / seconds for one in counters if one.stage == stage] for stage in range(stages)]
    return [float(np.mean(share)) for share in shares] if counters else []


@torch.no_grad()
def _decode_seconds(plan: Plan, latents: torch.Tensor) -> float:
    """Seconds of decoding a chunk, the least of three times; the model is loaded once more, as ranks are gone."""
    pipeline, found = plan.model.source.lead(Mesh(layout=Layout(), rank=0), plan.model.device), []
    for _ in range(3):
        began = time.perf_counter()
        pipeline.autoencoder.stream()(latents.to(pipeline.model.kv.device)).cpu()
        found.append(time.perf_counter() - began)
    return min(found)


def main(folder: Path) -> int:
    """Make what the folder asks for."""
    try:
        run = make(CASES.validate_json((folder / CASE).read_bytes()), folder)
    except (InputError, CommandFailed) as error:
        sys.stderr.write(f"throughput: error: {error}\n")
        return error.status if isinstance(error, CommandFailed) else BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    with atomic_write(folder / RUN) as file:
        file.write(RUNS.dump_json(run, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
