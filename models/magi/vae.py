"""The ViT autoencoder of MAGI-1: whole videos to latents and back, tile by tile (specification part 1).

`ViTVAE` codes one tile; its parameter names are those of the released checkpoint. `TiledVAE` cuts a video into tiles
that overlap in space, codes each alone, and blends the overlaps (1.6 to 1.8). It knows no ranks and no files.

Shapes: B batch, F T frames, H W pixels, t h w latent frames and cells, z latent channels, L = t*h*w tokens,
E embed_dim. All tiles are [1, channels, time, rows, columns].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import InputError
from models.magi.config import VaeConfig

Size = tuple[int, int, int]
"""Extent in time, rows and columns."""

_MIN_FPS = 16
_OVERLAP = 0.25
_CELLS_AT_ONCE = 1 << 14  # five full tiles at 24 frames per second; bounds the memory


class _Attention(nn.Module):
    """Full attention with normalised q, k *and v*; epsilon is added to the deviation, not to the variance (1.3)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLE: Tensor) -> Tensor:
        qkv = self.qkv(x_BLE).unflatten(-1, (3, self.heads, -1))
        qkv = (qkv - qkv.mean(-1, keepdim=True)) / (qkv.std(-1, keepdim=True, correction=0) + 1e-5)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLE)))


