"""A loaded MAGI-1: weights, autoencoder and text encoder together, as the engine wants them.

Nothing here knows ranks or how a video is scheduled.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from models.attention import Attention
from models.checkpoint import Loading
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.folder import dit_folder, find_files
from models.magi.sampling import COPY_WEIGHT, MagiSampling
from models.magi.text import SpecialTokens, T5Encoder, T5Loading
from models.magi.vae import TiledVAE
from models.magi.weights import Checkpoint
from models.pocket.text import PocketEncoder
from models.protocols import Autoencoder, CaptionTable
from models.text import TextEncoder

_TEXT = T5Loading()


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
    # The released autoencoder runs in bf16 whatever the DiT's dtype (1.1); fp32 models keep theirs.
    of_vae = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    vae = Checkpoint(files.vae).vae(dtype=of_vae, device=loading.device)
    autoencoder = TiledVAE(vae, scale_factor=runtime.scale_factor, fps=runtime.fps)
    dit = Checkpoint(files.dit).dit(config, loading)
    return MagiPipeline(config, dit, autoencoder, encoder, tokens=tokens, text=text, copy_weight=copy_weight)


def load_stage(config: MagiConfig, weights: Path | None, loading: Loading) -> MagiDiT:
    """Load the DiT alone, all of it or the layers that are asked for, from exactly their tensors; errors as above."""
    return Checkpoint(dit_folder(config, weights)).dit(config, loading)
