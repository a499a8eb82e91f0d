"""A loaded model of this family: weights, autoencoder and encoders together, as the engine wants them; or one of
random weights.

Nothing here knows ranks or how a video is scheduled.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.attention import Attention
from models.checkpoint import Loading
from models.protocols import Autoencoder, CaptionTable, Sampling, SeenImage
from models.random_weights import RandomEncoder, fill_random, normal
from models.text import TextEncoder, TextLoading
from models.wan.config import IMAGE_TOKENS, WanConfig
from models.wan.dit import WanDiT
from models.wan.folder import dit_source, find_files
from models.wan.image import ClipEncoder, ImageEncoder
from models.wan.sampling.changes import condition_changes
from models.wan.sampling.method import sampling_of
from models.wan.sampling.self_forcing import SelfForcingSampling
from models.wan.text import UMT5Encoder, padded
from models.wan.vae import WanVAE, WanVaeConfig, WanVaeFiles, empty_vae
from models.wan.weights import WanWeights, empty_dit


class WanPipeline:
    """A `Pipeline`: a DiT with what turns prompts into captions and latents into frames.

    Without an encoder captions are brought, and without an autoencoder a video ends with latents.
    """

    def __init__(
        self,
        config: WanConfig,
        model: WanDiT,
        autoencoder: Autoencoder | None = None,
        encoder: TextEncoder | None = None,
        images: ImageEncoder | None = None,
    ) -> None:
        self.config, self.model = config, model
        self._autoencoder, self._encoder, self._images = autoencoder, encoder, images
        self._changes: dict[tuple[int | None, ...], tuple[float, ...]] = {}  # by steps, given frames and fps

    @property
    def autoencoder(self) -> Autoencoder:
        assert self._autoencoder is not None
        return self._autoencoder

    @property
    def attention(self) -> Attention:
        return self.model.attention

    def sampling(
        self, num_steps: int, *, clean_pass: bool = True, copy_pass: bool = True, given: int = 0, ends: int = 0
    ) -> Sampling:
        """How to denoise with that many steps, with or without the passes that renew a finished chunk's KV, where so
        many latent frames are given.

        With the table of how its conditions change from step to step.
        """
        sampling = sampling_of(self.config, num_steps, clean_pass=clean_pass, given=given, ends=ends)
        if isinstance(sampling, SelfForcingSampling):
            return sampling
        if (key := (num_steps, given, ends, sampling.fps)) not in self._changes:
            steps = [sampling.times(step) for step in range(sampling.num_steps)]
            self._changes[key] = condition_changes(self.model, steps, sampling.fps)
        return replace(sampling, changes=self._changes[key])

    def see(self, image: Tensor) -> SeenImage | None:
        """CLIP's tokens of an image, and beside the latents: which frame is given, and the image with zeros behind it.

        None for a model that sees none. Specification 1.5.
        """
        if self._images is None:
            return None
        assert isinstance(self.autoencoder, WanVAE)
        start = self.autoencoder.encode_start(image, self.config.runtime.window_frames)
        marks = start.new_zeros(1, self.config.shapes.in_dim - 2 * start.shape[1], *start.shape[2:])
        marks[:, :, 0] = 1
        return SeenImage(self._images.encode(image[0]), torch.cat([marks, start], dim=1))

    def captions(self, prompt: str) -> CaptionTable:
        """Encode a prompt, and the negative prompt as the text of no text; zero rows behind both count.

        An `InputError` if the encoder cannot take it.
        """
        assert self._encoder is not None
        length = self.config.shapes.text_len
        text, null = (padded(self._encoder.encode(one), length) for one in (prompt, self.config.runtime.negative))
        return CaptionTable(text=text, null=null).to(self.model.device)

    def variant(self, *, fps: int | None, negative: str | None) -> WanPipeline:
        """As `Adjustable`: a model that takes a frame rate takes this one."""
        given: dict[str, Any] = {"fps": fps, "negative": negative}
        made, given = copy(self), {name: value for name, value in given.items() if value is not None}
        made.config = replace(self.config, runtime=replace(self.config.runtime, **given))
        return made


def load_pipeline(config: WanConfig, folder: Path, loading: Loading, text: TextLoading) -> WanPipeline:
    """Load a model whole, or with the layers that are asked for: DiT, autoencoder and text encoder.

    What is missing of the smaller files is said before the large ones are read. An `InputError` if something is missing
    or damaged.
    """
    files = find_files(config, folder)
    encoder = UMT5Encoder(files.text, files.tokenizer, text, device="cuda", max_length=config.shapes.text_len)
    encoder.read_ahead((*text.prompts, config.runtime.negative) if text.prompts else ())
    autoencoder = WanVaeFiles(files.vae).load(loading.device)
    images = None if files.image is None else ClipEncoder(files.image)
    return WanPipeline(config, WanWeights(files.dit).dit(config, loading), autoencoder, encoder, images)


def load_stage(config: WanConfig, folder: Path, loading: Loading) -> WanDiT:
    """Load the DiT alone, all of it or the layers that are asked for; errors as above."""
    return WanWeights(dit_source(folder)).dit(config, loading)


# ---- random weights, as `models/random_weights.py` draws them


def random_pipeline(config: WanConfig, loading: Loading, *, vae: WanVaeConfig | None = None) -> WanPipeline:
    """A model with random weights and a text encoder that makes up captions; the autoencoder is Wan 2.1's, or `vae`."""
    described = vae or WanVaeConfig()
    empty = empty_vae(described)
    network = fill_random(empty, dict.fromkeys(empty.state_dict(), torch.float32), loading.device, _value)
    encoder = RandomEncoder(config.shapes.text_dim, config.shapes.text_len)
    images = _RandomImages(config.shapes.clip_dim) if config.shapes.sees_image else None
    return WanPipeline(config, random_dit(config, loading), WanVAE(network, described), encoder, images)


class _RandomImages:
    """An `ImageEncoder` that makes up tokens."""

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def encode(self, image: Tensor) -> Tensor:
        return torch.randn(IMAGE_TOKENS, self._channels, generator=torch.Generator().manual_seed(0))


def random_dit(config: WanConfig, loading: Loading) -> WanDiT:
    """The DiT, all of it or the layers that are asked for, in the dtype of a loaded one."""
    model, dtypes = empty_dit(config, loading)
    return fill_random(model, dtypes, loading.device, _value)


def _value(name: str, declared: Tensor, device: torch.device) -> Tensor:
    last = name.rpartition(".")[2]
    if last == "bias":
        return torch.zeros(declared.shape, device=device)
    if declared.dim() > 1 and last != "gamma":
        return normal(name, declared, device)
    return torch.ones(declared.shape, device=device)
