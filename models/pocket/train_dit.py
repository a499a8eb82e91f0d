"""Training of magi-pocket's DiT on latents of procedural clips.

A training sample is a window as inference has it: chunks a quarter of the steps apart, each of which attends to itself
and to what came before, with or without a clean chunk in front. The module knows latents; the clips and the autoencoder
only when it prepares them.

Shapes: B windows, R chunks of a window, S = R * tok tokens, tok tokens per chunk, H heads, G key heads, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.magi.dit import NULL_TEXT_ROWS, MagiDiT
from models.magi.vae import ViTVAE
from models.pocket.clips import draw_background, draw_objects, render
from models.pocket.preset import POCKET_DIT
from models.pocket.text import COLOURS, MOTIONS, SHAPES, Scene, encode_prompt
from models.pocket.trainer import Run, Trainer, linear_decay

CHUNK_FRAMES = 6  # latent
CHUNK_PIXELS = 24  # frames
TILE_PIXELS = 12  # frames
WINDOW = 4
CLEAN_T = 0.9999


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Encoded clips: `chunks` [N, K, 16, 6, 8, 8] fp16, and `captions` [N, 5, 32]."""

    chunks: Tensor
    captions: Tensor


@torch.no_grad()
def encode_clips(vae: ViTVAE, run: Run, *, count: int, chunks: int) -> Latents:
    """Draw `count` clips of one object each and encode them, tile by tile, as the released tiling does."""
    generator = torch.Generator().manual_seed(run.seed + 2)
    words = (list(COLOURS), list(SHAPES), list(MOTIONS))
    encoded, captions = [], []
    batch = 50
    for first in range(0, count, batch):
        objects = draw_objects(batch, 1, generator, varied=False)
        background = draw_background(batch, generator)
        tiles = []
        for tile in range(2 * chunks):
            video = render(objects, background, TILE_PIXELS, start=float(tile * TILE_PIXELS))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tiles.append(vae.encode(video).float())
        pairs = [torch.cat(tiles[2 * c : 2 * c + 2], dim=2) for c in range(chunks)]
        encoded.append(torch.stack(pairs, dim=1).half())
        drawn = zip(objects.colour[:, 0], objects.shape[:, 0], objects.motion[:, 0], strict=True)
        for colour, shape, motion in drawn:
            scene = Scene(colour=words[0][colour], shape=words[1][shape], motion=words[2][motion])
            captions.append(encode_prompt(scene.prompt))
        if (first // batch) % 10 == 9:
            run.report(f"encoded {first + batch}/{count} clips")
    return Latents(chunks=torch.cat(encoded), captions=torch.stack(captions))


def new_dit(seed: int) -> MagiDiT:
    """A DiT with small random weights. A gate of zero would feed zeros into the post-norms, so gates start open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the biases, which PyTorch draws
        dit = MagiDiT(POCKET_DIT)
    for name, parameter in dit.named_parameters():
        if name.endswith("null_caption_embedding"):
            nn.init.normal_(parameter, std=0.5, generator=generator)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()), generator=generator)
    nn.init.zeros_(dit.get_parameter("final_linear.linear.weight"))
    for name, parameter in dit.named_parameters():
        if name.endswith("ada_modulate_layer.proj.0.bias"):
            nn.init.ones_(parameter)
        elif name.endswith("post_norm.weight"):
            nn.init.constant_(parameter, 0.3 - 1)
    dit.rope.requires_grad_(False)
    return dit


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by plain matrix products, whose backward is much faster than the fused one's on CPUs."""
    (b, s, h, d), g = q.shape, k.shape[2]
    rows = q.reshape(b, s, g, h // g, d).permute(0, 2, 3, 1, 4).reshape(b, g, -1, d)
    scores = (rows @ k.permute(0, 2, 3, 1)) * (1 / math.sqrt(d))
    out = scores.softmax(-1).to(v.dtype) @ v.transpose(1, 2)
    return out.reshape(b, g, h // g, s, d).permute(0, 3, 1, 2, 4).reshape(b, s, h, d)


class _WindowView:
    """Every chunk of the window attends to itself and to all chunks before it."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._k, self._v = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        tok = q.shape[1] // self._chunks
        k, v = self._k.to(q.dtype), self._v.to(q.dtype)
        parts = [
            _explicit(q[:, c * tok : (c + 1) * tok], k[:, : (c + 1) * tok], v[:, : (c + 1) * tok])
            for c in range(self._chunks)
        ]
        return torch.cat(parts, dim=1)


def window_velocity(
    dit: MagiDiT, x: Tensor, t: Tensor, captions: Tensor, *, clean: int, distill: Tensor, drop: bool
) -> Tensor:
    """Velocity of all chunks of a batch of windows.

    Args:
        dit: the model.
        x: noisy latents [B, R, 16, 6, h, w].
        t: times [B, R].
        captions: [B, N, channels], seen by all chunks but the clean ones.
        clean: how many chunks at the front are clean and see the null caption.
        distill: step-size constants [B].
        drop: the samples have no caption.

    Returns:
        [B, R, 16, 6, h, w].
    """
    b, r = t.shape
    video = x.transpose(1, 2).flatten(2, 3)
    hidden = dit.patches(video)
    condition = dit.embed_condition(t, distill=None, null=drop) + dit.t_embedder(distill)[:, None]
    null = dit.null_text().expand(b, -1, -1)
    text = dit.embed_text(torch.cat([null, captions], dim=1) if clean else captions)
    grid = (CHUNK_FRAMES * r, x.shape[-2], x.shape[-1])
    boundary = clean * (hidden.shape[1] // r)

    def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)
        if not boundary:
            return _explicit(q, k, v)
        rows = NULL_TEXT_ROWS
        seen_null = _explicit(q[:, :boundary], k[:, :rows], v[:, :rows])
        return torch.cat([seen_null, _explicit(q[:, boundary:], k[:, rows:], v[:, rows:])], dim=1)

    rope = dit.rope.table(torch.arange(grid[0], dtype=torch.float32), dit.token_grid(grid)[1:])
    out = dit.layers(hidden, dit.gates(condition), dit.text_kv(text), (rope,), _WindowView(r), cross=cross)
    velocity = dit.velocity(out, grid)
    return velocity.unflatten(2, (r, CHUNK_FRAMES)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowKind:
    """A state of the window: `clean` finished chunks, then `noisy` ones.

    `share` of the batches are of this kind; of those, the share `drops` has no caption.
    """

    share: float
    clean: int
    noisy: int
    batch: int
    drops: float = 0.0


WINDOW_KINDS = (
    WindowKind(share=0.25, clean=0, noisy=1, batch=64, drops=0.1),
    WindowKind(share=0.10, clean=0, noisy=2, batch=32),
    WindowKind(share=0.08, clean=0, noisy=3, batch=22),
    WindowKind(share=0.14, clean=0, noisy=4, batch=16),
    WindowKind(share=0.37, clean=1, noisy=4, batch=14, drops=0.1),
    WindowKind(share=0.06, clean=2, noisy=3, batch=14),
)


def window_loss(dit: MagiDiT, latents: Latents, kind: WindowKind, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity over the noisy chunks of one batch of windows.

    The position of a chunk on its way from noise is s = (place + u) / 4 with one u for the window, as the schedule has
    it, and t = s^2 / (3 - 2 s^2) (specification 7.2).
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    b, r = kind.batch, kind.clean + kind.noisy
    count, length = latents.chunks.shape[:2]
    picked = torch.randint(count, (b,), generator=generator)
    first = torch.randint(length - r + 1, (b,), generator=generator)
    clean = latents.chunks[picked[:, None], first[:, None] + torch.arange(r)].float()
    noise = torch.randn(clean.shape, generator=generator)
    if kind.noisy == 1:
        s = rand(b, 1)
    else:
        place = torch.arange(kind.noisy - 1, -1, -1)
        jitter = 0.05 / WINDOW * torch.randn(b, kind.noisy, generator=generator)
        s = ((place + rand(b, 1)) / WINDOW + jitter).clamp(0, 1)
    t = s.square() / (3 - 2 * s.square())
    # Finished chunks: refreshed by a clean pass, or (as the published reuse leaves them) as their last step left them.
    refreshed = rand(1) < 0.75
    done = torch.full((b, kind.clean), CLEAN_T) if refreshed else 0.6 + 0.39 * rand(b, kind.clean)
    t = torch.cat([done, t], dim=1)
    at = t[..., None, None, None, None]
    x = at * clean + (1 - at) * noise
    captions = latents.captions[picked]
    drop = kind.drops > 0 and bool(rand(1) < kind.drops)
    if drop:
        captions = dit.null_text().expand(b, -1, -1)
    distill = 2.0 ** torch.randint(2, 6, (b,), generator=generator)  # half of 8, 16, 32, 64 steps
    separate = kind.clean if refreshed else 0
    velocity = window_velocity(dit, x, t, captions, clean=separate, distill=distill, drop=drop)
    return F.mse_loss(velocity[:, kind.clean :].float(), (clean - noise)[:, kind.clean :])


def _optimizers(dit: MagiDiT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in dit.named_parameters():
        if parameter.requires_grad:
            block = name.startswith("videodit_blocks.layers") and parameter.dim() == 2 and "ada_" not in name
            (matrices if block else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_dit(run: Run, latents: Latents, *, steps: int) -> MagiDiT:
    """Train, or go on from the last checkpoint; returns the averaged weights."""
    dit = new_dit(run.seed)
    schedule = linear_decay(steps, warmup=50, hold=0.4)
    trainer = Trainer(run, "dit.ckpt", dit, _optimizers(dit), schedule, decay=0.995)
    shares = torch.tensor([kind.share for kind in WINDOW_KINDS])
    if run.compiled:
        # One graph for each kind of window and layer number; they share their kernels.
        torch._dynamo.config.recompile_limit = 128
        for layer in dit.videodit_blocks.layers.values():
            layer.compile(dynamic=False)

    def step(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        kind = WINDOW_KINDS[int(torch.multinomial(shares, 1, generator=generator))]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = window_loss(dit, latents, kind, generator)
        return loss, {"loss": loss.item()}

    return trainer.train(steps, step)
