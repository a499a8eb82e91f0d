"""Makes one prompt's videos with many settings, side by side, and compares each with the videos without reuse.

Times are those of the denoising: captions are encoded before, frames decoded after. Settings are run in small groups;
each group starts with a new run of the videos that its settings are measured against, so that a machine which
slows down for a minute slows both. Results are kept on disk, so that a long benchmark can be stopped and gone on with.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.adherence import adherence
from benchmarks.common import save_text
from benchmarks.flops import CountingRunner
from benchmarks.quality.sweep import LEAN, ObservationLog, Plan, Probe, Setting, Ticks
from engine.engine import Engine, Submission
from engine.files import atomic_write
from engine.kv.layout import KVSettings
from engine.progress import Progress
from engine.record import Recorder
from engine.request import Request, encode
from models.errors import InputError
from models.magi.pipeline import MagiPipeline
from models.pocket.text import parse_prompt

_T = TypeVar("_T")
IDENTICAL = 100.0  # dB, in place of infinity where two videos do not differ at all
_GROUP = 6  # settings between two runs of what they are compared with
_LADDER_PROMPTS, _CALIBRATION_PROMPTS = 2, 4  # prompts that thresholds are found on


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Latents [1, C, T, h, w] of a whole video and what they cost."""

    latents: Tensor  # on the CPU
    seconds: float
    computed: float  # computed chunk-steps as a share of all
    items: int  # passes through the layers
    flops: int  # of these passes


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One setting on one prompt."""

    setting: Setting  # what was run
    prompt: str
    seed: int  # of the noise
    computed: float  # computed chunk-steps as a share of all
    items: int  # passes through the layers
    tflop: float  # their operations, in 10^12
    work: float  # the same as a share of vanilla
    seconds: float
    decode_seconds: float  # of turning the latents into frames
    plain_seconds: float  # of denoising without reuse, with the same passes and KV, in the same minute
    vanilla_seconds: float  # the same with vanilla
    psnr: float  # of the frames against those without reuse, with the same passes and KV
    ssim: float  # likewise
    latent_error: float  # relative L2, likewise
    psnr_uncompressed: float  # against no reuse and no compression, with the same passes
    psnr_vanilla: float  # against vanilla
    ssim_vanilla: float  # likewise
    colour_right: bool  # the prompt's colour was seen
    motion_right: bool  # the object moves as asked
    whole: bool  # one object of the right shape
    boundary_error: float  # mean jump at chunk boundaries, pixels

    @property
    def case(self) -> tuple[str, int]:
        """What was made: prompt and seed."""
        return self.prompt, self.seed


def image_metrics() -> ModuleType:
    """What frames are compared with; an `InputError` if it is not installed."""
    try:
        return importlib.import_module("torchmetrics.functional.image")
    except ModuleNotFoundError:
        raise InputError("torchmetrics is missing, which compares frames: pip install -e '.[bench]'") from None


def frames_psnr(frames: Tensor, reference: Tensor) -> float:
    """PSNR in dB over all of two videos' frames together, each uint8 [F, H, W, 3]; at most `IDENTICAL`."""
    if frames.equal(reference):
        return IDENTICAL
    psnr = image_metrics().peak_signal_noise_ratio
    return min(IDENTICAL, psnr(_planes(frames), _planes(reference), data_range=255.0).item())


def frames_ssim(frames: Tensor, reference: Tensor) -> float:
    """SSIM, mean over the frames uint8 [F, H, W, 3]; 1 when they are equal."""
    ssim = image_metrics().structural_similarity_index_measure
    return float(ssim(_planes(frames), _planes(reference), data_range=255.0))


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """Relative L2 error of latents."""
    return ((latents - reference).norm() / reference.norm()).item()


def _planes(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2).float()


