"""A loaded MAGI-1: weights, autoencoder and text encoder together, as the engine wants them; or one of random weights.

Nothing here knows ranks or how a video is scheduled.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from models.attention import Attention
from models.checkpoint import Loading
from models.magi.config import MagiConfig, VaeConfig
from models.magi.dit import MagiDiT
from models.magi.folder import dit_folder, find_files
from models.magi.sampling import COPY_WEIGHT, MagiSampling
from models.magi.text import SpecialTokens, T5Encoder, T5Loading
from models.magi.vae import TiledVAE, ViTVAE
from models.magi.weights import Checkpoint, empty_dit
from models.pocket.text import PocketEncoder
from models.protocols import Autoencoder, CaptionTable
from models.random_weights import RandomEncoder, fill_random, normal
from models.text import TextEncoder

_TEXT = T5Loading()
# The released autoencoder (specification 1.1).
_RELEASED_VAE = VaeConfig(
    z_chans=16, embed_dim=1024, depth=24, num_heads=16, qkv_bias=True, ln_in_attn=True, conv_last_layer=True
)  # fmt: skip
_GAIN = 0.3 - 1  # of the norms behind attention and MLP, which have an offset of one: layers then change a little each


class MagiPipeline:
    """A `Pipeline`: a DiT with what turns prompts into captions (`tokens`: the special ones, `text`: which of them) and
    latents into frames; `copy_weight` as in `MagiSampling`.

    Without an encoder captions are brought, and without an autoencoder a video ends with latents.
    """

    def __init__(
        self,
        config: MagiConfig,
        model: MagiDiT,
        autoencoder: Autoencoder | None = None,
        encoder: TextEncoder | None = None,
        *,
        tokens: SpecialTokens | None = None,
        text: T5Loading = _TEXT,
        copy_weight: float = COPY_WEIGHT,
    ) -> None:
        self.config, self.model = config, model
        self._autoencoder, self._encoder, self._copy_weight = autoencoder, encoder, copy_weight
        self._counters = None if tokens is None else tokens.counter_rows(text.special)
        self._null = model.null_text() if tokens is None or not text.negative else tokens.negative(model.null_text())

    @property
    def autoencoder(self) -> Autoencoder:
        assert self._autoencoder is not None
        return self._autoencoder

    @property
    def attention(self) -> Attention:
        return self.model.attention

    def see(self, image: Tensor) -> None:
        """Nothing: a video goes on from the latents of an image."""

    def sampling(
        self, num_steps: int, *, clean_pass: bool = True, copy_pass: bool = True, given: int = 0, ends: int = 0
    ) -> MagiSampling:
        """How to denoise with that many steps, with or without the passes that reuse may leave out."""
        return MagiSampling(
            config=self.config,
            num_steps=num_steps,
            clean_pass=clean_pass,
            copy_pass=copy_pass,
            copy_weight=self._copy_weight,
        )

    def captions(self, prompt: str) -> CaptionTable:
        """Encode a prompt; an `InputError` if the encoder cannot take it."""
        assert self._encoder is not None
        text = self._encoder.encode(prompt)
        length = self.config.model_config.caption_max_length
        table = CaptionTable(text=text, null=self._null, counters=self._counters, max_length=length)
        return table.to(self.model.device)

    def variant(self, *, fps: int | None, negative: str | None) -> MagiPipeline:
        """As `Adjustable`: the autoencoder's tiles follow the frame rate. It reads no text of what is not wanted."""
        made = copy(self)
        if fps is not None and isinstance(self._autoencoder, TiledVAE):
            made._autoencoder = self._autoencoder.at(fps)
        return made


