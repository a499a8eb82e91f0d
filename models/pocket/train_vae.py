"""Training of magi-pocket's autoencoder on 12-frame tiles, which is what the tiling decodes at 24 frames per second.

It knows the clips and the autoencoder's class; the DiT is trained on its latents by `train_dit.py`.
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from models.magi.config import VaeConfig
from models.magi.vae import ViTVAE
from models.pocket.clips import draw_background, draw_objects, render
from models.pocket.trainer import Run, Trainer, linear_decay

TILE_FRAMES = 12
POCKET_VAE = VaeConfig(
    video_size=64,
    video_length=12,
    z_chans=16,
    embed_dim=256,
    depth=3,
    num_heads=4,
    qkv_bias=True,
    ln_in_attn=True,
    conv_last_layer=True,
    use_final_proj=True,
)


def new_vae(seed: int) -> ViTVAE:
    """A ViT with small random weights, and a posterior that starts with a deviation of about 0.14."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the biases, which PyTorch draws
        vae = ViTVAE(POCKET_VAE)
    for name, parameter in vae.named_parameters():
        if name.endswith(("cls_token", "pos_embed")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()), generator=generator)
    with torch.no_grad():
        vae.encoder.last_layer.bias[POCKET_VAE.z_chans :] = -4.0
    return vae


def tiles(count: int, generator: torch.Generator) -> Tensor:
    """Clips of one tile's length with 1 to 4 layers of varied shapes, [count, 3, 12, 64, 64] in -1..1."""
    parts = []
    for layers, share in ((1, 0.4), (2, 0.2), (4, 0.4)):
        n = round(count * share)
        objects = draw_objects(n, layers, generator, varied=True)
        parts.append(render(objects, draw_background(n, generator), TILE_FRAMES))
    return torch.cat(parts)


def _reconstruction(decoded: Tensor, video: Tensor) -> tuple[Tensor, float]:
    """Error weighted towards saturated pixels, with that of the change from frame to frame, and the PSNR in dB.

    Without the change, standing still for the four frames of a latent and then jumping costs little.
    """
    saturation = video.amax(1, keepdim=True) - video.amin(1, keepdim=True)
    error = decoded.float() - video
    weight = 1 + 2 * saturation
    psnr = 10 * math.log10(4 / error.detach().square().mean().item())
    change = error.diff(dim=2).square()
    return (weight * (error.square() + 0.1 * error.abs())).mean() + 2 * (weight[:, :, 1:] * change).mean(), psnr


def vae_loss(vae: ViTVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction weighted towards saturated pixels, plus a small pull of the posterior to the normal."""
    moments = vae.encoder(video)
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    reconstruction, psnr = _reconstruction(vae.decoder(mean + noise * torch.exp(0.5 * logvar)), video)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = reconstruction + 3e-5 * kl
    return loss, {"loss": loss.item(), "psnr": psnr, "kl": kl.item()}


def train_vae(run: Run, *, steps: int, batch: int) -> ViTVAE:
    """Train, or go on from the last checkpoint; returns the averaged weights."""
    vae = new_vae(run.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = linear_decay(steps, warmup=30, hold=0.3)
    trainer = Trainer(run, "vae.ckpt", vae, [optimizer], schedule, decay=0.99)

    def step(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        video = tiles(batch, generator)
        noise = torch.randn(batch, POCKET_VAE.z_chans, 3, 8, 8, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return vae_loss(vae, video, noise)

    if run.compiled:
        vae.encoder.compile()
        vae.decoder.compile()
    return trainer.train(steps, step)


@torch.no_grad()
def _encoded_tiles(vae: ViTVAE, generator: torch.Generator, count: int, *, batch: int = 50) -> tuple[Tensor, Tensor]:
    """Tiles of the DiT's clips, uint8 [count, 3, 12, 64, 64], and their latents; a multiple of 50."""
    videos, latents = list[Tensor](), list[Tensor]()
    for _ in range(count // batch):
        objects = draw_objects(batch, 1, generator, varied=False)
        video = render(objects, draw_background(batch, generator), TILE_FRAMES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents.append(vae.encode(video).float())
        videos.append(((video + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(videos), torch.cat(latents)


def polish_decoder(run: Run, vae: ViTVAE, *, steps: int, batch: int, pool: int = 4000) -> ViTVAE:
    """Go on with the decoder alone, on the clips that the DiT makes: one object of the DiT's size and speed.

    The encoder, and with it the latents, stay as they are. Latents get some noise, since the DiT's are not exact.
    """
    polished = deepcopy(vae)
    polished.encoder.requires_grad_(False)
    polished.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(polished.decoder.parameters(), lr=8e-4, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = linear_decay(steps, warmup=50, hold=0.3)
    trainer = Trainer(run, "decoder.ckpt", polished, [optimizer], schedule, decay=0.99, seed=run.seed + 3)
    if run.compiled:
        polished.decoder.compile()

    videos, encoded = _encoded_tiles(vae, torch.Generator().manual_seed(run.seed + 4), pool)
    run.report(f"encoded {pool} tiles")

    def step(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(pool, (batch,), generator=generator)
        video, latents = videos[picked].float() / 127.5 - 1, encoded[picked]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            level = 0.2 * torch.rand(batch, 1, 1, 1, 1, generator=generator)
            noisy = latents + level * torch.randn(latents.shape, generator=generator)
            loss, psnr = _reconstruction(polished.decoder(noisy), video)
        return loss, {"loss": loss.item(), "psnr": psnr}

    return trainer.train(steps, step)
