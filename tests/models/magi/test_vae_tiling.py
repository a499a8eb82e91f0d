"""Tiling against a straightforward reading of specification 1.8: loops over tiles and lines, in place."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import InputError
from models.magi.config import VaeConfig
from models.magi.vae import Size, Tile, TiledVAE, ViTVAE, plan_tiles, to_uint8

SCALE = 0.18215
TILE = 64  # pixels: tiles of 8 x 8 cells that start every 6
CHANNELS = 2


@cache
def small_vae(dtype: torch.dtype = torch.float32) -> ViTVAE:
    """Random weights, large enough that neighbouring tiles differ where they overlap."""
    config = VaeConfig(
        video_size=32,
        video_length=8,
        z_chans=CHANNELS,
        embed_dim=16,
        depth=1,
        num_heads=2,
        qkv_bias=True,
        ln_in_attn=True,
        conv_last_layer=True,
        use_final_proj=True,
    )
    vae = ViTVAE(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in vae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return vae.to(dtype)


def tiled(fps: int = 24, dtype: torch.dtype = torch.float32) -> TiledVAE:
    return TiledVAE(small_vae(dtype), scale_factor=SCALE, fps=fps, tile_pixels=TILE)


def random_video(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames + height + width)
    return torch.randint(256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)


def random_latents(t: int, h: int, w: int) -> Tensor:
    return torch.randn(1, CHANNELS, t, h, w, generator=torch.Generator().manual_seed(t + h + w))


def blend_lines(a: Tensor, b: Tensor, extent: int, dim: int, *, stepwise: bool) -> Tensor:
    b = b.clone()
    extent = min(a.shape[dim], b.shape[dim], extent)
    for i in range(extent):
        old = a.select(dim, a.shape[dim] - extent + i).float() * (1 - i / extent)
        new = b.select(dim, i).float() * (i / extent)
        rounded = old.to(b.dtype) + new.to(b.dtype) if stepwise else (old + new).to(b.dtype)
        b.select(dim, i).copy_(rounded)
    return b


def blended(tiles: list[list[list[Tensor]]], extent: int, keep: tuple[int, int], *, cascade: bool) -> Tensor:
    """Tiles [time][row][column]; with `cascade` neighbours are used as they are after their own blending."""
    slabs = []
    for slab in tiles:
        source = [list(line) for line in slab]
        rows = []
        for i, line in enumerate(slab):
            row = []
            for j, tile in enumerate(line):
                if i > 0:
                    tile = blend_lines(source[i - 1][j], tile, extent, 3, stepwise=cascade)
                if j > 0:
                    tile = blend_lines(source[i][j - 1], tile, extent, 4, stepwise=cascade)
                if cascade:
                    source[i][j] = tile
                row.append(tile[:, :, : keep[0], : keep[1], : keep[1]])
            rows.append(torch.cat(row, 4))
        slabs.append(torch.cat(rows, 3))
    return torch.cat(slabs, 2)


def slow_encode(vae: ViTVAE, video: Tensor, fps: int) -> Tensor:
    pixels = (video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(vae.dtype)
    frames, height, width = pixels.shape[2:]
    step, stride = fps // 2, TILE * 3 // 4
    tiles = [
        [
            [vae.encode(pixels[:, :, f : f + step, y : y + TILE, x : x + TILE]) for x in range(0, width, stride)]
            for y in range(0, height, stride)
        ]
        for f in range(0, frames, step)
    ]
    return blended(tiles, TILE // 32, (step // 4, stride // 8), cascade=True) * SCALE


def slow_decode(vae: ViTVAE, latents: Tensor, fps: int) -> Tensor:
    z = latents / SCALE
    t, h, w = z.shape[2:]
    step, cells, stride = fps // 2 // 4, TILE // 8, TILE // 8 * 3 // 4
    tiles = [
        [
            [vae.decode(z[:, :, f : f + step, y : y + cells, x : x + cells]) for x in range(0, w, stride)]
            for y in range(0, h, stride)
        ]
        for f in range(0, t, step)
    ]
    pixels = blended(tiles, TILE // 4, (step * 4, stride * 8), cascade=False)
    return (pixels * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 3, 0)


CELLS = st.integers(1, 14)  # up to three tiles per side
FPS = st.sampled_from([16, 24, 30])


@settings(max_examples=6, deadline=None)
@given(frames=st.integers(1, 20), h=CELLS, w=CELLS, fps=FPS)
def test_encode_equals_the_plain_reading(frames: int, h: int, w: int, fps: int) -> None:
    tiles = tiled(fps)
    video = random_video(tiles.encodable_frames(frames), 8 * h, 8 * w)
    torch.testing.assert_close(tiles.encode(video), slow_encode(small_vae(), video, fps))


@settings(max_examples=6, deadline=None)
@given(t=st.integers(1, 4), h=CELLS, w=CELLS, fps=FPS)
def test_decode_equals_the_plain_reading(t: int, h: int, w: int, fps: int) -> None:
    latents = random_latents(t, h, w)
    frames = tiled(fps).decode(latents)
    assert frames.dtype == torch.uint8
    difference = frames.int() - slow_decode(small_vae(), latents, fps).int()
    assert difference.abs().max() <= 1  # truncation: one ulp can move a pixel by one
    assert (difference != 0).float().mean() < 1e-3


def test_bf16_is_rounded_where_the_specification_says() -> None:
    """Bitwise: per product when encoding, once per blend when decoding."""
    vae, tiles = small_vae(torch.bfloat16), tiled(dtype=torch.bfloat16)
    video, latents = random_video(12, 112, 120), random_latents(3, 14, 15)
    encoded = tiles.encode(video)
    assert encoded.dtype == torch.bfloat16
    assert torch.equal(encoded, slow_encode(vae, video, 24))
    grid, expected = tiles.decode_grid(3, 14, 15), slow_decode(vae, latents, 24)
    merged = tiles.merge_frames(grid, [tiles.decode_tiles(latents, [tile])[0] for tile in grid])
    assert torch.equal(to_uint8(merged)[0].permute(1, 2, 3, 0), expected)
    together = tiles.decode(latents).int() - expected.int()  # sums of a batch may be taken in another order
    assert together.abs().max() <= 8 and together.abs().float().mean() < 0.25


def test_cascade_on_encode_differs_from_no_cascade() -> None:
    """The two blends are told apart by this input, so the tests above can fail for either."""
    tiles, video = tiled(), random_video(12, 112, 112)
    grid = tiles.encode_grid(12, 112, 112)
    parts = [tiles.encode_tile(video, tile) for tile in grid]
    nested = [[parts[i * 3 : i * 3 + 3] for i in range(3)]]
    plain = blended(nested, TILE // 32, (3, 6), cascade=False)
    assert not torch.allclose(tiles.merge_latents(grid, parts), plain, rtol=1e-3, atol=1e-3)


def test_tiles_can_be_coded_in_any_order() -> None:
    tiles, latents = tiled(), random_latents(4, 9, 10)
    grid = tiles.decode_grid(4, 9, 10)
    backwards = grid[::-1]
    parts = zip(backwards, tiles.decode_tiles(latents, backwards), strict=True)
    done = {tile.place: part for tile, part in parts}
    merged = tiles.merge_frames(grid, [done[tile.place] for tile in grid])
    assert torch.equal(to_uint8(merged)[0].permute(1, 2, 3, 0), tiles.decode(latents))


def test_tiles_of_one_size_are_decoded_together_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, latents = tiled(), random_latents(9, 9, 10)
    expected, seen = tiles.decode(latents), []
    tiles.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    tile = math.prod(size_of(tiles.decode_grid(9, 9, 10)[0]))
    monkeypatch.setattr("models.magi.vae._CELLS_AT_ONCE", 3 * tile + 1)
    assert torch.equal(tiles.decode(latents), expected)
    assert max(shape[0] for shape in seen) > 1 and len(seen) < len(tiles.decode_grid(9, 9, 10))
    assert all(shape[0] == 1 or shape[0] * math.prod(shape[2:]) <= 3 * tile + 1 for shape in seen)
    assert sum(shape[0] for shape in seen) == len(tiles.decode_grid(9, 9, 10))


def size_of(tile: Tile) -> Size:
    time, rows, columns = (part.stop - part.start for part in tile.part)
    return time, rows, columns


@settings(max_examples=50, deadline=None)
@given(size=st.tuples(*[st.integers(1, 900)] * 3))
def test_the_plan_covers_everything_in_raster_order(size: tuple[int, int, int]) -> None:
    tile, stride = (12, 256, 256), (12, 192, 192)
    grid = plan_tiles(size, tile=tile, stride=stride)
    counts = [range(math.ceil(n / s)) for n, s in zip(size, stride, strict=True)]
    assert [part.place for part in grid] == list(itertools.product(*counts))
    for part in grid:
        for cut, at, n, s, whole in zip(part.part, part.place, tile, stride, size, strict=True):
            assert (cut.start, cut.stop) == (at * s, min(at * s + n, whole))
        assert math.prod(size_of(part)) > 0


def test_a_released_tile_is_cut_in_four() -> None:
    """256 x 256 pixels: tiles start every 192, so the second ones are 64 wide (1.8)."""
    released = TiledVAE(small_vae(), scale_factor=SCALE, fps=24)
    grid = released.encode_grid(12, 256, 256)
    assert grid[-1].place == (0, 1, 1)
    assert [size_of(part) for part in grid] == [(12, 256, 256), (12, 256, 64), (12, 64, 256), (12, 64, 64)]
    assert [size_of(part) for part in released.decode_grid(6, 8, 8)] == [(3, 8, 8), (3, 8, 8)]


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (12, 3), (24, 6), (32, 8), (36, 9), (7, 1), (13, 4), (96, 24)])
def test_latents_of_a_video(frames: int, latents: int) -> None:
    assert tiled().encode(random_video(frames, 16, 24)).shape == (1, CHANNELS, latents, 2, 3)


@pytest.mark.parametrize(("latents", "frames"), [(1, 1), (2, 8), (3, 12), (4, 13), (6, 24), (8, 32), (9, 36)])
def test_frames_of_a_latent(latents: int, frames: int) -> None:
    """A last tile of one latent frame gives one frame: a first chunk of 4 gives 13 (part 3)."""
    assert tiled().decode(random_latents(latents, 2, 3)).shape == (frames, 16, 24, 3)


def test_a_size_below_one_tile() -> None:
    released = TiledVAE(small_vae(), scale_factor=SCALE, fps=24)
    latents = released.encode(random_video(24, 64, 64))
    assert latents.shape == (1, CHANNELS, 6, 8, 8)
    assert released.decode(latents).shape == (24, 64, 64, 3)


def test_an_image_is_tiled_like_a_video_of_one_latent_frame() -> None:
    image = random_video(1, 112, 64)
    latent = tiled().encode(image)
    torch.testing.assert_close(latent, tiled().encode(image.repeat(4, 1, 1, 1)))
    assert tiled().decode(latent.float()).shape == image.shape


def test_equal_tiles_stay_equal_across_blends() -> None:
    """Weights of a blend add to one: constant tiles give a constant video."""
    tiles = tiled()
    grid = tiles.decode_grid(6, 20, 15)
    sizes = [size_of(part) for part in grid]
    constant = [torch.full((1, 3, t * 4, h * 8, w * 8), 0.3) for t, h, w in sizes]
    merged = tiles.merge_frames(grid, constant)
    assert merged.shape == (1, 3, 24, 160, 120)
    torch.testing.assert_close(merged, torch.full_like(merged, 0.3))
    grid = tiles.encode_grid(24, 160, 120)
    constant = [torch.full((1, 2, t // 4, h // 8, w // 8), -0.7) for t, h, w in map(size_of, grid)]
    merged = tiles.merge_latents(grid, constant)
    assert merged.shape == (1, 2, 6, 20, 15)
    torch.testing.assert_close(merged, torch.full_like(merged, -0.7))


def test_a_blend_runs_from_the_old_tile_to_the_new_one() -> None:
    """Two columns of tiles with values 0 and 1: the overlap of 16 pixels is the ramp i / 16."""
    tiles = tiled()
    grid = tiles.decode_grid(3, 4, 12)
    parts = [torch.full((1, 3, 12, 32, size_of(part)[2] * 8), float(part.place[2])) for part in grid]
    line = tiles.merge_frames(grid, parts)[0, 0, 0, 0]
    assert line.shape == (96,)
    torch.testing.assert_close(line[:48], torch.zeros(48))
    torch.testing.assert_close(line[48:64], torch.arange(16) / 16)
    torch.testing.assert_close(line[64:], torch.ones(32))


def test_the_scale_factor_is_taken_both_ways() -> None:
    plain = TiledVAE(small_vae(), scale_factor=1.0, fps=24, tile_pixels=TILE)
    video = random_video(12, 32, 32)
    latents = plain.encode(video)
    torch.testing.assert_close(tiled().encode(video), latents * SCALE)
    assert torch.equal(plain.decode(latents), TiledVAE(small_vae(), scale_factor=0.5, fps=24).decode(latents * 0.5))


def test_pixels_are_truncated_in_their_own_dtype() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.6, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 204, 255, 255]
    value = torch.tensor(0.0117)  # 128.99 in fp32; in bf16, where values from 128 on are 1 apart, 129
    assert to_uint8(value).item() == 128
    assert to_uint8(value.bfloat16()).item() == 129


@pytest.mark.parametrize("fps", [0, 7, 8, 15])
def test_too_few_frames_per_second_are_reported(fps: int) -> None:
    with pytest.raises(InputError, match=f"fps is {fps}, but the autoencoder needs at least 16"):
        tiled(fps)


@pytest.mark.parametrize(("frames", "fits"), [(2, 1), (3, 1), (14, 13), (15, 13), (27, 25)])
def test_a_last_tile_that_is_too_short_is_reported(frames: int, fits: int) -> None:
    with pytest.raises(InputError, match=f"a video of {frames} frames cannot be encoded.*: take {fits}"):
        tiled().encode(random_video(frames, 16, 16))
    assert tiled().encodable_frames(frames) == fits


def test_other_sizes_that_cannot_be_encoded_are_reported() -> None:
    with pytest.raises(InputError, match="multiples of 8 to be encoded: 20 x 16"):
        tiled().encode(random_video(12, 20, 16))
    with pytest.raises(InputError, match="0 frames"):
        tiled().encode(random_video(0, 16, 16))
    with pytest.raises(InputError, match="tile_pixels is 100"):
        TiledVAE(small_vae(), scale_factor=SCALE, fps=24, tile_pixels=100)
