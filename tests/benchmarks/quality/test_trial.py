"""Videos with many settings, side by side, on a tiny random model; and how alike videos are, on known values."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.quality.trial import (
    IDENTICAL,
    LEAN,
    Setting,
    TrialRunner,
    frames_psnr,
    frames_ssim,
    image_metrics,
    latent_error,
)
from engine.request import Request
from models.errors import InputError
from tests.benchmarks.quality.test_report import reusing
from tests.engine.tiny import TinyPipeline, tiny_config

CASE = Request(prompt="a red circle moving right", chunks=4, height=64, width=64, num_steps=8, seed=5)
REUSE = reusing(method="flowcache", threshold=0.1, warmup=2)
VELOCITY = reusing(method="flowcache", kind="velocity", threshold=0.1, warmup=2)
SMALL = reusing(method="teacache", threshold=0.1, warmup=2, budget=1)
SETTINGS = [Setting(), Setting(reuse=LEAN), REUSE, VELOCITY, SMALL, Setting(reuse=LEAN, budget=1)]


class Visible(TinyPipeline):
    """The tiny model, with frames that show its latents."""

    def stream(self):
        return self.decode

    def decode(self, latents):
        rgb = (latents[0, :3].permute(1, 2, 3, 0) * 40 + 128).clamp(0, 255).to(torch.uint8)
        return rgb.repeat_interleave(4, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner():
    return TrialRunner(Visible(tiny_config()))


@pytest.fixture(scope="module")
def trials(runner):
    return {one.setting: one for one in runner.trials(CASE, SETTINGS)}


@pytest.mark.slow
def test_every_setting_is_run_once(runner, trials):
    assert set(trials) == set(SETTINGS)
    many = [reusing(method="flowcache", threshold=0.01 * i) for i in range(7)]
    assert [one.setting for one in runner.trials(replace(CASE, chunks=1), many)] == many


def test_without_reuse_nothing_differs_but_what_passes_and_memory_change(trials):
    vanilla, lean, small = (trials[one] for one in (Setting(), Setting(reuse=LEAN), Setting(reuse=LEAN, budget=1)))
    for one in (vanilla, lean, small):
        assert (one.psnr, one.latent_error, one.computed) == (IDENTICAL, 0, 1)
    assert vanilla.psnr_vanilla == vanilla.psnr_uncompressed == IDENTICAL and vanilla.work == 1
    assert lean.psnr_vanilla < IDENTICAL == lean.psnr_uncompressed
    assert small.psnr_uncompressed < IDENTICAL
    assert lean.items == 4 * 8 < vanilla.items and lean.work < 0.95


@pytest.mark.parametrize("setting", [REUSE, VELOCITY, SMALL])
def test_reuse_is_compared_with_the_same_passes_and_memory(runner, trials, setting):
    found = trials[setting]
    made, plain, vanilla = (runner.make(one, CASE) for one in (setting, setting.plain, Setting()))
    frames, plain_frames, vanilla_frames = (runner.decode(one) for one in (made, plain, vanilla))
    uncompressed = runner.decode(runner.make(Setting(reuse=LEAN), CASE))
    assert found.psnr == frames_psnr(frames, plain_frames) < IDENTICAL
    assert found.ssim == pytest.approx(frames_ssim(frames, plain_frames))
    assert found.latent_error == pytest.approx(latent_error(made.latents, plain.latents))
    assert found.psnr_uncompressed == frames_psnr(frames, uncompressed)
    assert found.psnr_vanilla == frames_psnr(frames, vanilla_frames)
    assert found.computed == made.computed < 1 and found.items == made.items == round(made.computed * 4 * 8)
    assert found.work == pytest.approx(made.flops / vanilla.flops) and found.tflop == made.flops / 1e12
    assert min(found.seconds, found.plain_seconds, found.vanilla_seconds) > 0


def noise(seed=0):
    return torch.randint(20, 200, (5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_a_constant_difference_has_the_psnr_of_the_formula():
    frames = noise()
    assert frames_psnr(frames + 5, frames) == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)


def test_psnr_is_over_all_frames_together():
    frames, other = noise(), noise()
    other[0] += 10
    assert frames_psnr(other, frames) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(5), abs=1e-3)


def test_equal_videos_are_as_like_as_can_be():
    frames = noise()
    assert frames_psnr(frames, frames.clone()) == IDENTICAL
    assert frames_ssim(frames, frames.clone()) == pytest.approx(1)
    assert latent_error(frames.float(), frames.float()) == 0


def test_other_noise_has_no_structure_in_common():
    assert frames_ssim(noise(0), noise(1)) < 0.1


def test_latent_error_is_relative():
    reference = torch.full((1, 16, 6, 4, 4), 2.0)
    assert latent_error(reference * 1.1, reference) == pytest.approx(0.1)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[bench\]'"):
        image_metrics()
