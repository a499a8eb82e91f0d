"""Windows as inference has them, which magi-pocket's DiT is trained on: how they are drawn, and what their loss is.

Chunks are a quarter of the steps apart, each attends to itself and to what came before, behind up to twelve finished
chunks. In part of the batches only some tokens of the finished chunks are left, others in each layer and key head, as
the compression of the KV leaves them.

Shapes: B windows, R chunks of a window, tok tokens per chunk, S = R * tok tokens, H heads, G key heads, d head size,
L layers, n rows of the finished chunks that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.magi.dit import NULL_TEXT_ROWS, MagiDiT
from models.pocket.clips import WORLD
from models.pocket.latents import Latents
from models.pocket.preset import POCKET_DIT
from models.pocket.words import PACES, RESTS, SPEEDS
from models.protocols import CELL_FRAMES

CHUNK_FRAMES = 6  # latent
WINDOW = 4
CLEAN_T = 0.9999
_FORMING, _FORMED = (0.15, 0.7), 0.75
"""Where outlines of a first chunk are decided on its way from noise, and the share of its batches drawn from there.

Denoised from s = 0.75 on, true clips keep their shape; from 0.4 on they get as bad as those from noise."""
_MISLED, _MISTAKEN, _SPECKLED = 0.7, 0.6, 0.2
"""Share of the windows with errors; how far they lead towards another clip, or away from it; their noise."""
_LAST_CORRECTED = 0.6  # time until which a chunk is led back from an error of its own: later there is no way left
_GUIDED_T, _GUIDANCE = 0.37, 0.5  # up to which time a first chunk is guided, and how far: the scale, minus 1
_LOG_TURNS = 6.0  # 2 to this turns of a panorama lie at most between older and newer chunks of the past


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
    is left of the finished chunks, single ones or of whole `frames`; None leaves all.
    """

    share: float
    clean: int
    noisy: int
    batch: int
    drops: float = 0.0
    kept: int | None = None
    frames: bool = False


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
REFINED_KINDS = (
    WindowKind(share=0.44, clean=0, noisy=1, batch=32, drops=0.1),
    WindowKind(share=0.06, clean=0, noisy=4, batch=6),
    WindowKind(share=0.16, clean=1, noisy=4, batch=6, drops=0.03),
    WindowKind(share=0.06, clean=4, noisy=4, batch=4),
    WindowKind(share=0.07, clean=12, noisy=4, batch=4),
    WindowKind(share=0.06, clean=12, noisy=4, batch=4, kept=2),
    WindowKind(share=0.05, clean=12, noisy=4, batch=4, kept=4),
    WindowKind(share=0.10, clean=12, noisy=4, batch=4, kept=4, frames=True),
)
"""What a trained model goes on with on a CPU: first chunks above all, whose shapes the others go on with."""
GUIDED_KINDS = (
    WindowKind(share=0.60, clean=0, noisy=1, batch=32),
    WindowKind(share=0.05, clean=0, noisy=4, batch=6),
    WindowKind(share=0.12, clean=1, noisy=4, batch=6),
    WindowKind(share=0.05, clean=4, noisy=4, batch=4),
    WindowKind(share=0.06, clean=12, noisy=4, batch=4),
    WindowKind(share=0.06, clean=12, noisy=4, batch=4, kept=2),
    WindowKind(share=0.06, clean=12, noisy=4, batch=4, kept=4, frames=True),
)
"""What it learns to be guided with: first chunks, and the others so that it forgets nothing of them."""
STEADY_KINDS = (
    WindowKind(share=0.40, clean=0, noisy=1, batch=32),
    WindowKind(share=0.10, clean=0, noisy=4, batch=6),
    WindowKind(share=0.18, clean=1, noisy=4, batch=6),
    WindowKind(share=0.10, clean=4, noisy=4, batch=4),
    WindowKind(share=0.07, clean=12, noisy=4, batch=4),
    WindowKind(share=0.05, clean=12, noisy=4, batch=4, kept=2),
    WindowKind(share=0.05, clean=12, noisy=4, batch=4, kept=4),
    WindowKind(share=0.05, clean=12, noisy=4, batch=4, kept=4, frames=True),
)
"""What it learns with not to go on from errors: windows with a past, and first chunks, which stay as they are."""
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
    frames: bool = False  # which are those of whole frames


