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
from models.pocket.clips import draw_panoramas, draw_shapes
from models.pocket.trainer import Batch, Figures, Run, Trainer, linear_decay
from models.pocket.words import SPEEDS

TILE_FRAMES = 12
POCKET_VAE = VaeConfig(
    video_size=64,
    video_length=12,
    z_chans=16,
    embed_dim=256,
    depth=4,
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
    """Clips of one tile's length, [count, 3, 12, 64, 64] in -1..1: 1 to 4 layers of varied shapes, and panoramas."""
    sixth = count // 6
    parts = [draw_panoramas(sixth, generator, pace=pace).frames(TILE_FRAMES) for pace in ("", "fast")]
    left = count - 2 * sixth
    for layers, n in ((1, left // 3), (2, left // 6), (4, left - left // 3 - left // 6)):
        parts.append(draw_shapes(n, layers, generator, varied=True).frames(TILE_FRAMES))
    return torch.cat(parts)


def draw_pool(run: Run, count: int) -> Tensor:
    """So many tiles to train on, uint8. They are drawn once: drawing takes longer than a step of the training."""
    generator, batch = torch.Generator(run.device).manual_seed(run.seed), 500
    parts = []
    for first in range(0, count, batch):
        drawn = tiles(min(batch, count - first), generator)
        parts.append(((drawn + 1) * 127.5).round().to(torch.uint8))
    run.report(f"drew {count} tiles")
    return torch.cat(parts)


def _reconstruction(decoded: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """Error weighted towards saturated pixels, with that of the change from frame to frame, and the PSNR in dB."""
    saturation = video.amax(1, keepdim=True) - video.amin(1, keepdim=True)
    error = decoded.float() - video
    weight = 1 + 2 * saturation
    psnr = 10 * torch.log10(4 / error.detach().square().mean())
    still = (weight * (error.square() + 0.1 * error.abs())).mean()
    moving = (weight[:, :, 1:] * (error[:, :, 1:] - error[:, :, :-1]).square()).mean()
    return still + moving, psnr


def vae_loss(vae: ViTVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Figures]:
    """Reconstruction weighted towards saturated pixels, plus a small pull of the posterior to the normal."""
    moments = vae.encoder(video)
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    reconstruction, psnr = _reconstruction(vae.decoder(mean + noise * torch.exp(0.5 * logvar)), video)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = reconstruction + 3e-5 * kl
    return loss, {"loss": loss.detach(), "psnr": psnr, "kl": kl.detach()}


def train_vae(run: Run, *, steps: int, batch: int, pool: int) -> ViTVAE:
    """Train, or go on from the last checkpoint; returns the averaged weights."""
    vae = new_vae(run.seed).to(run.device)
    fused = run.device.type == "cuda"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    schedule = linear_decay(steps, warmup=100, hold=0.3)
    trainer = Trainer(run, "vae.ckpt", vae, [optimizer], schedule, decay=0.998)

    drawn = draw_pool(run, pool)

    def draw(generator: torch.Generator) -> Batch:
        picked = torch.randint(pool, (batch,), generator=generator, device=run.device)
        video = drawn[picked].float() / 127.5 - 1
        noise = torch.randn(batch, POCKET_VAE.z_chans, 3, 8, 8, generator=generator, device=run.device)
        return Batch(kind=None, tensors=(video, noise))

    def loss(drawn: Batch) -> tuple[Tensor, Figures]:
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            return vae_loss(vae, *drawn.tensors)

    if run.compiled:
        vae.encoder.compile()
        vae.decoder.compile()
    return trainer.train(steps, draw, loss)


def polish_decoder(run: Run, vae: ViTVAE, *, steps: int, batch: int) -> ViTVAE:
    """Go on with the decoder alone, on the clips that the DiT makes: objects of the DiT's size and speeds.

    The encoder, and with it the latents, stay as they are. Latents get a little noise, since the DiT's are not exact.
    """
    polished = deepcopy(vae)
    polished.encoder.requires_grad_(False)
    polished.decoder.requires_grad_(True)
    fused = run.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        polished.decoder.parameters(), lr=4e-4, betas=(0.9, 0.98), weight_decay=0.01, fused=fused
    )
    schedule = linear_decay(steps, warmup=50, hold=0.2)
    trainer = Trainer(run, "decoder.ckpt", polished, [optimizer], schedule, decay=0.998, seed=run.seed + 3)
    if run.compiled:
        polished.decoder.compile()

    def draw(generator: torch.Generator) -> Batch:
        pace = list(SPEEDS)[generator.initial_seed() % len(SPEEDS)]
        shapes = draw_shapes(batch // 2, 1, generator, varied=False, pace=pace).frames(TILE_FRAMES)
        video = torch.cat([shapes, draw_panoramas(batch - batch // 2, generator, pace=pace).frames(TILE_FRAMES)])
        noise = torch.randn(batch, POCKET_VAE.z_chans, 3, 8, 8, generator=generator, device=run.device)
        return Batch(kind=None, tensors=(video, noise))

    def loss(drawn: Batch) -> tuple[Tensor, Figures]:
        video, noise = drawn.tensors
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(video).float()
            value, psnr = _reconstruction(polished.decoder(latents + 0.05 * noise), video)
        return value, {"loss": value.detach(), "psnr": psnr}

    return trainer.train(steps, draw, loss)
