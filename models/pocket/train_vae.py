"""Training of magi-pocket's autoencoder on 12-frame tiles, which is what the tiling decodes at 24 frames per second.

It knows the clips and the autoencoder's class; the DiT is trained on its latents by `train_dit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from copy import deepcopy

import torch
from torch import Tensor, nn

from models.magi.config import VaeConfig
from models.magi.vae import ViTVAE
from models.pocket.clips import draw_panoramas, draw_shapes
from models.pocket.trainer import Figures, Run, Trainer, linear_decay
from models.pocket.words import PACES, RESTS

TILE_FRAMES = 12
_FLICKER = 0.3  # weight of the absolute error of the change
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


def _reconstruction(decoded: Tensor, video: Tensor) -> tuple[Tensor, Figures]:
    """Error weighted towards saturated pixels, with that of the change from frame to frame, and the PSNR in dB.

    Without the change, standing still for the four frames of a latent and then jumping costs little; without its
    absolute value, a faint flicker of all that should stand still does.
    """
    saturation = video.amax(1, keepdim=True) - video.amin(1, keepdim=True)
    error = decoded.float() - video
    weight = 1 + 2 * saturation
    change = error.diff(dim=2)
    still = (weight * (error.square() + 0.1 * error.abs())).mean()
    moving = (2 * weight[:, :, 1:] * change.square() + _FLICKER * change.abs()).mean()
    figures = {"psnr": 10 * torch.log10(4 / error.detach().square().mean()), "flicker": change.detach().abs().mean()}
    return still + moving, figures


def vae_loss(vae: ViTVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Figures]:
    """Reconstruction weighted towards saturated pixels, plus a small pull of the posterior to the normal."""
    moments = vae.encoder(video)
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    reconstruction, figures = _reconstruction(vae.decoder(mean + noise * torch.exp(0.5 * logvar)), video)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = reconstruction + 3e-5 * kl
    return loss, {"loss": loss.detach(), **figures, "kl": kl.detach()}


def _one_kind(host: torch.Generator) -> None:
    """All batches are of one kind."""


def _optimizer(module: nn.Module, run: Run, rate: float) -> list[torch.optim.Optimizer]:
    parameters, captured = module.parameters(), run.captured
    return [torch.optim.AdamW(parameters, rate, (0.9, 0.98), weight_decay=0.01, fused=True, capturable=captured)]


def _compile(run: Run, *modules: nn.Module) -> None:
    """Compile them where it pays: captured steps are too few to win back a minute."""
    for module in modules if run.compiled and not run.captured else ():
        module.compile()


def train_vae(run: Run, *, steps: int, batch: int, pool: int) -> ViTVAE:
    """Train, or go on from the last checkpoint; returns the averaged weights."""
    vae = new_vae(run.seed).to(run.device)
    schedule = linear_decay(steps, warmup=100, hold=0.3)
    trainer = Trainer(run, "vae.ckpt", vae, _optimizer(vae, run, 1e-3), schedule, decay=0.998)
    drawn = draw_pool(run, pool)

    def loss(kind: Hashable, generator: torch.Generator) -> tuple[Tensor, Figures]:
        picked = torch.randint(pool, (batch,), generator=generator, device=run.device)
        video = drawn[picked].float() / 127.5 - 1
        noise = torch.randn(batch, POCKET_VAE.z_chans, 3, 8, 8, generator=generator, device=run.device)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            return vae_loss(vae, video, noise)

    _compile(run, vae.encoder, vae.decoder)
    return trainer.train(steps, _one_kind, loss)


@torch.no_grad()
def _encoded_tiles(vae: ViTVAE, run: Run, count: int, *, batch: int = 50) -> tuple[Tensor, Tensor]:
    """Tiles of the DiT's clips, uint8 [count, 3, 12, 64, 64], and their latents; a multiple of 100."""
    generator = torch.Generator(run.device).manual_seed(run.seed + 4)
    videos, latents = list[Tensor](), list[Tensor]()
    for place in range(count // (2 * batch)):
        pace = PACES[place % len(PACES)]
        panorama = draw_panoramas(batch, generator, pace="" if pace == RESTS else pace)
        for clips in (draw_shapes(batch, 1, generator, varied=False, pace=pace), panorama):
            video = clips.frames(TILE_FRAMES)
            with torch.autocast(run.device.type, dtype=torch.bfloat16):
                latents.append(vae.encode(video).float())
            videos.append(((video + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(videos), torch.cat(latents)


def polish_decoder(run: Run, vae: ViTVAE, *, steps: int, batch: int, pool: int) -> ViTVAE:
    """Go on with the decoder alone, on the clips that the DiT makes: objects of the DiT's size and speeds, panoramas.

    The encoder, and with it the latents, stay as they are. Latents get some noise, since the DiT's are not exact.
    """
    polished = deepcopy(vae)
    polished.encoder.requires_grad_(False)
    polished.decoder.requires_grad_(True)
    schedule = linear_decay(steps, warmup=50, hold=0.3)
    optimizer = _optimizer(polished.decoder, run, 5e-4)
    trainer = Trainer(run, "decoder.ckpt", polished, optimizer, schedule, decay=0.998, seed=run.seed + 3)
    _compile(run, polished.decoder)
    videos, encoded = _encoded_tiles(vae, run, pool)
    run.report(f"encoded {len(videos)} tiles")

    def loss(kind: Hashable, generator: torch.Generator) -> tuple[Tensor, Figures]:
        picked = torch.randint(len(videos), (batch,), generator=generator, device=run.device)
        level = 0.1 * torch.rand(batch, 1, 1, 1, 1, generator=generator, device=run.device)
        noise = torch.randn(batch, *encoded.shape[1:], generator=generator, device=run.device)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            decoded = polished.decoder(encoded[picked] + level * noise)
        value, figures = _reconstruction(decoded, videos[picked].float() / 127.5 - 1)
        return value, {"loss": value.detach(), **figures}

    return trainer.train(steps, _one_kind, loss)
