"""What a family of chunk-autoregressive models looks like to the engine.

A family describes its sampling (`Sampling`: times, passes of a step, how far back a chunk looks) and computes
(`VideoModel`: embed, layers, velocity). The engine orders the work and keeps the state; it knows no model in
particular.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from models.attention import Attention

CELL_PIXELS = 8
"""Side of a latent cell, as of every autoencoder there is: sizes are checked and planned before a model is read."""
CELL_FRAMES = 4
"""Frames of a latent frame, likewise; an image alone is a latent frame too."""

CaptionKind = Literal["text", "null"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassCondition:
    """What the model is given in a pass besides latents and text."""

    times: tuple[float, ...]
    """Of the chunk, in the family's own units: one for all of it, or one for each of its latent frames."""
    distill: float | None = None  # step-size constant of a distilled model, None for a base model
    drop: bool = False  # the captionless condition
    fps: int | None = None  # frames per second, for models that take them; None for what they were trained with


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One run of one chunk through the layers."""

    name: str
    """`denoise`, `copy` (see `MagiSampling.copy_pass`), `clean`, `clean_text`, or a branch of guidance: `null`, `text`,
    and `context_free`, which sees no chunk before it."""
    caption: CaptionKind  # which text the chunk sees
    branch: int  # which KV buffer it reads and writes
    isolated: bool  # it attends to itself only and leaves no KV behind
    weight: float
    """Of its velocity in the sum that makes the step's velocity; 0 for a pass that is run for its KV alone."""
    condition: PassCondition  # what the model is given besides


@dataclass(frozen=True, kw_only=True, slots=True)
class KVGeometry:
    """Shape of what one token leaves behind in every layer that is held here."""

    layers: range
    query_heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device


class Caption(NamedTuple):
    """What a chunk sees of text, and of an image."""

    text: Tensor  # [N, channels]
    image: Tensor | None = None  # [P, image channels]


class SeenImage(NamedTuple):
    """What a model that sees an image is given of it."""

    tokens: Tensor  # [P, image channels], beside each text
    beside: Tensor  # [1, c, T, h, w], behind the channels of the latents


TextKV = Mapping[int, tuple[Tensor, ...]]
"""Keys and values [1, N, G, d] of a text, and then those of an image, by layer."""
Modulation = Mapping[int, tuple[Tensor, ...]]
"""What a condition does to a pass, by layer."""
Positions = tuple[Tensor, ...]
"""What tells the tokens of a chunk apart."""


