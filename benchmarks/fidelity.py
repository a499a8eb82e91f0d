"""How far a video is from another of the same prompt and seed: PSNR and SSIM of frames, relative error of latents.

Plain tensors in, figures out; it knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

__all__ = ["IDENTICAL", "Fidelity", "fidelity", "latent_error"]

IDENTICAL = 100.0  # dB, in place of infinity where two videos do not differ at all


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Likeness of two videos' frames.

    Attributes:
        psnr: dB, over all frames together; at most `IDENTICAL`.
        ssim: mean over the frames, 1 when they are equal.
    """

    psnr: float
    ssim: float


def fidelity(frames: Tensor, reference: Tensor) -> Fidelity:
    """Compare decoded frames, each uint8 [F, H, W, 3]."""
    if frames.equal(reference):
        return Fidelity(psnr=IDENTICAL, ssim=1.0)
    made, wanted = (part.permute(0, 3, 1, 2).float() for part in (frames, reference))
    psnr = peak_signal_noise_ratio(made, wanted, data_range=255.0)
    ssim = structural_similarity_index_measure(made, wanted, data_range=255.0)
    assert isinstance(ssim, Tensor)
    return Fidelity(psnr=min(IDENTICAL, psnr.item()), ssim=ssim.item())


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """Relative L2 error of latents."""
    return ((latents - reference).norm() / reference.norm()).item()