class TrialRunner:
    """Makes videos with one loaded model."""

    def __init__(self, pipeline: MagiPipeline) -> None:
        self._pipeline = pipeline

    def make(self, setting: Setting, request: Request, recorder: Recorder | None = None) -> Video:
        """Denoise a video."""
        pipeline = self._pipeline
        runner = CountingRunner(pipeline.model, pipeline.attention, pipeline.config.model_config)
        engine = Engine(pipeline, runner, reuse=setting.reuse, kv=KVSettings(budget=setting.budget))
        encoded, computed = encode(pipeline, request), [1.0]

        def watch(progress: Progress) -> None:
            computed[:] = [progress.computed_fraction]

        began = time.perf_counter()
        what = Submission(request=request, encoded=encoded)
        made = (chunk.latents for chunk in engine.generate(what, watch, recorder, decode=False))
        latents = torch.cat([part.cpu() for part in made], dim=2)  # the copy waits for the device
        seconds = time.perf_counter() - began
        return Video(latents=latents, seconds=seconds, computed=computed[0], items=runner.items, flops=runner.flops)

    def observe(self, request: Request) -> Ticks:
        """What policies would see of a video without reuse, tick by tick."""
        log = ObservationLog()
        self.make(Setting(reuse=LEAN), request, log)
        return log.ticks

    def probe(self, requests: Sequence[Request]) -> Probe:
        """What thresholds are found with: the first few of the videos."""
        few, more = requests[:_LADDER_PROMPTS], requests[:_CALIBRATION_PROMPTS]
        vanilla: dict[Request, int] = {}

        def work(setting: Setting) -> float:
            for one in more:
                vanilla[one] = vanilla.get(one) or self.make(Setting(), one).flops
            return statistics.fmean(self.make(setting, one).flops / vanilla[one] for one in more)

        return Probe(
            observe=lambda: [self.observe(one) for one in few],
            computed=lambda setting: statistics.fmean(self.make(setting, one).computed for one in few),
            work=work,
        )

    def decode(self, video: Video) -> Tensor:
        """Frames, uint8 [F, H, W, 3]; chunk by chunk as the engine does it."""
        width = self._pipeline.config.runtime_config.chunk_width
        parts = video.latents.to(self._pipeline.model.kv.device).split(width, dim=2)
        return torch.cat([self._pipeline.autoencoder.decode(part).cpu() for part in parts])

    def trials(self, request: Request, settings: Sequence[Setting]) -> Iterator[Trial]:
        """Run settings on one prompt, group by group; in another order than given."""
        held: dict[Setting, tuple[Video, Tensor]] = {}  # made and decoded once, for the others to be held against

        def again(setting: Setting) -> float:
            video = self.make(setting, request)
            if setting not in held:
                held[setting] = video, self.decode(video)
            return video.seconds

        for plain in dict.fromkeys(setting.plain for setting in settings):
            waiting = iter([setting for setting in settings if setting.plain == plain])
            while group := list(islice(waiting, _GROUP)):
                vanilla_seconds, plain_seconds = again(Setting()), again(plain)
                if Setting(reuse=plain.reuse) not in held:
                    again(Setting(reuse=plain.reuse))
                for setting in group:
                    yield self._trial(request, setting, held, plain_seconds, vanilla_seconds)

    def _trial(
        self,
        request: Request,
        setting: Setting,
        held: Mapping[Setting, tuple[Video, Tensor]],
        plain_seconds: float,
        vanilla_seconds: float,
    ) -> Trial:
        """Run a setting and compare it with the videos without reuse that are held."""
        video, plain = self.make(setting, request), setting.plain
        began = time.perf_counter()
        frames = self.decode(video)
        decode_seconds = time.perf_counter() - began
        (plain_video, plain_frames), (vanilla, vanilla_frames) = held[plain], held[Setting()]
        seen = adherence(frames, parse_prompt(request.prompt))
        return Trial(
            setting=setting,
            prompt=request.prompt,
            seed=request.seed,
            computed=video.computed,
            items=video.items,
            tflop=video.flops / 1e12,
            work=video.flops / vanilla.flops,
            seconds=video.seconds,
            decode_seconds=decode_seconds,
            plain_seconds=plain_seconds,
            vanilla_seconds=vanilla_seconds,
            psnr=frames_psnr(frames, plain_frames),
            ssim=frames_ssim(frames, plain_frames),
            latent_error=latent_error(video.latents, plain_video.latents),
            psnr_uncompressed=frames_psnr(frames, held[Setting(reuse=plain.reuse)][1]),
            psnr_vanilla=frames_psnr(frames, vanilla_frames),
            ssim_vanilla=frames_ssim(frames, vanilla_frames),
            colour_right=seen.colour_right,
            motion_right=seen.motion_right,
            whole=seen.whole,
            boundary_error=statistics.fmean(seen.boundary_errors) if seen.boundary_errors else 0.0,
        )


class Results:
    """The results in one folder: `plan.json` says what is run, `trials.jsonl` has a line for each finished trial.

    Args:
        folder: it is there already.
        run: what the results depend on; results of another run are refused.

    Raises:
        InputError: the folder holds another run, or files that are damaged.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self._plan_file, self._trials_file = folder / "plan.json", folder / "trials.jsonl"
        self.plan: Plan | None = None
        self.trials: list[Trial] = []
        if not self._plan_file.exists():
            return
        (self.plan,) = _read(Plan, self._plan_file, [self._plan_file.read_text()])
        for key in sorted({*self.plan.run, *run}):
            before, now = self.plan.run.get(key), run.get(key)
            if before != now:
                raise InputError(
                    f"{folder} holds results of another run ({key} was {before}, is now {now}): remove it, or choose "
                    "another folder with --out"
                )
        if self._trials_file.exists():
            text = self._trials_file.read_text()
            whole = text[: text.rfind("\n") + 1]  # a last line that was cut off when the run was stopped goes
            if whole != text:
                with atomic_write(self._trials_file) as file:
                    file.write(whole.encode())
            self.trials = _read(Trial, self._trials_file, whole.splitlines())

    def begin(self, plan: Plan) -> None:
        """Note what will be run; older results go."""
        self._trials_file.unlink(missing_ok=True)
        save_text(self._plan_file, json.dumps(asdict(plan), indent=1))
        self.plan, self.trials = plan, []

    def add(self, trial: Trial) -> None:
        """Note a finished trial."""
        with self._trials_file.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        self.trials.append(trial)

    def missing(self, request: Request) -> list[Setting]:
        """Settings that are still to be run on a video."""
        assert self.plan is not None
        done = {one.setting for one in self.trials if one.case == (request.prompt, request.seed)}
        return [setting for setting in self.plan.settings if setting not in done]


def _read(kind: type[_T], path: Path, texts: Sequence[str]) -> list[_T]:
    """What stands in a file; JSON that may hold infinite figures."""
    adapter = TypeAdapter(kind)
    try:
        return [adapter.validate_python(json.loads(text)) for text in texts]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove the folder") from None
