"""How far a video is from another of the same prompt and seed: PSNR and SSIM of frames, relative error of latents.

Plain tensors in, figures out; it knows no engine.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

IDENTICAL = 100.0  # dB, in place of infinity where two videos do not differ at all


def frames_psnr(frames: Tensor, reference: Tensor) -> float:
    """PSNR in dB over all of two videos' frames together, each uint8 [F, H, W, 3]; at most `IDENTICAL`."""
    if frames.equal(reference):
        return IDENTICAL
    return min(IDENTICAL, peak_signal_noise_ratio(_planes(frames), _planes(reference), data_range=255.0).item())


def frames_ssim(frames: Tensor, reference: Tensor) -> float:
    """SSIM, mean over the frames uint8 [F, H, W, 3]; 1 when they are equal."""
    found = structural_similarity_index_measure(_planes(frames), _planes(reference), data_range=255.0)
    assert isinstance(found, Tensor)
    return found.item()


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """Relative L2 error of latents."""
    return ((latents - reference).norm() / reference.norm()).item()


def _planes(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2).float()