class _Block(nn.Module):
    """No norm in front of the attention: `norm1` of a usual ViT is an identity here and has no parameters."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.attn = _Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x_BLE: Tensor) -> Tensor:
        x_BLE = x_BLE + self.attn(x_BLE)
        return x_BLE + self.mlp(self.norm2(x_BLE))


class _Trunk(nn.Module):
    """What encoder and decoder share: class token, position embedding, blocks, norm."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dim, (t, h, w) = config.embed_dim, config.grid
        self.grid = config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + t * h * w, dim))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Position embedding at another grid: trilinear, in the parameter's dtype (1.4)."""
        if grid == self.grid:
            return self.pos_embed
        native = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 4, 1, 2, 3)
        resized = F.interpolate(native, size=grid, mode="trilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def run_trunk(self, tokens_BLE: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = torch.cat([self.cls_token.expand(tokens_BLE.shape[0], -1, -1), tokens_BLE], dim=1)
        x = x + self._positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Encoder(_Trunk):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        size = (config.patch_length, config.patch_size, config.patch_size)
        patches = nn.Conv3d(config.in_chans, config.embed_dim, kernel_size=size, stride=size)
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.last_layer = nn.Linear(config.embed_dim, 2 * config.z_chans)

    def forward(self, video: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](video)
        grid = (patches.shape[2], patches.shape[3], patches.shape[4])
        x = self.run_trunk(patches.flatten(2).transpose(1, 2), grid)
        return self.last_layer(x)[:, 1:].transpose(1, 2).unflatten(2, grid)


class _Decoder(_Trunk):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        self.patch_values = config.patch_values
        self.proj_in = nn.Linear(config.z_chans, config.embed_dim)
        values = config.patch_length * config.patch_size**2 * config.patch_values[3]
        projected = config.use_final_proj
        self.final_proj = nn.Linear(config.embed_dim, values) if projected else nn.Identity()
        self.final_norm = nn.LayerNorm(values) if projected else nn.Identity()
        self.last_layer = nn.Conv3d(config.patch_values[3], config.in_chans, kernel_size=3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        grid = (latent.shape[2], latent.shape[3], latent.shape[4])
        tokens = self.proj_in(latent.flatten(2).transpose(1, 2))
        x = self.final_norm(self.final_proj(self.run_trunk(tokens, grid)[:, 1:]))
        (t, h, w), (pt, ph, pw, c) = grid, self.patch_values
        x = x.reshape(-1, t, h, w, pt, ph, pw, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return self.last_layer(x.reshape(-1, c, t * pt, h * ph, w * pw))


class ViTVAE(nn.Module):
    """The autoencoder on one tile. Computes in the dtype of its parameters."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.encoder.cls_token.dtype

    def encode(self, video: Tensor) -> Tensor:
        """The posterior mode [B, z, t, h, w] of a video [B, 3, T, H, W] in -1..1 (1.4: inference never samples).

        T is a multiple of the patch length, or 1: an image is coded as equal frames, of which one latent frame is kept.
        """
        image = video.shape[2] == 1
        if image:
            video = video.expand(-1, -1, self.config.patch_length, -1, -1)
        mean = self.encoder(video.to(self.dtype)).chunk(2, dim=1)[0]
        return mean[:, :, :1] if image else mean

    def decode(self, latent: Tensor) -> Tensor:
        """Video [B, 3, 4t, 8h, 8w] of a latent [B, z, t, h, w]; one latent frame gives one frame (1.5)."""
        video = self.decoder(latent.to(self.dtype))
        return video[:, :, :1] if latent.shape[2] == 1 else video


class Tile(NamedTuple):
    """One tile: its place in the grid of tiles, and its part of the input, by time, rows and columns."""

    place: Size
    part: tuple[slice, slice, slice]


def plan_tiles(size: Size, *, tile: Size, stride: Size) -> list[Tile]:
    """Tiles that start every `stride` and are clipped by the border (1.8), in raster order: time, rows, columns.

    Even an input of exactly one tile is cut in two where tiles overlap, as released.
    """
    frames, rows, columns = (range(math.ceil(whole / step)) for whole, step in zip(size, stride, strict=True))
    tiles = []
    for place in itertools.product(frames, rows, columns):
        starts = (at * step for at, step in zip(place, stride, strict=True))
        time, row, column = (slice(a, min(a + n, end)) for a, n, end in zip(starts, tile, size, strict=True))
        tiles.append(Tile(place, (time, row, column)))
    return tiles


class TiledVAE:
    """Encodes prefixes and decodes chunks of any size.

    Args:
        vae: the autoencoder. Its dtype is that of all results; the released one is bf16.
        scale_factor: latents of the sampler are the autoencoder's times this (1.7).
        fps: frames per second; a tile lasts half a second, and at least 8 frames.
        tile_pixels: side of a tile, 256 as released. A smaller one needs less memory and gives other results.

    An `InputError` if there are fewer than 16 frames per second, where a tile would be a single latent frame and the
    decoder would return one frame for four.
    """

    def __init__(self, vae: ViTVAE, *, scale_factor: float, fps: int, tile_pixels: int = 256) -> None:
        time, space = vae.config.patch_length, vae.config.patch_size
        if fps < _MIN_FPS:
            raise InputError(f"fps is {fps}, but the autoencoder needs at least {_MIN_FPS} frames per second")
        if tile_pixels <= 0 or tile_pixels % (4 * space):
            raise InputError(f"tile_pixels is {tile_pixels}, but it must be a positive multiple of {4 * space}")
        self.vae, self.scale_factor = vae, scale_factor
        self._time, self._space = time, space
        frames, step = fps // 2, tile_pixels - int(tile_pixels * _OVERLAP)
        self._pixel_tile: Size = (frames, tile_pixels, tile_pixels)
        self._pixel_stride: Size = (frames, step, step)
        self._latent_tile: Size = (frames // time, tile_pixels // space, tile_pixels // space)
        self._latent_stride: Size = (frames // time, step // space, step // space)

    def at(self, fps: int) -> TiledVAE:
        """The same for videos of so many frames per second."""
        return TiledVAE(self.vae, scale_factor=self.scale_factor, fps=fps, tile_pixels=self._pixel_tile[1])

    def encodable_frames(self, frames: int) -> int:
        """The most frames up to `frames` that `encode` accepts: a last tile of 2 or 3 is too short (1.8)."""
        rest = frames % self._pixel_tile[0]
        return frames - rest + 1 if 1 < rest < self._time else frames

    def encode_grid(self, frames: int, height: int, width: int) -> list[Tile]:
        """Tiles of a video. An `InputError` if the autoencoder cannot encode this size."""
        if frames < 1 or height < 1 or width < 1:
            raise InputError(f"a video of {frames} frames of {height} x {width} pixels cannot be encoded")
        if height % self._space or width % self._space:
            raise InputError(f"height and width must be multiples of {self._space} to be encoded: {height} x {width}")
        if (fits := self.encodable_frames(frames)) != frames:
            raise InputError(
                f"a video of {frames} frames cannot be encoded, since its last tile would be too short: take {fits}"
            )
        return plan_tiles((frames, height, width), tile=self._pixel_tile, stride=self._pixel_stride)

    def decode_grid(self, t: int, h: int, w: int) -> list[Tile]:
        """Tiles of a latent of t frames of h x w cells."""
        return plan_tiles((t, h, w), tile=self._latent_tile, stride=self._latent_stride)

    @torch.no_grad()
    def encode_tile(self, video: Tensor, tile: Tile) -> Tensor:
        """Posterior mode [1, z, t, h, w] of one tile of a uint8 video [F, H, W, 3] on any device, unscaled."""
        pixels = video[tile.part].to(self._device()).permute(3, 0, 1, 2)[None]
        return self.vae.encode((pixels.float() / 127.5 - 1).to(self.vae.dtype))

    @torch.no_grad()
    def decode_tiles(self, latents: Tensor, tiles: Sequence[Tile]) -> list[Tensor]:
        """Pixels [1, 3, f, H, W] around -1..1 of tiles of scaled fp32 latents [1, z, t, h, w] on any device.

        Tiles of one size go through the decoder together, as many as have `_CELLS_AT_ONCE` latent cells.
        """
        parts = [latents[:, :, *tile.part].to(self._device()) for tile in tiles]
        by_size: dict[torch.Size, list[int]] = {}
        for index, part in enumerate(parts):
            by_size.setdefault(part.shape, []).append(index)
        decoded: dict[int, Tensor] = {}
        for size, indices in by_size.items():
            count = max(1, _CELLS_AT_ONCE // math.prod(size[2:]))
            for start in range(0, len(indices), count):
                batch = indices[start : start + count]
                joined = torch.cat([parts[index] for index in batch])
                decoded |= zip(batch, self.vae.decode(joined.float() / self.scale_factor).split(1), strict=True)
        return [decoded[index] for index in range(len(tiles))]

    def merge_latents(self, grid: Sequence[Tile], tiles: Sequence[Tensor]) -> Tensor:
        """Blend encoded tiles, given in the grid's order, into latents [1, z, t, h, w], unscaled.

        Here a tile is blended with neighbours that are blended already, and every product is rounded (1.8).
        """
        return _merge(grid, tiles, tile=self._latent_tile, stride=self._latent_stride, stepwise=True)

    def merge_frames(self, grid: Sequence[Tile], tiles: Sequence[Tensor]) -> Tensor:
        """Blend decoded tiles, given in the grid's order, into pixels [1, 3, F, H, W].

        Here a tile is blended with neighbours as they were decoded, and rounded once per blend (1.8).
        """
        return _merge(grid, tiles, tile=self._pixel_tile, stride=self._pixel_stride, stepwise=False)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents [1, z, t, h, w], times the scale factor, of a video or an image, uint8 [F, H, W, 3] on any device.

        A last tile of 5 to 7 frames loses those after the fourth. An `InputError` if the size cannot be encoded.
        """
        frames, height, width, _ = video.shape
        grid = self.encode_grid(frames, height, width)
        merged = self.merge_latents(grid, [self.encode_tile(video, tile) for tile in grid])
        return merged * self.scale_factor

    def stream(self) -> Callable[[Tensor], Tensor]:
        """As `Autoencoder.stream`; every chunk is decoded alone."""
        return self.decode

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 [F, H, W, 3] of a finished chunk alone, scaled latents [1, z, t, h, w] fp32 on any device.

        A last tile of one latent frame gives one frame.
        """
        t, h, w = latents.shape[2:]
        grid = self.decode_grid(t, h, w)
        merged = self.merge_frames(grid, self.decode_tiles(latents, grid))
        return to_uint8(merged)[0].permute(1, 2, 3, 0).contiguous()

    def _device(self) -> torch.device:
        return self.vae.encoder.cls_token.device


def to_uint8(pixels: Tensor) -> Tensor:
    """-1..1 to 0..255 in the pixels' own dtype, truncated and not rounded (1.6).

    In bf16 the values from 128 on have a spacing of 1, so the roundings of these two operations show; in fp32 they do
    not, and nothing is done to imitate them.
    """
    return (pixels * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)


def _merge(grid: Sequence[Tile], tiles: Sequence[Tensor], *, tile: Size, stride: Size, stepwise: bool) -> Tensor:
    """Blend tiles with those above and to the left of them, crop each to its stride, and join them.

    `stepwise` as in `merge_latents`.
    """
    overlap = tile[1] - stride[1]
    merged: dict[Size, Tensor] = {}
    seen = merged if stepwise else {one.place: part for one, part in zip(grid, tiles, strict=True)}
    for one, part in zip(grid, tiles, strict=True):
        f, i, j = one.place
        for neighbour, dim in (((f, i - 1, j), 3), ((f, i, j - 1), 4)):
            if neighbour in seen:
                part = _blend(seen[neighbour], part, overlap, dim, stepwise=stepwise)
        merged[one.place] = part
    frames, rows, columns = (range(last + 1) for last in grid[-1].place)
    kept = {place: part[:, :, : stride[0], : stride[1], : stride[2]] for place, part in merged.items()}
    lines = [[torch.cat([kept[f, i, j] for j in columns], dim=4) for i in rows] for f in frames]
    return torch.cat([torch.cat(slab, dim=3) for slab in lines], dim=2)


def _blend(a: Tensor, b: Tensor, extent: int, dim: int, *, stepwise: bool) -> Tensor:
    """b with its first lines, at most `extent`, faded in from the last lines of a.

    Products and sum are fp32 and rounded once; stepwise, both products and the sum are rounded.
    """
    extent = min(a.shape[dim], b.shape[dim], extent)
    weight = torch.arange(extent, dtype=torch.float64) / extent
    fade_in, fade_out = (
        w.float().to(b.device).reshape([-1 if axis == dim else 1 for axis in range(b.dim())])
        for w in (weight, 1 - weight)
    )
    old = a.narrow(dim, a.shape[dim] - extent, extent).float() * fade_out
    new = b.narrow(dim, 0, extent).float() * fade_in
    lines = old.to(b.dtype) + new.to(b.dtype) if stepwise else (old + new).to(b.dtype)
    return torch.cat([lines, b.narrow(dim, extent, b.shape[dim] - extent)], dim=dim)
