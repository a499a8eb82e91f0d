"""The ViT autoencoder of MAGI-1: video to latents and back, one tile at a time (specification part 1).

Parameter names are those of the released checkpoint. The module knows nothing of tiling (see `tiling.py`), of latent
normalisation or of files.

Shapes: B batch, T H W frames and pixels, t h w latent frames and cells, L = t*h*w tokens, E embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from models.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class VaeConfig:
    """The `ddconfig` object of the autoencoder's config.json (specification 1.1)."""

    video_size: int = 256
    video_length: int = 16
    patch_size: int = 8
    patch_length: int = 4
    in_chans: int = 3
    z_chans: int = 4
    double_z: bool = True
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    ln_in_attn: bool = False
    conv_last_layer: bool = False
    with_cls_token: bool = True
    norm_code: bool = False
    use_rope: bool = False
    use_final_proj: bool = False
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> VaeConfig:
        """Check a decoded `ddconfig`.

        Raises:
            InputError: a key is unknown or wrong, or names a variant that no released model uses.
        """
        try:
            config = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        needed = {"double_z": True, "ln_in_attn": True, "conv_last_layer": True, "with_cls_token": True}
        needed |= {"norm_code": False, "use_rope": False, "qkv_bias": True}
        for key, value in needed.items():
            if getattr(config, key) is not value:
                raise InputError(f"{source}: {key} must be {value}: no released autoencoder differs")
        return config

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid (t, h, w) that the position embedding was trained at."""
        side = self.video_size // self.patch_size
        return self.video_length // self.patch_length, side, side

    @property
    def patch_values(self) -> tuple[int, int, int, int]:
        """How a decoded token is read: (frames, height, width, channels), channels fastest (1.5)."""
        pixels = self.patch_length * self.patch_size**2
        width = 4 * pixels if self.use_final_proj else self.embed_dim
        return self.patch_length, self.patch_size, self.patch_size, width // pixels


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


class _PatchEmbed(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        size = (config.patch_length, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video)


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
        self.patch_embed = _PatchEmbed(config)
        self.last_layer = nn.Linear(config.embed_dim, 2 * config.z_chans)

    def forward(self, video: Tensor) -> Tensor:
        patches = self.patch_embed(video)
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

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior.

        Args:
            video: [B, 3, T, H, W] in -1..1; T a multiple of the patch length, or 1.

        Returns:
            Two tensors [B, z, t, h, w]; the log-variance is clamped to -30..20.
        """
        image = video.shape[2] == 1
        if image:
            video = video.expand(-1, -1, self.config.patch_length, -1, -1)
        mean, logvar = self.encoder(video.to(self.dtype)).chunk(2, dim=1)
        if image:
            mean, logvar = mean[:, :, :1], logvar[:, :, :1]
        return mean, logvar.clamp(-30, 20)

    def encode(self, video: Tensor) -> Tensor:
        """The posterior mode, [B, z, t, h, w], of a video as in `moments` (1.4: inference never samples)."""
        return self.moments(video)[0]

    def decode(self, latent: Tensor) -> Tensor:
        """Video [B, 3, 4t, 8h, 8w] of a latent [B, z, t, h, w]; one latent frame gives one frame (1.5)."""
        video = self.decoder(latent.to(self.dtype))
        return video[:, :, :1] if latent.shape[2] == 1 else video
