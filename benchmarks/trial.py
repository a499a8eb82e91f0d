"""Makes one prompt's videos with many settings, side by side, and compares each with the videos without reuse.

Times are those of the denoising: captions are encoded before, frames decoded after. Settings are run in small groups;
each group starts with a new run of the videos that its settings are measured against, so that a machine which
slows down for a minute slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from benchmarks.adherence import adherence
from benchmarks.fidelity import frames_psnr, frames_ssim, latent_error
from benchmarks.flops import CountingExecutor
from benchmarks.sweep import LEAN, VANILLA, ObservationLog, Setting, Ticks
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.noise import SeededNoise
from engine.progress import Progress
from engine.record import Recorder
from engine.request import Request
from models.magi.pipeline import MagiPipeline
from models.pocket.clips import SIDE
from models.pocket.words import Scene

_GROUP = 6  # settings between two runs of what they are compared with


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A video to make with every setting."""

    scene: Scene
    seed: int
    chunks: int
    num_steps: int

    @property
    def request(self) -> Request:
        """As the engine is asked."""
        return Request(
            prompt=self.scene.prompt,
            chunks=self.chunks,
            height=SIDE,
            width=SIDE,
            num_steps=self.num_steps,
            seed=self.seed,
        )


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
    border_error: float  # mean jump at chunk borders, pixels


class Studio:
    """Makes videos with one loaded model.

    Args:
        pipeline: the model.
    """

    def __init__(self, pipeline: MagiPipeline) -> None:
        self._pipeline = pipeline

    def make(self, setting: Setting, case: Case, trace: Recorder | None = None) -> Video:
        """Denoise a video."""
        pipeline = self._pipeline
        executor = CountingExecutor(LocalExecutor(pipeline.model), pipeline.config.model_config)
        engine = Engine(pipeline, setting.cache, setting.kv, executor)
        captions = pipeline.captions(case.scene.prompt)
        computed = 1.0

        def watch(progress: Progress) -> None:
            nonlocal computed
            computed = progress.computed_fraction

        began = time.perf_counter()
        made = engine.generate_latents(case.request, captions, None, SeededNoise(case.seed), watch, trace)
        latents = torch.cat([part.cpu() for part in made], dim=2)  # the copy waits for the device
        seconds = time.perf_counter() - began
        return Video(latents=latents, seconds=seconds, computed=computed, items=executor.items, flops=executor.flops)

    def observe(self, case: Case) -> Ticks:
        """What policies would see of a video without reuse, tick by tick."""
        log = ObservationLog()
        self.make(Setting(passes=LEAN), case, log)
        return log.ticks

    def decode(self, video: Video) -> Tensor:
        """Frames, uint8 [F, H, W, 3]; chunk by chunk as the engine does it."""
        width = self._pipeline.config.runtime_config.chunk_width
        parts = video.latents.to(self._pipeline.model.kv.device).split(width, dim=2)
        return torch.cat([self._pipeline.autoencoder.decode(part).cpu() for part in parts])

    def trials(self, case: Case, settings: Sequence[Setting]) -> Iterator[Trial]:
        """Run settings on one prompt, group by group; in another order than given."""
        comparison = _Comparison(self, case)
        for plain in dict.fromkeys(setting.plain for setting in settings):
            waiting = iter([setting for setting in settings if setting.plain == plain])
            while group := list(islice(waiting, _GROUP)):
                vanilla_seconds = comparison.time(Setting(passes=VANILLA))
                plain_seconds = comparison.time(plain)
                for setting in group:
                    yield comparison.trial(setting, plain_seconds, vanilla_seconds)


class _Comparison:
    """One prompt's videos without reuse, each made and decoded once and kept for the others to be held against."""

    def __init__(self, studio: Studio, case: Case) -> None:
        self._studio, self._case = studio, case
        self._held: dict[Setting, tuple[Video, Tensor]] = {}

    def time(self, setting: Setting) -> float:
        """Run a setting without reuse anew; the seconds of its denoising."""
        video = self._studio.make(setting, self._case)
        if setting not in self._held:
            self._held[setting] = video, self._studio.decode(video)
        return video.seconds

    def trial(self, setting: Setting, plain_seconds: float, vanilla_seconds: float) -> Trial:
        case, studio = self._case, self._studio
        video = studio.make(setting, case)
        began = time.perf_counter()
        frames = studio.decode(video)
        decode_seconds = time.perf_counter() - began
        plain, plain_frames = self._reference(setting.plain)
        _, uncompressed_frames = self._reference(Setting(passes=setting.passes))
        vanilla, vanilla_frames = self._reference(Setting(passes=VANILLA))
        seen = adherence(frames, case.scene)
        return Trial(
            setting=setting,
            prompt=case.scene.prompt,
            seed=case.seed,
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
            latent_error=latent_error(video.latents, plain.latents),
            psnr_uncompressed=frames_psnr(frames, uncompressed_frames),
            psnr_vanilla=frames_psnr(frames, vanilla_frames),
            ssim_vanilla=frames_ssim(frames, vanilla_frames),
            colour_right=seen.colour_right,
            motion_right=seen.motion_right,
            whole=seen.whole,
            border_error=statistics.fmean(seen.border_errors) if seen.border_errors else 0.0,
        )

    def _reference(self, setting: Setting) -> tuple[Video, Tensor]:
        if setting not in self._held:
            self.time(setting)
        return self._held[setting]
