"""Training of magi-pocket's DiT on latents of procedural clips.

A training sample is a window as inference has it: chunks a quarter of the steps apart, each of which attends to itself
and to what came before, behind up to twelve finished chunks. In part of the batches only some tokens of the finished
chunks are left, others in each layer and key head, as the compression of the KV leaves them. The module knows latents;
the clips and the autoencoder only when it prepares them.

Shapes: B windows, R chunks of a window, tok tokens per chunk, S = R * tok tokens, H heads, G key heads, d head size,
P paces, N clips of each, K chunks of a clip, L layers, n rows of the finished chunks that are left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.magi.dit import NULL_TEXT_ROWS, MagiDiT
from models.magi.vae import ViTVAE
from models.pocket.clips import WORLD, Panoramas, Shapes, draw_panoramas, draw_shapes
from models.pocket.preset import POCKET_DIT
from models.pocket.text import encode_prompt
from models.pocket.trainer import Figures, Muon, Run, Trainer, linear_decay
from models.pocket.words import COLOURS, MOTIONS, PACES, PANS, RESTS, SHAPES, SPEEDS, Panorama, Scene

CHUNK_FRAMES = 6  # latent
TILE_PIXELS = 12  # frames
WINDOW = 4
CLEAN_T = 0.9999
_TRIAL = 1500  # steps; after twice as many their number can be chosen
_CELL_FRAMES = 4  # frames of a latent frame
_LOG_TURNS = 6.0  # 2 to this turns of a panorama lie at most between older and newer chunks of the past


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """Encoded clips: `chunks` [P, N, K, 16, 6, 8, 8] fp16, and `captions` [P, N, 7, 32]."""

    chunks: Tensor
    captions: Tensor


@torch.no_grad()
def encode_clips(vae: ViTVAE, run: Run, *, count: int, chunks: int) -> Latents:
    """Draw and encode clips, tile by tile as the released tiling does: `count` of each pace, half of them panoramas.

    Panoramas know no rests; there all clips are of objects.
    """
    generator = torch.Generator(run.device).manual_seed(run.seed + 2)
    batch = 50 if run.device.type == "cpu" else 250
    encoded, captions = list[Tensor](), list[Tensor]()
    for pace in PACES:
        for first in range(0, count, batch):
            n = min(batch, count - first)
            panning = 0 if pace == RESTS else n // 2
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
        video = clips.frames(TILE_PIXELS, start=float(tile * TILE_PIXELS))
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


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped attention; `mask` [rows of q, rows of k] says who sees whom.

    On CPUs it is plain matrix products, whose backward is much faster than the fused one's.
    """
    (b, s, h, d), g = q.shape, k.shape[2]
    rows = q.reshape(b, s, g, h // g, d).permute(0, 2, 1, 3, 4).reshape(b, g, -1, d)
    k, v = k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
    mask = None if mask is None else mask.repeat_interleave(h // g, dim=0)
    if q.device.type == "cpu":
        scores = rows @ k.mT * (1 / math.sqrt(d))
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return out.reshape(b, g, s, h // g, d).transpose(1, 2).reshape(b, s, h, d)


def _chunk_mask(chunks: int, tok: int, past: int, device: torch.device) -> Tensor:
    """Whom the tokens of consecutive chunks see: all of the past, and chunks up to their own."""
    chunk = torch.arange(chunks, device=device)[:, None].expand(-1, tok).flatten()
    seen = chunk[:, None] >= chunk[None, :]
    return F.pad(seen, (past, 0), value=True)


class _WindowView:
    """Every chunk of the window attends to itself and to all chunks before it.

    Args:
        clean: finished chunks at the front.
        noisy: chunks after them.
        isolated: the finished chunks see only themselves, as in a clean pass.
        kept: rows of the finished chunks that are left for the others [L, B, n, G]; None for all.
    """

    def __init__(self, clean: int, noisy: int, *, isolated: bool, kept: Tensor | None) -> None:
        self._clean, self._noisy, self._isolated, self._kept = clean, noisy, isolated, kept

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._k, self._v = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        tok = q.shape[1] // (self._clean + self._noisy)
        split = self._clean * tok
        done, going = q[:, :split], q[:, split:]
        past = [self._k[:, :split], self._v[:, :split]]
        parts = list[Tensor]()
        if self._clean and self._isolated:
            apart = [part.unflatten(1, (self._clean, tok)).flatten(0, 1) for part in (done, *past)]
            parts.append(_attention(apart[0], apart[1], apart[2]).unflatten(0, (-1, self._clean)).flatten(1, 2))
        elif self._clean:
            parts.append(_attention(done, past[0], past[1], _chunk_mask(self._clean, tok, 0, q.device)))
        if self._kept is not None:
            index = self._kept[layer][..., None].expand(-1, -1, -1, q.shape[-1])
            past = [part.gather(1, index) for part in past]
        mask = _chunk_mask(self._noisy, tok, past[0].shape[1], q.device)
        k, v = (torch.cat([old, new[:, split:]], dim=1) for old, new in zip(past, (self._k, self._v), strict=True))
        return torch.cat([*parts, _attention(going, k, v, mask)], dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowKind:
    """A state of the window: `clean` finished chunks, then `noisy` ones.

    `share` of the batches are of this kind; of those, the share `drops` has no caption. `kept` chunks' worth of tokens
    is left of the finished chunks; None leaves all.
    """

    share: float
    clean: int
    noisy: int
    batch: int
    drops: float = 0.0
    kept: int | None = None


WINDOW_KINDS = (
    WindowKind(share=0.12, clean=0, noisy=1, batch=128, drops=0.1),
    WindowKind(share=0.05, clean=0, noisy=2, batch=64),
    WindowKind(share=0.04, clean=0, noisy=3, batch=48),
    WindowKind(share=0.09, clean=0, noisy=4, batch=40),
    WindowKind(share=0.22, clean=1, noisy=4, batch=32, drops=0.1),
    WindowKind(share=0.05, clean=2, noisy=4, batch=32),
    WindowKind(share=0.07, clean=4, noisy=4, batch=24),
    WindowKind(share=0.04, clean=8, noisy=4, batch=20),
    WindowKind(share=0.06, clean=12, noisy=4, batch=16),
    WindowKind(share=0.04, clean=6, noisy=4, batch=20, kept=1),
    WindowKind(share=0.06, clean=6, noisy=4, batch=20, kept=2),
    WindowKind(share=0.08, clean=12, noisy=4, batch=16, kept=2),
    WindowKind(share=0.08, clean=12, noisy=4, batch=16, kept=4),
)
REFRESHED = 0.6  # share of the batches whose finished chunks were renewed by a clean pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """What the computation of a batch depends on besides its tensors."""

    clean: int
    noisy: int
    batch: int
    refreshed: bool  # the finished chunks are renewed by a clean pass; else they are as their last step left them
    drop: bool  # no captions
    kept: int | None  # so many chunks' worth of rows of the finished chunks is left; None: all


def choose_branch(host: torch.Generator) -> Branch:
    """A kind of window at random, by its share."""
    shares = torch.tensor([kind.share for kind in WINDOW_KINDS])
    kind = WINDOW_KINDS[int(torch.multinomial(shares, 1, generator=host))]
    refreshed, drop = torch.rand(2, generator=host).tolist()
    return Branch(
        clean=kind.clean,
        noisy=kind.noisy,
        batch=kind.batch,
        refreshed=kind.clean > 0 and refreshed < REFRESHED,
        drop=drop < kind.drops,
        kept=kind.kept,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A batch of windows."""

    x: Tensor  # noisy latents [B, R, 16, 6, h, w]
    t: Tensor  # times [B, R]
    velocity: Tensor  # of the noisy chunks [B, noisy, 16, 6, h, w]
    captions: Tensor  # [B, N, channels]
    distill: Tensor  # step-size constants [B]
    gap: Tensor  # [1], latent frames that passed between the older half of the finished chunks and the rest
    kept: Tensor | None  # rows of the finished chunks that are left [L, B, n, G]; None: all


def window_velocity(dit: MagiDiT, windows: Windows, branch: Branch) -> Tensor:
    """Velocity of all chunks of a batch of windows [B, R, 16, 6, h, w]."""
    x, r = windows.x, branch.clean + branch.noisy
    b, separate = x.shape[0], branch.clean if branch.refreshed else 0
    hidden = dit.patches(x.transpose(1, 2).flatten(2, 3))
    condition = dit.embed_condition(windows.t, distill=None, null=branch.drop)
    condition = condition + dit.t_embedder(windows.distill)[:, None]
    null = dit.null_text().expand(b, -1, -1)
    captions = null if branch.drop else windows.captions
    text = dit.embed_text(torch.cat([null, captions], dim=1) if separate else captions)
    boundary = separate * (hidden.shape[1] // r)

    def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not boundary:
            return _attention(q, k, v)
        rows = NULL_TEXT_ROWS
        seen_null = _attention(q[:, :boundary], k[:, :rows], v[:, :rows])
        return torch.cat([seen_null, _attention(q[:, boundary:], k[:, rows:], v[:, rows:])], dim=1)

    grid = (CHUNK_FRAMES * r, x.shape[-2], x.shape[-1])
    frame = torch.arange(grid[0], dtype=torch.float32, device=x.device)
    time = frame + windows.gap * (frame >= CHUNK_FRAMES * (branch.clean // 2))
    rope = dit.rope.table(time, dit.token_grid(grid)[1:])
    view = _WindowView(branch.clean, branch.noisy, isolated=branch.refreshed, kept=windows.kept)
    out = dit.layers(hidden, dit.gates(condition), dit.text_kv(text), (rope,), view, cross=cross)
    velocity = dit.velocity(out, grid)
    return velocity.unflatten(2, (r, CHUNK_FRAMES)).transpose(1, 2)


def draw_windows(latents: Latents, branch: Branch, generator: torch.Generator) -> Windows:
    """A random batch of one kind of window.

    The position of a chunk on its way from noise is s = (place + u) / 4 with one u for the window, as the schedule has
    it, and t = s^2 / (3 - 2 s^2) (specification 7.2). All clips of a batch have one pace, so that whole turns of the
    world may lie between the older finished chunks and the rest: what was seen long ago is where it was.
    """
    device, b, r = generator.device, branch.batch, branch.clean + branch.noisy

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    paces, count, length = latents.chunks.shape[:3]
    pace = below(paces, 1)  # not a scalar: as an index the host would have to read it
    picked = pace * count + below(count, b)
    places = below(length - r + 1, b)[:, None] + torch.arange(r, device=device)
    clean = latents.chunks.flatten(0, 2)[picked[:, None] * length + places].float()
    noise = torch.randn(clean.shape, generator=generator, device=device)
    if branch.noisy == 1:
        s = rand(b, 1)
    else:
        place = torch.arange(branch.noisy - 1, -1, -1, device=device)
        jitter = 0.05 / WINDOW * torch.randn(b, branch.noisy, generator=generator, device=device)
        s = ((place + rand(b, 1)) / WINDOW + jitter).clamp(0, 1)
    t = s.square() / (3 - 2 * s.square())
    unfinished = 0.6 + 0.39 * rand(b, branch.clean)
    t = torch.cat([torch.full_like(unfinished, CLEAN_T) if branch.refreshed else unfinished, t], dim=1)
    at = t[..., None, None, None, None]
    return Windows(
        x=at * clean + (1 - at) * noise,
        t=t,
        velocity=(clean - noise)[:, branch.clean :],
        captions=latents.captions.flatten(0, 1)[picked],
        distill=2.0 ** below(4, b) * 4,  # half of 8, 16, 32, 64 steps
        gap=_draw_gap(pace, rand) if branch.clean >= 6 else torch.zeros(1, device=device),
        kept=_draw_kept(branch, clean.shape[-2] * clean.shape[-1] // 4 * CHUNK_FRAMES, generator),
    )


def _draw_gap(pace: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    """Latent frames of some whole turns, or of none; clips with rests know no turns."""
    turns = (2 ** (_LOG_TURNS * rand(1))).floor() * (rand(1) < 0.5)
    return turns * _turn_frames(pace.device)[pace]


@cache
def _turn_frames(device: torch.device) -> Tensor:
    """Latent frames of a turn by pace [P]; copied once, since a captured step cannot copy from the host."""
    return torch.tensor([0.0 if pace == RESTS else WORLD / SPEEDS[pace] / _CELL_FRAMES for pace in PACES]).to(device)


def _draw_kept(branch: Branch, tok: int, generator: torch.Generator) -> Tensor | None:
    """Rows that are left [L, B, n, G], ascending. Some chunks lose more than others, in each head others."""
    if branch.kept is None:
        return None
    shape = (POCKET_DIT.num_layers, branch.batch, branch.clean, 1, POCKET_DIT.num_query_groups)
    liking = torch.rand(*shape, generator=generator, device=generator.device)
    each = torch.rand(*shape[:3], tok, shape[-1], generator=generator, device=generator.device)
    scores = (each + liking).flatten(2, 3)
    return scores.topk(branch.kept * tok, dim=2).indices.sort(dim=2).values


def window_loss(dit: MagiDiT, windows: Windows, branch: Branch) -> Tensor:
    """Mean squared error of the velocity over the noisy chunks of a batch of windows."""
    velocity = window_velocity(dit, windows, branch)
    return F.mse_loss(velocity[:, branch.clean :].float(), windows.velocity)


def _optimizers(dit: MagiDiT, run: Run) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in dit.named_parameters():
        if parameter.requires_grad:
            block = name.startswith("videodit_blocks.layers") and parameter.dim() == 2 and "ada_" not in name
            (matrices if block else rest).append(parameter)
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True, capturable=run.captured),
    ]


def train_dit(run: Run, latents: Latents, *, steps: int, until: float | None = None) -> MagiDiT:
    """Train, or go on from the last checkpoint; returns the averaged weights.

    With `until`, a time of the monotonic clock, `steps` is replaced by what fits. They are chosen early, while rates
    are constant, so that a run with that many steps is the same run.
    """
    dit = new_dit(run.seed).to(run.device)
    trainer = Trainer(run, "dit.ckpt", dit, _optimizers(dit, run), _schedule(steps), decay=0.999)
    if run.compiled:
        dit.compile_regions(dynamic=True)  # windows have many sizes

    def loss(branch: Hashable, generator: torch.Generator) -> tuple[Tensor, Figures]:
        assert isinstance(branch, Branch)
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            value = window_loss(dit, draw_windows(latents, branch, generator), branch)
        return value, {"loss": value.detach()}

    if until:
        trainer.train(trainer.step + _TRIAL, choose_branch, loss)  # in which all kinds are seen
        middle = time.monotonic()
        trainer.train(trainer.step + _TRIAL, choose_branch, loss)
        pace = (time.monotonic() - middle) / _TRIAL
        steps = trainer.step + int((until - time.monotonic()) / pace)
        trainer.schedule = _schedule(steps)
        run.report(f"{steps} steps of {1000 * pace:.1f} ms")
    return trainer.train(steps, choose_branch, loss)


def _schedule(steps: int) -> Callable[[int], float]:
    return linear_decay(steps, warmup=100, hold=0.4)
