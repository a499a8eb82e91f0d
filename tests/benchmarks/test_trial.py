"""Videos with many settings, side by side, on a tiny random model."""

from dataclasses import replace

import pytest
import torch

from benchmarks.fidelity import IDENTICAL, frames_psnr, frames_ssim, latent_error
from benchmarks.sweep import LEAN, Setting
from benchmarks.trial import Case, Studio
from models.pocket.words import Scene
from tests.engine.tiny import TinyPipeline, tiny_config

CASE = Case(scene=Scene(colour="red", shape="circle", motion="right"), seed=5, chunks=4, num_steps=8)
REUSE = Setting(method="flowcache", threshold=0.1, warmup=2, passes=LEAN)
VELOCITY = Setting(method="flowcache", kind="velocity", threshold=0.1, warmup=2, passes=LEAN)
SMALL = Setting(method="teacache", threshold=0.1, warmup=2, passes=LEAN, budget=1)
SETTINGS = [Setting(), Setting(passes=LEAN), REUSE, VELOCITY, SMALL, Setting(passes=LEAN, budget=1)]


class Visible(TinyPipeline):
    """The tiny model, with frames that show its latents."""

    def decode(self, latents):
        rgb = (latents[0, :3].permute(1, 2, 3, 0) * 40 + 128).clamp(0, 255).to(torch.uint8)
        return rgb.repeat_interleave(4, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture(scope="module")
def studio():
    return Studio(Visible(tiny_config()))


@pytest.fixture(scope="module")
def trials(studio):
    return {one.setting: one for one in studio.trials(CASE, SETTINGS)}


def test_every_setting_is_run_once(studio, trials):
    assert set(trials) == set(SETTINGS)
    many = [Setting(method="flowcache", threshold=0.01 * i, passes=LEAN) for i in range(7)]
    assert [one.setting for one in studio.trials(replace(CASE, chunks=1), many)] == many


def test_without_reuse_nothing_differs_but_what_passes_and_memory_change(trials):
    vanilla, lean, small = (trials[one] for one in (Setting(), Setting(passes=LEAN), Setting(passes=LEAN, budget=1)))
    for one in (vanilla, lean, small):
        assert (one.psnr, one.latent_error, one.computed) == (IDENTICAL, 0, 1)
    assert vanilla.psnr_vanilla == vanilla.psnr_uncompressed == IDENTICAL and vanilla.work == 1
    assert lean.psnr_vanilla < IDENTICAL == lean.psnr_uncompressed
    assert small.psnr_uncompressed < IDENTICAL
    assert lean.items == 4 * 8 < vanilla.items and lean.work < 0.95


@pytest.mark.parametrize("setting", [REUSE, VELOCITY, SMALL])
def test_reuse_is_compared_with_the_same_passes_and_memory(studio, trials, setting):
    found = trials[setting]
    made, plain, vanilla = (studio.make(one, CASE) for one in (setting, setting.plain, Setting()))
    frames, plain_frames, vanilla_frames = (studio.decode(one) for one in (made, plain, vanilla))
    uncompressed = studio.decode(studio.make(Setting(passes=LEAN), CASE))
    assert found.psnr == frames_psnr(frames, plain_frames) < IDENTICAL
    assert found.ssim == pytest.approx(frames_ssim(frames, plain_frames))
    assert found.latent_error == pytest.approx(latent_error(made.latents, plain.latents))
    assert found.psnr_uncompressed == frames_psnr(frames, uncompressed)
    assert found.psnr_vanilla == frames_psnr(frames, vanilla_frames)
    assert found.computed == made.computed < 1 and found.items == made.items == round(made.computed * 4 * 8)
    assert found.work == pytest.approx(made.flops / vanilla.flops) and found.tflop == made.flops / 1e12
    assert min(found.seconds, found.plain_seconds, found.vanilla_seconds, found.decode_seconds) > 0


def test_what_is_observed_is_every_chunk_step(studio):
    ticks = studio.observe(CASE)
    assert sum(map(len, ticks)) == 4 * 8
    assert all((one.distance is None) == (one.step == 0) for seen in ticks for one in seen)
