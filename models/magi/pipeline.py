"""A loaded MAGI-1: weights, autoencoder and text encoder together, as the engine wants them.

Nothing here knows ranks or how a video is scheduled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.attention import Attention
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.magi.sampling import MagiSampling
from models.magi.text import T5Encoder, counter_rows, read_special_tokens
from models.magi.vae import TiledVAE
from models.magi.weights import Checkpoint, Loading
from models.pocket.text import PocketEncoder
from models.protocols import Autoencoder, CaptionTable


class MagiPipeline:
    """A DiT with what turns prompts into captions (`tokens`: the special ones) and latents into frames.

    Without an encoder captions are brought, and without an autoencoder a video ends with latents.
    """

    def __init__(
        self,
        config: MagiConfig,
        model: MagiDiT,
        autoencoder: Autoencoder | None = None,
        encoder: T5Encoder | PocketEncoder | None = None,
        *,
        tokens: Tensor | None = None,
    ) -> None:
        self.config, self.model = config, model
        self._autoencoder, self._encoder, self._tokens = autoencoder, encoder, tokens

    @property
    def autoencoder(self) -> Autoencoder:
        """Frames to latents and back."""
        assert self._autoencoder is not None
        return self._autoencoder

    @property
    def attention(self) -> Attention:
        """What KV views attend with."""
        return self.model.attention

    def sampling(self, num_steps: int, *, clean_pass: bool = True, copy_pass: bool = True) -> MagiSampling:
        """How to denoise with that many steps, with or without the passes that reuse may leave out."""
        return MagiSampling(config=self.config, num_steps=num_steps, clean_pass=clean_pass, copy_pass=copy_pass)

    def captions(self, prompt: str) -> CaptionTable:
        """Encode a prompt; an `InputError` if the encoder cannot take it."""
        assert self._encoder is not None
        text = self._encoder.encode(prompt)
        self._encoder.release()
        counters = None if self._tokens is None else counter_rows(self._tokens)
        length = self.config.model_config.caption_max_length
        table = CaptionTable(text=text, null=self.model.null_text(), counters=counters, max_length=length)
        return table.to(self.model.device)


def load_pipeline(config: MagiConfig, weights: Path | None, loading: Loading) -> MagiPipeline:
    """Load a model whole, or with the layers that are asked for: DiT, autoencoder and text encoder.

    What is missing of the smaller files is said before the large ones are read.

    Args:
        config: of the model. One without T5 is magi-pocket's, which has a fixed vocabulary.
        weights: folder in place of the configuration's `load`; an autoencoder in its sub-folder `vae` and text
            encoders in `t5` are taken before those of the configuration. `special_tokens.npz` lies in it.
        loading: device, precision, attention, layers.

    Raises:
        InputError: something is missing or damaged.
    """
    runtime = config.runtime_config
    root = _root(config, weights)
    encoder: T5Encoder | PocketEncoder = PocketEncoder()
    tokens = None
    if runtime.t5_pretrained is not None:
        t5 = root / "t5" if (root / "t5").is_dir() else Path(runtime.t5_pretrained)
        tokens = read_special_tokens(root / "special_tokens.npz")
        encoder = T5Encoder(t5, device=runtime.t5_device, max_length=config.model_config.caption_max_length)
    folder = root / "vae" if (root / "vae").is_dir() else _folder(runtime.vae_pretrained, "vae_pretrained")
    # The released autoencoder runs in bf16 whatever the DiT's dtype (1.1); fp32 models keep theirs.
    dtype = torch.float32 if config.model_config.dtype == torch.float32 else torch.bfloat16
    vae = Checkpoint(folder).vae(dtype=dtype, device=loading.device)
    autoencoder = TiledVAE(vae, scale_factor=runtime.scale_factor, fps=runtime.fps)
    return MagiPipeline(config, load_stage(config, weights, loading), autoencoder, encoder, tokens=tokens)


def load_stage(config: MagiConfig, weights: Path | None, loading: Loading) -> MagiDiT:
    """Load the DiT alone, all of it or the layers that are asked for, from exactly their tensors; errors as above."""
    root = _root(config, weights)
    inner = weights_folder(config, root)
    return Checkpoint(inner if inner.is_dir() or weights is None else root).dit(config, loading)


def weights_folder(config: MagiConfig, load: Path) -> Path:
    """The folder of the DiT's weights inside `runtime_config.load` (5.1)."""
    kind = (".fp8" if config.engine_config.fp8_quant else "") + (".distill" if config.engine_config.distill else "")
    return load / f"inference_weight{kind}"


def _root(config: MagiConfig, weights: Path | None) -> Path:
    return weights or _folder(config.runtime_config.load, "load")


def _folder(path: str | None, key: str) -> Path:
    if path is None:
        raise InputError(f"the configuration has no {key}: give --weights DIR")
    return Path(path)