class KVView(Protocol):
    """What one chunk's tokens attend to, in every layer."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take the chunk's own keys (rotated) and values of a layer, each [B, S, G, d]."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries [B, S, H, d] over all that the chunk may see of that layer -> [B, S, H, d]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTable:
    """The texts of one request, of a size that does not depend on the length of the video."""

    text: Tensor  # [N, channels]
    later: tuple[tuple[int, Tensor], ...] = ()
    """Texts that take its place, [N, channels] each, with the chunk that is the first to see it, in order."""
    null: Tensor  # [M, channels], what a chunk without text sees
    counters: Tensor | None = None
    """[K, P, channels]: P rows in front of the text, by how many chunks come after this one; K - 1 stands for more."""
    max_length: int | None = None  # most tokens of a text with those rows; its last ones fall off
    image: Tensor | None = None  # [P, image channels], what every chunk sees of an image

    def first_like(self, kind: CaptionKind, chunk: int, chunks_left: int) -> tuple[CaptionKind, int, int]:
        """One choice of arguments for `get` out of all that give the same tokens."""
        if kind == "null":
            return kind, 0, 0
        first = max((first for first, _ in self.later if first <= chunk), default=0)
        return kind, first, 0 if self.counters is None else min(chunks_left, len(self.counters) - 1)

    def get(self, kind: CaptionKind, chunk: int, chunks_left: int) -> Caption:
        """What a chunk sees, with that many chunks of the video still to come after it."""
        return Caption(self._text(kind, chunk, chunks_left), self.image)

    def _text(self, kind: CaptionKind, chunk: int, chunks_left: int) -> Tensor:
        if kind == "null":
            return self.null
        text = next((text for first, text in reversed(self.later) if chunk >= first), self.text)
        if self.counters is None:
            return text
        rows = self.counters[min(chunks_left, len(self.counters) - 1)]
        return torch.cat([rows, text])[: self.max_length]

    def with_text(self, chunk: int | None, text: Tensor) -> CaptionTable:
        """The same with another text from a chunk on, or from the start; those that take its place later stay."""
        if chunk is None:
            return replace(self, text=text)
        others = [one for one in self.later if one[0] != chunk]
        return replace(self, later=tuple(sorted([*others, (chunk, text)], key=lambda one: one[0])))

    def to(self, device: torch.device) -> CaptionTable:
        """The same on a device."""
        counters = None if self.counters is None else self.counters.to(device)
        image = None if self.image is None else self.image.to(device)
        later = tuple((first, text.to(device)) for first, text in self.later)
        text, null = self.text.to(device), self.null.to(device)
        return replace(self, text=text, later=later, null=null, counters=counters, image=image)


Draw = Callable[[int, int], Tensor]
"""Standard normal noise that a chunk takes on its way, by the number of the draw from 1 on and by latent frames:
[1, C, frames, h, w]. A draw is always the same."""


class Solver(Protocol):
    """Takes the steps of one chunk. What it remembers between steps is its state, nothing if it does not say so."""

    def model_input(self, x: Tensor, step: int | None) -> Tensor:
        """What the model is given of latents [1, C, T, h, w] in a step; None once they are finished, or given."""

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Latents after a step, of those before it and of the velocity at their `model_input`; all [1, C, T, h, w].

        `step` is the chunk's own; where a family repeats the increment of an earlier step, it is that one.
        """

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        return


class Sampling(Protocol):
    """How a family denoises: pure figures, no weights."""

    @property
    def num_steps(self) -> int:
        """Denoising steps of a chunk."""

    @property
    def window(self) -> int:
        """Chunks that are denoised at once, at most."""

    @property
    def stagger(self) -> int:
        """Ticks between two chunks that enter; 0 lets all enter at once."""

    @property
    def chunk_width(self) -> int:
        """Latent frames of a chunk."""

    @property
    def chunks_at_once(self) -> int | None:
        """Chunks that one span of times and positions holds, given ones among them; None if there is no end. A longer
        video is made in several spans."""

    @property
    def overlap(self) -> int:
        """Chunks at the end of a span that the next one is given."""

    def prefix(self, frames: int) -> tuple[int, int]:
        """Of a clip of so many frames: how many of its last ones are gone on from, and their number in latent frames.

        An InputError if there are too few.
        """

    def prefix_chunks(self, frames: int) -> int:
        """How many chunks a prefix of so many latent frames adds to those that are asked for."""

    @property
    def branches(self) -> int:
        """How many KV buffers the passes use."""

    @property
    def clean_pass(self) -> bool:
        """Whether the KV of a finished chunk is renewed by a pass of its own."""

    @property
    def publishes(self) -> bool:
        """Whether the other branches take over the KV of a finished chunk from branch 0."""

    @property
    def sink(self) -> int:
        """First chunks whose KV stays though a range leaves them behind; with any, a range is what is held."""

    @property
    def ends(self) -> int:
        """Last latent frames of the video's one chunk that are given too, and are no part of it."""

    @property
    def residual_of_layers(self) -> bool:
        """What is published as the residual that stands in for a step: what the layers added to the patch embedding of
        each pass, and not the increment of the latents."""

    @property
    def changes(self) -> tuple[float, ...] | None:
        """Relative L1 change of the layers' condition in each step, since the step before; None if it is not known.
        The first one counts for nothing."""

    def time(self, step: int) -> float:
        """Time before a step; `time(num_steps)` is the end."""

    def solver(self, given: Tensor | None, draw: Draw) -> Solver:
        """What takes the steps of a chunk whose first latent frames are given, [1, C, P, h, w]; None if none are."""

    def computes(self, step: int, *, last_tick: bool) -> bool:
        """Whether no policy may reuse a step; `last_tick`: the video ends with it."""

    def key_limit(self, step: int, place: int) -> int | None:
        """How many chunks a chunk in this step attends to, itself included; None for all. `place`: how many chunks were
        begun before it, those that are given not counted."""

    def clean_limit(self, *, prefix: bool) -> int | None:
        """The same for a finished chunk, or for one of the prefix."""

    def step_passes(self, step: int, *, oldest: bool, text_needed: bool) -> tuple[Pass, ...]:
        """Passes of a denoising step, in order. `oldest`: it is the cleanest of its window. `text_needed`: some chunk
        of the window weighs its text branch in this tick."""

    def clean_passes(self, step_in_quantum: int, *, prefix: bool, text_needed: bool) -> tuple[Pass, ...]:
        """Passes that renew the KV of a finished chunk, or fill in that of a prefix chunk."""

    def weighs_text(self, step: int) -> bool:
        """Whether the text branch counts in this step."""


