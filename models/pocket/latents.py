"""Procedural clips as latents, which the DiT is trained on.

Shapes: P paces, N clips of each, K chunks of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.magi.vae import ViTVAE
from models.pocket.clips import Panoramas, Shapes, draw_panoramas, draw_shapes
from models.pocket.text import encode_prompt
from models.pocket.train_vae import TILE_FRAMES
from models.pocket.trainer import Run
from models.pocket.words import COLOURS, MOTIONS, PACES, PANS, RESTS, SHAPES, Panorama, Scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Encoded clips: `chunks` [P, N, K, 16, 6, 8, 8] fp16, and `captions` [P, N, 7, 32]."""

    chunks: Tensor
    captions: Tensor


@torch.no_grad()
def encode_clips(
    vae: ViTVAE, run: Run, *, count: int, chunks: int, panoramas: float = 0.5, seed: int | None = None
) -> Latents:
    """Draw and encode clips, tile by tile as the released tiling does: `count` of each pace, a share of them panoramas.

    Panoramas know no rests; there all clips are of objects.
    """
    generator = torch.Generator(run.device).manual_seed(run.seed + 2 if seed is None else seed)
    batch = 50 if run.device.type == "cpu" else 250
    encoded, captions = list[Tensor](), list[Tensor]()
    for pace in PACES:
        for first in range(0, count, batch):
            n = min(batch, count - first)
            panning = 0 if pace == RESTS else int(n * panoramas)
            clips: list[Shapes | Panoramas] = [draw_shapes(n - panning, 1, generator, varied=False, pace=pace)]
            if panning:
                clips.append(draw_panoramas(panning, generator, pace=pace))
            for drawn in clips:
                encoded.append(_encode(vae, drawn, chunks))
                captions.append(torch.stack([encode_prompt(prompt) for prompt in _prompts(drawn, pace)]).to(run.device))
        run.report(f"encoded {count} clips of {chunks} chunks, pace {pace or 'usual'}")
    shape = (len(PACES), count)
    return Latents(chunks=torch.cat(encoded).unflatten(0, shape), captions=torch.cat(captions).unflatten(0, shape))


def _encode(vae: ViTVAE, clips: Shapes | Panoramas, chunks: int) -> Tensor:
    """Latents [N, K, 16, 6, 8, 8] fp16."""
    tiles = list[Tensor]()
    for tile in range(2 * chunks):
        video = clips.frames(TILE_FRAMES, start=float(tile * TILE_FRAMES))
        with torch.autocast(video.device.type, dtype=torch.bfloat16):
            tiles.append(vae.encode(video).half())
    return torch.stack([torch.cat(tiles[2 * c : 2 * c + 2], dim=2) for c in range(chunks)], dim=1)


def _prompts(clips: Shapes | Panoramas, pace: str) -> list[str]:
    objects, motions = clips.objects, list(MOTIONS)
    motion = objects.motion[:, 0].tolist()
    if isinstance(clips, Panoramas):
        return [Panorama(motion=PANS[m], pace=pace).prompt for m in motion]
    drawn = zip(objects.colour[:, 0].tolist(), objects.shape[:, 0].tolist(), motion, strict=True)
    return [
        Scene(
            colour=list(COLOURS)[colour],
            shape=SHAPES[shape],
            motion=motions[m],
            pace="" if motions[m] == "still" else pace,
        ).prompt
        for colour, shape, m in drawn
    ]