def load_pipeline(
    config: MagiConfig,
    weights: Path | None,
    loading: Loading,
    text: T5Loading = _TEXT,
    *,
    copy_weight: float = COPY_WEIGHT,
) -> MagiPipeline:
    """Load a model whole, or with the layers that are asked for: DiT, autoencoder and text encoder.

    `weights` is as of `find_files`, `copy_weight` as in `MagiSampling`. What is missing of the smaller files is said
    before the large ones are read, and prompts that are known are encoded before the DiT takes its memory. An
    `InputError` if something is missing or damaged.
    """
    files, runtime, model = find_files(config, weights, tokens=text.tokens), config.runtime_config, config.model_config
    encoder: TextEncoder = PocketEncoder()
    tokens = None
    if files.t5 is not None and files.tokens is not None:
        tokens = SpecialTokens.from_npz(files.tokens, channels=model.caption_channels)
        encoder = T5Encoder(files.t5, text, device=runtime.t5_device, max_length=model.caption_max_length)
        encoder.read_ahead(text.prompts)
    vae = Checkpoint(files.vae).vae(dtype=vae_dtype(config), device=loading.device)
    autoencoder = TiledVAE(vae, scale_factor=runtime.scale_factor, fps=runtime.fps)
    dit = Checkpoint(files.dit).dit(config, loading)
    return MagiPipeline(config, dit, autoencoder, encoder, tokens=tokens, text=text, copy_weight=copy_weight)


def load_stage(config: MagiConfig, weights: Path | None, loading: Loading) -> MagiDiT:
    """Load the DiT alone, all of it or the layers that are asked for, from exactly their tensors; errors as above."""
    return Checkpoint(dit_folder(config, weights)).dit(config, loading)


def vae_dtype(config: MagiConfig) -> torch.dtype:
    """The released autoencoder runs in bf16 whatever the DiT's dtype (1.1); fp32 models keep theirs."""
    return torch.float32 if config.model_config.dtype == torch.float32 else torch.bfloat16


# ---- random weights, as `models/random_weights.py` draws them


def vae_config(config: MagiConfig) -> VaeConfig:
    """The autoencoder that a configuration names, if its description is there, or the released one."""
    folder = config.runtime_config.vae_pretrained
    described = folder is not None and (Path(folder) / "config.json").is_file()
    return Checkpoint(Path(folder)).vae_config() if folder is not None and described else _RELEASED_VAE


def random_pipeline(config: MagiConfig, loading: Loading, *, copy_weight: float = COPY_WEIGHT) -> MagiPipeline:
    """A model with random weights and a text encoder that makes up captions."""
    model, runtime = config.model_config, config.runtime_config
    with torch.device("meta"):
        empty = ViTVAE(vae_config(config))
    vae = fill_random(empty, dict.fromkeys(empty.state_dict(), vae_dtype(config)), loading.device, _value)
    autoencoder = TiledVAE(vae, scale_factor=runtime.scale_factor, fps=runtime.fps)
    known = runtime.t5_pretrained is None
    encoder = PocketEncoder() if known else RandomEncoder(model.caption_channels, model.caption_max_length)
    return MagiPipeline(config, random_dit(config, loading), autoencoder, encoder, copy_weight=copy_weight)


def random_dit(config: MagiConfig, loading: Loading) -> MagiDiT:
    """The DiT, all of it or the layers that are asked for, in the dtypes of a loaded one."""
    model, dtypes = empty_dit(config, loading)
    return fill_random(model, dtypes, loading.device, _value).fuse()


def _value(name: str, declared: Tensor, device: torch.device) -> Tensor:
    shape, last = declared.shape, name.rpartition(".")[2]
    if name == "rope.bands":
        return 10000.0 ** -(torch.arange(len(declared), dtype=torch.float32, device=device) / len(declared))
    if last == "weight_scale":  # the only place for the size of an fp8 weight, which is drawn with a deviation of one
        return torch.full(shape, 1 / 64, device=device)
    if last.endswith("_scale") or name.endswith("ada_modulate_layer.proj.0.bias"):
        return torch.ones(shape, device=device)
    if declared.dim() > 1:
        return normal(name, declared, device)
    if last == "bias":
        return torch.zeros(shape, device=device)
    if name.endswith("post_norm.weight"):
        return torch.full(shape, _GAIN, device=device)
    offset = "layernorm" in name  # norms with an offset of one; those of the autoencoder and in front have none
    return torch.zeros(shape, device=device) if offset else torch.ones(shape, device=device)
