"""Likeness of videos, against values known by hand."""

import math

import pytest
import torch

from benchmarks.fidelity import IDENTICAL, frames_psnr, frames_ssim, latent_error


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