def choose_branch(host: torch.Generator, kinds: Sequence[WindowKind] = WINDOW_KINDS) -> Branch:
    """A kind of window at random, by its share."""
    shares = torch.tensor([kind.share for kind in kinds])
    kind = kinds[int(torch.multinomial(shares, 1, generator=host))]
    refreshed, drop = torch.rand(2, generator=host).tolist()
    return Branch(
        clean=kind.clean,
        noisy=kind.noisy,
        batch=kind.batch,
        refreshed=kind.clean > 0 and refreshed < REFRESHED,
        drop=drop < kind.drops,
        kept=kind.kept,
        frames=kind.frames,
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


def draw_windows(latents: Latents, branch: Branch, generator: torch.Generator, *, errors: bool = False) -> Windows:
    """A random batch of one kind of window; with `errors` the chunks have some, and the velocity leads out of them.

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
        low, high = _FORMING
        s = torch.where(rand(b, 1) < _FORMED, low + (high - low) * rand(b, 1), rand(b, 1))
    else:
        place = torch.arange(branch.noisy - 1, -1, -1, device=device)
        jitter = 0.05 / WINDOW * torch.randn(b, branch.noisy, generator=generator, device=device)
        s = ((place + rand(b, 1)) / WINDOW + jitter).clamp(0, 1)
    t = s.square() / (3 - 2 * s.square())
    unfinished = 0.6 + 0.39 * rand(b, branch.clean)
    t = torch.cat([torch.full_like(unfinished, CLEAN_T) if branch.refreshed else unfinished, t], dim=1)
    at = t[..., None, None, None, None]
    velocity = clean - noise
    if errors:
        error = _draw_errors(clean, generator)
        going = torch.arange(r, device=device) >= branch.clean
        corrected = (going & (t < _LAST_CORRECTED))[..., None, None, None, None]
        error = torch.where(corrected, rand(b, 1, 1, 1, 1, 1), 1.0) * error
        clean = clean + error
        velocity = clean - noise - torch.where(corrected, error / (1 - at), 0.0)
    return Windows(
        x=at * clean + (1 - at) * noise,
        t=t,
        velocity=velocity[:, branch.clean :],
        captions=latents.captions.flatten(0, 1)[picked],
        distill=2.0 ** below(4, b) * 4,  # half of 8, 16, 32, 64 steps
        gap=_draw_gap(pace, rand) if branch.clean >= 6 else torch.zeros(1, device=device),
        kept=_draw_kept(branch, clean.shape[-2] * clean.shape[-1] // 4 * CHUNK_FRAMES, generator),
    )


def _draw_errors(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Errors [B, 1, 16, 1, h, w] of windows [B, R, 16, 6, h, w], the same in all their frames, as a video's own are.

    In long videos what stands still, the background above all, becomes more of what it is, chunk by chunk: so an error
    is a step away from the mean picture of another clip, or towards it, and some noise.
    """

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    b, one = clean.shape[0], (1, 1, 1, 1, 1)
    still = clean.mean((1, 3), keepdim=True)
    misled = torch.rand(b, *one, generator=generator, device=generator.device) < _MISLED
    towards = _MISTAKEN * randn(b, *one) * (still.roll(1, 0) - still)
    return misled * (towards + _SPECKLED * randn(b, *one) * randn(*still.shape))


def _draw_gap(pace: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    """Latent frames of some whole turns, or of none; clips with rests know no turns."""
    turns = (2 ** (_LOG_TURNS * rand(1))).floor() * (rand(1) < 0.5)
    return turns * _turn_frames(pace.device)[pace]


@cache
def _turn_frames(device: torch.device) -> Tensor:
    """Latent frames of a turn by pace [P]; copied once, since a captured step cannot copy from the host."""
    return torch.tensor([0.0 if pace == RESTS else WORLD / SPEEDS[pace] / CELL_FRAMES for pace in PACES]).to(device)


def _draw_kept(branch: Branch, tok: int, generator: torch.Generator) -> Tensor | None:
    """Rows that are left [L, B, n, G], ascending."""
    if branch.kept is None:
        return None
    return _draw_frames(branch, tok, generator) if branch.frames else _draw_tokens(branch, tok, generator)


def _draw_tokens(branch: Branch, tok: int, generator: torch.Generator) -> Tensor:
    """Some chunks lose more than others, in each head others."""
    assert branch.kept is not None
    shape = (POCKET_DIT.num_layers, branch.batch, branch.clean, 1, POCKET_DIT.num_query_groups)
    liking = torch.rand(*shape, generator=generator, device=generator.device)
    each = torch.rand(*shape[:3], tok, shape[-1], generator=generator, device=generator.device)
    scores = (each + liking).flatten(2, 3)
    return scores.topk(branch.kept * tok, dim=2).indices.sort(dim=2).values


def _draw_frames(branch: Branch, tok: int, generator: torch.Generator) -> Tensor:
    """Whole frames, about as many of every chunk, and the same in all heads."""
    assert branch.kept is not None
    order = torch.rand(branch.batch, branch.clean, CHUNK_FRAMES, generator=generator, device=generator.device)
    place = order.argsort(-1).float() + torch.rand(order.shape, generator=generator, device=generator.device)
    frames = place.flatten(1).topk(branch.kept * CHUNK_FRAMES, largest=False).indices.sort().values
    inside = torch.arange(tok // CHUNK_FRAMES, device=generator.device)
    rows = (frames[..., None] * len(inside) + inside).flatten(1)
    return rows[None, ..., None].expand(POCKET_DIT.num_layers, -1, -1, POCKET_DIT.num_query_groups)


def window_loss(dit: MagiDiT, windows: Windows, branch: Branch, wanted: Tensor) -> Tensor:
    """Mean squared error of the velocities of the noisy chunks of a batch of windows."""
    velocity = window_velocity(dit, windows, branch)
    return F.mse_loss(velocity[:, branch.clean :].float(), wanted)


@torch.no_grad()
def guided_velocity(dit: MagiDiT, windows: Windows, branch: Branch) -> Tensor:
    """What trained weights make of the noisy chunks of a batch of windows, those that are first chunks guided.

    A first chunk is moved away from what is made of it without its caption, as classifier-free guidance does. Weights
    that learn this do in one pass what guidance does in two ("On Distillation of Guided Diffusion Models", Meng et al.
    2023).
    """
    velocity = window_velocity(dit, windows, branch).float()
    if branch.clean == 0 and branch.noisy == 1:
        without = window_velocity(dit, windows, replace(branch, drop=True)).float()
        early = (windows.t < _GUIDED_T).float()[..., None, None, None, None]
        velocity = velocity + _GUIDANCE * early * (velocity - without)
    return velocity[:, branch.clean :]


@torch.no_grad()
def steady_velocity(dit: MagiDiT, windows: Windows, branch: Branch) -> Tensor:
    """That of the data where there is a past, and elsewhere what trained weights make of the noisy chunks."""
    return windows.velocity if branch.clean else window_velocity(dit, windows, branch).float()
