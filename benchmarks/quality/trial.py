"""Settings, and one prompt's videos with many of them, side by side, each compared with the videos without reuse.

Times are those of the denoising: captions are encoded before, frames decoded after. Settings are run in small groups;
each group starts with a new run of the videos that its settings are measured against, so that a machine which
slows down for a minute slows both. Results are kept on disk, so that a long benchmark can be stopped and gone on with.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.adherence import adherence, scene_of
from benchmarks.common import save_text
from benchmarks.flops import CountingRunner
from engine.engine import Engine
from engine.kv.layout import KVSettings
from engine.progress import Progress
from engine.request import Request, encode
from engine.reuse.policy import ReuseSettings
from engine.submission import Submission
from models.errors import InputError
from models.magi.pipeline import MagiPipeline

VANILLA, LEAN = ReuseSettings(), ReuseSettings(clean_pass=False, copy_pass=False)
"""No reuse, with the clean and the context-free passes and without them, as the published reuse runs."""
WORK = {"flowcache-slow": 0.53, "flowcache-fast": 0.46}
"""Counted operations of the presets as a share of vanilla's, as in the paper."""
IDENTICAL = 100.0  # dB, in place of infinity where two videos do not differ at all
_GROUP = 6  # settings between two runs of what they are compared with


def label_of(kind: str, extrapolate_from: float) -> str:
    """What stands in for a reused step, as it is called in tables and legends."""
    return kind if extrapolate_from >= 1 else f"{kind}, extrapolate from {extrapolate_from:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to make a video."""

    reuse: ReuseSettings = VANILLA
    budget: int | None = None  # of the KV buffer in chunks; None holds what the model's own range asks for

    @property
    def lean(self) -> bool:
        """Without the clean and the context-free passes."""
        return not self.reuse.clean_pass

    @property
    def reuses(self) -> bool:
        """Whether steps may be reused."""
        return self.reuse.policy != "none"

    @property
    def label(self) -> str:
        """What stands in for a reused step, in words."""
        return label_of(self.reuse.reuse, self.reuse.extrapolate_from)

    @property
    def plain(self) -> Setting:
        """The same passes and KV without reuse."""
        return Setting(reuse=LEAN if self.lean else VANILLA, budget=self.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Latents [1, C, T, h, w] of a whole video and what they cost."""

    latents: Tensor
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
    plain_seconds: float  # of denoising without reuse, with the same passes and KV, in the same minute
    vanilla_seconds: float  # the same with vanilla
    psnr: float  # of the frames against those without reuse, with the same passes and KV
    ssim: float  # likewise
    latent_error: float  # relative L2, likewise
    psnr_uncompressed: float  # against no reuse and no compression, with the same passes
    psnr_vanilla: float  # against vanilla
    colour_right: bool  # the prompt's colour was seen
    motion_right: bool  # the object moves as asked
    whole: bool  # one object of the right shape

    @property
    def case(self) -> tuple[str, int]:
        """What was made: prompt and seed."""
        return self.prompt, self.seed


_TRIAL = TypeAdapter(Trial)


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

    def make(self, setting: Setting, request: Request) -> Video:
        """Denoise a video."""
        pipeline = self._pipeline
        runner = CountingRunner(pipeline.model, pipeline.attention, pipeline.config.model_config)
        engine = Engine(pipeline, runner, reuse=setting.reuse, kv=KVSettings(budget=setting.budget))
        encoded, computed = encode(pipeline, request), [1.0]

        def watch(progress: Progress) -> None:
            computed[:] = [progress.computed_fraction]

        began = time.perf_counter()
        what = Submission(request=request, encoded=encoded)
        latents = torch.cat([chunk.latents for chunk in engine.generate(what, watch, decode=False)], dim=2)
        seconds = time.perf_counter() - began
        return Video(latents=latents, seconds=seconds, computed=computed[0], items=runner.items, flops=runner.flops)

    def decode(self, video: Video) -> Tensor:
        """Frames, uint8 [F, H, W, 3]; chunk by chunk as the engine does it."""
        width = self._pipeline.config.runtime_config.chunk_width
        decode = self._pipeline.autoencoder.stream()
        return torch.cat([decode(part) for part in video.latents.split(width, dim=2)])

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
        frames = self.decode(video)
        (plain_video, plain_frames), (vanilla, vanilla_frames) = held[plain], held[Setting()]
        seen = adherence(frames, scene_of(request.prompt))
        return Trial(
            setting=setting,
            prompt=request.prompt,
            seed=request.seed,
            computed=video.computed,
            items=video.items,
            tflop=video.flops / 1e12,
            work=video.flops / vanilla.flops,
            seconds=video.seconds,
            plain_seconds=plain_seconds,
            vanilla_seconds=vanilla_seconds,
            psnr=frames_psnr(frames, plain_frames),
            ssim=frames_ssim(frames, plain_frames),
            latent_error=latent_error(video.latents, plain_video.latents),
            psnr_uncompressed=frames_psnr(frames, held[Setting(reuse=plain.reuse)][1]),
            psnr_vanilla=frames_psnr(frames, vanilla_frames),
            colour_right=seen.colour_right,
            motion_right=seen.motion_right,
            whole=seen.whole,
        )


class Results:
    """The finished trials of a run, one a line of a file; what stands there is not made again.

    A last line that was cut off when the run was stopped goes. A file that is damaged is an `InputError`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            save_text(path, whole)
        try:
            self.trials = [_TRIAL.validate_json(line) for line in whole.splitlines()]
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): remove it") from None

    def add(self, trial: Trial) -> None:
        """Note a finished trial."""
        with self._path.open("ab") as file:
            file.write(_TRIAL.dump_json(trial) + b"\n")
        self.trials.append(trial)

    def missing(self, settings: Iterable[Setting], request: Request) -> list[Setting]:
        """Settings that are still to be run on a video."""
        done = {one.setting for one in self.trials if one.case == (request.prompt, request.seed)}
        return [setting for setting in settings if setting not in done]
