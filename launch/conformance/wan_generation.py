"""Golden files of whole videos of SkyReels-V2 and of Self-Forcing: `wan_generation`, `wan_self_forcing`.

The engine makes each iteration of a video as a video of its own, here or over a gang; what one takes over from the one
before it is in the file. The weights file lies beside the case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.engine import Engine, Submission
from engine.kv.layout import KVSettings
from engine.kv.selection import SelectionSettings
from engine.record import NOT_ACTIVE, Recorder, RunRecord
from engine.request import Encoded, Request
from engine.reuse.policy import CONDITION, ReuseSettings
from engine.video import Noise
from launch.conformance.golden import Golden
from launch.conformance.wan_forward import wan_config
from models.attention import Attention
from models.checkpoint import Loading
from models.config import checked
from models.errors import InputError
from models.protocols import CELL_PIXELS, Autoencoder, CaptionTable, Sampling
from models.wan.changes import KEPT_STEPS, POLYNOMIALS, condition_changes
from models.wan.config import CAUSAL_WAN, WanConfig
from models.wan.dit import WanDiT
from models.wan.sampling import BlockSampling, WindowSampling
from models.wan.self_forcing import SelfForcingSampling
from models.wan.weights import WanWeights

_Count = Annotated[int, Field(ge=0, le=100_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sampling:
    """Arguments of the published call."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1_000)]
    shift: float
    guidance_scale: float
    fps: _Count
    base_num_frames: _Count
    num_frames: _Count
    ar_step: _Count
    causal_block_size: Annotated[int, Field(ge=1, le=1_000)]
    overlap_history: _Count | None = None
    addnoise_condition: _Count = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Policy:
    """The published reuse; an empty one makes a video as published without it."""

    policy: Literal["", "flowcache", "teacache"] = ""
    threshold: float = 0.0
    use_ret_steps: bool = True
    coefficients: str = "1.3B"
    num_steps: _Count = 0
    use_kvrange: bool = False
    kvrange: _Count = 0
    use_compress: bool = False
    budget_block: _Count = 0

    @property
    def polynomial(self) -> tuple[float, ...]:
        return POLYNOMIALS[self.coefficients, self.use_ret_steps]

    def reuse(self) -> ReuseSettings:
        """A threshold below zero computes everything."""
        return ReuseSettings(
            policy="none" if not self.policy or self.threshold < 0 else self.policy,
            threshold=max(0.0, self.threshold),
            warmup_steps=KEPT_STEPS[self.use_ret_steps],
            distance=CONDITION if self.policy else "fp32",
            polynomial=self.polynomial,
            clean_pass=False,
            copy_pass=False,
        )

    def kv(self) -> KVSettings:
        if not self.use_compress:
            return KVSettings()
        return KVSettings(budget=self.budget_block, selection=SelectionSettings(queries="chunk", asks="next"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Making:
    """A video that the engine is to make, in the layout that it knows."""

    sampling: Sampling
    captions: CaptionTable
    frames: int  # latent frames in all
    size: tuple[int, int]  # latent cells
    prefix: Tensor | None  # [1, C, P, h, w]
    noise: Noise
    reuse: ReuseSettings
    kv: KVSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class WanRun:
    """One iteration of a case."""

    golden: Golden
    config: WanConfig
    iteration: int

    def load(self, layers: range | None) -> WanDiT:
        """The model, with the layers that are run here; all by default."""
        weights = WanWeights(self.golden.path.parent / self.golden.text("weights"))
        return weights.dit(self.config, Loading(layers=layers, device=self.golden.device))

    def making(self, model: WanDiT) -> _Making:
        """What the file asks for."""
        return _self_forcing(self.golden) if self.golden.kind == "wan_self_forcing" else _forcing(self, model)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Latents:
    """A pipeline that ends with latents."""

    model: WanDiT
    how: Sampling

    @property
    def attention(self) -> Attention:
        return self.model.attention

    @property
    def autoencoder(self) -> Autoencoder:
        raise AssertionError("latents are not decoded")

    def sampling(self, num_steps: int, *, clean_pass: bool, copy_pass: bool) -> Sampling:
        return self.how

    def captions(self, prompt: str) -> CaptionTable:
        raise AssertionError("captions are given")