class VideoModel(Protocol):
    """The weights of all or some layers of a model, and what is computed with them."""

    @property
    def kv(self) -> KVGeometry:
        """Shape of the KV of the layers that are held."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that are held."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""

    def token_count(self, frames: int, height: int, width: int) -> int:
        """Tokens of a latent of that size."""

    def patches(self, x: Tensor) -> Tensor:
        """Patch embedding [1, S, D] of a latent [1, C, T, h, w]."""

    def text(self, caption: Caption) -> TextKV:
        """Keys and values of a caption, for cross-attention in the layers that are held."""

    def modulation(self, condition: PassCondition) -> Modulation:
        """What a condition does to a pass in the layers that are held."""

    def positions(self, first_frame: int, grid: tuple[int, int, int], tokens: slice = slice(None)) -> Positions:
        """What tells a chunk's tokens apart. `grid`: latent (T, h, w); `tokens`: which of them; all by default."""

    def layers(
        self, hidden: Tensor, modulation: Modulation, text: TextKV, positions: Positions, view: KVView
    ) -> Tensor:
        """Run the layers that are held over a chunk's tokens [1, S, D], which `positions` are of."""

    def velocity(self, hidden: Tensor, grid: tuple[int, int, int], condition: PassCondition) -> Tensor:
        """Velocity [1, C, T, h, w] fp32 of the last hidden states [1, S, D] of a whole chunk."""


class Autoencoder(Protocol):
    """Frames to latents and back."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] -> latents [1, C, t, h, w]."""

    def stream(self) -> Callable[[Tensor], Tensor]:
        """What decodes the chunks of one video, in order and without gaps: latents [1, C, t, h, w] -> uint8
        [F, H, W, 3]. It may keep what a chunk leaves to the next, and is a `RememberingStream` then."""


@runtime_checkable
class RememberingStream(Protocol):
    """A stream of an autoencoder, whose frames depend on the chunks before."""

    def __call__(self, latents: Tensor) -> Tensor:
        """As of `Autoencoder.stream`."""

    def state(self) -> dict[str, Tensor]:
        """What the next chunk depends on; a chunk replaces these tensors and does not write into them."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, before the first chunk."""


class Pipeline(Protocol):
    """A loaded model with all that turns a request into latents and latents into frames."""

    @property
    def model(self) -> VideoModel:
        """The weights."""

    @property
    def autoencoder(self) -> Autoencoder:
        """Frames to latents and back."""

    @property
    def attention(self) -> Attention:
        """What KV views attend with."""

    def sampling(self, num_steps: int, *, clean_pass: bool, copy_pass: bool, given: int = 0, ends: int = 0) -> Sampling:
        """How to denoise with that many steps, with or without the passes that reuse may leave out, where so many
        latent frames are given, and so many behind the end."""

    def captions(self, prompt: str) -> CaptionTable:
        """Encode a prompt."""

    def see(self, image: Tensor) -> SeenImage | None:
        """What the model is given of an image, uint8 [1, H, W, 3]; None if it goes on from its latents instead."""


@runtime_checkable
class Adjustable(Protocol):
    """A pipeline whose videos may differ in these."""

    def variant(self, *, fps: int | None, negative: str | None) -> Pipeline:
        """The same for a video of so many frames per second, with a text of what is not wanted; None leaves it."""
