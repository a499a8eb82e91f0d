"""A machine of several GPUs and a model of the MAGI-1 family, as times and bytes that the simulation can be given.

Everything is counted from the model's shapes, but for one time that was measured: what a full pass of one chunk takes
on one GPU. docs/simulation.md lists the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.flops import pass_flops
from benchmarks.simulate_data import Machine, VideoPlan
from benchmarks.simulate_plan import Seconds
from models.errors import InputError
from models.magi.config import MagiConfig
from models.magi.dit import MagiDiT
from models.protocols import Pass
from parallel.topology.mesh import Layout
from parallel.topology.split import stage_sizes

_WIDTH = 2  # bytes of bf16
_TEXT = 100  # caption tokens that count
_VAE_BYTES = 2 * 613_755_239


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """GPUs of one machine; by default A800s."""

    gpus: int = 8  # how many
    peak: float = 312e12  # bf16 operations per second of one
    memory: float = 80e9  # bytes of one
    bandwidth: float = 200e9  # bytes per second of a GPU's NVLinks, in one direction: half of the 400 GB/s of both
    used: float = 0.8  # share of that which transfers reach
    latency: float = 0.5e-3  # seconds of a message between stages, its header by way of the host
    collective: float = 30e-6  # seconds of an all-to-all that carries nothing
    doubling: float = 0.95
    """Share of the speed that is kept when cp is doubled, communication apart: smaller matrix products, and what every
    rank does for itself."""
    decide: float = 2e-3  # seconds that the lead takes for a distance and a decision
    take: float = 1e-3  # seconds that the lead takes for a velocity that is back


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: int  # its layers; on the lead the autoencoder as well
    kv: int  # of one video


@dataclass(frozen=True)
class Cluster:
    """A model on GPUs."""

    config: MagiConfig  # of the model
    hardware: Hardware
    pass_seconds: float  # of a full pass of one chunk on one GPU
    mfu: float  # share of the peak that it reaches
    budget: int  # finished chunks that the KV buffer holds

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        run = self.config.runtime_config
        return self.config.chunk_tokens(run.video_size_h, run.video_size_w)

    @property
    def hidden_bytes(self) -> int:
        """Of a chunk between two stages."""
        return self.tokens * self.config.model_config.hidden_size * _WIDTH

    @property
    def velocity_bytes(self) -> int:
        """Of a chunk's velocity, fp32."""
        model = self.config.model_config
        return self.tokens * model.patch_size**2 * model.latent_channels * 4

    @cached_property
    def attended(self) -> float:
        """Chunks of keys with which a pass of that time has that share of the peak.

        Raises:
            InputError: it would be none.
        """
        wanted = self.pass_seconds * self.mfu * self.hardware.peak
        one, two = self._flops(1), self._flops(2)
        chunks = 1 + (wanted - one) / (two - one)
        if chunks < 1:
            least = one / (self.mfu * self.hardware.peak)
            raise InputError(
                f"a pass of {self.pass_seconds:g} s is too short for this model: at {self.mfu:.0%} of the peak it "
                f"takes {least:.2g} s or more: give --pass-seconds or --mfu"
            )
        return chunks

    def whole_pass(self, what: Pass, *, clean: bool) -> float:
        """Seconds of a pass on one GPU. A context-free or clean pass attends to its own chunk only."""
        if not (what.isolated or clean):
            return self.pass_seconds
        return self.pass_seconds * self._flops(1) / self._flops(self.attended)

    def split(self, layout: Layout) -> tuple[int, ...]:
        """Layers of each stage."""
        return stage_sizes(self.config, layout.pp)

    def seconds(self, layout: Layout) -> Seconds:
        """What passes take on the stages of a layout."""
        layers, sizes = self.config.model_config.num_layers, self.split(layout)
        share = [size / layers for size in sizes]
        exchange = [size * self.exchange_seconds(layout.cp) for size in sizes]
        fan = (layout.cp - 1) / layout.cp * self.hidden_bytes / self._reached  # to and from slot 0 of a stage

        def seconds(what: Pass, step: int | None) -> tuple[float, ...]:
            whole = self.whole_pass(what, clean=step is None) / self.cp_speed(layout.cp)
            spent = [whole * part + extra for part, extra in zip(share, exchange, strict=True)]
            spent[0] += fan
            spent[-1] += fan if what.weight else 0.0
            return tuple(spent)

        return seconds

    def cp_speed(self, cp: int) -> float:
        """How much faster cp ranks compute than one."""
        return cp * self.hardware.doubling ** math.log2(cp)

    def exchange_bytes(self, cp: int) -> float:
        """Bytes that a rank sends in one layer: keys, values, queries and the result, to all others (Ulysses)."""
        model = self.config.model_config
        width = 2 * model.num_query_groups * model.kv_channels + 2 * model.num_attention_heads * model.kv_channels
        return self.tokens / cp * width * _WIDTH * (cp - 1) / cp

    def exchange_seconds(self, cp: int) -> float:
        """Seconds of the exchanges of one layer; nothing of them is taken to be hidden behind computing."""
        return 0.0 if cp == 1 else self.exchange_bytes(cp) / self._reached + 4 * self.hardware.collective

    def machine(self, layout: Layout, *, barrier: bool = False) -> Machine:
        """What carries calls out. Every slot of a stage sends its own tokens, over links of its own."""
        hardware = self.hardware
        return Machine(
            stages=layout.pp,
            latency=hardware.latency,
            bandwidth=self._reached,
            hidden_bytes=self.hidden_bytes / layout.cp,
            velocity_bytes=self.velocity_bytes,
            decide=hardware.decide,
            take=hardware.take,
            barrier=barrier,
        )

    def memory(self, layout: Layout) -> Memory:
        """Bytes of weights and of one video's KV on the fullest rank; what layers work with comes on top.

        What is neither a layer nor the autoencoder is counted on every stage, of which it is 80 MB.
        """
        model, run = self.config.model_config, self.config.runtime_config
        weights, start = [], 0
        for size in self.split(layout):
            held = sum(self._weights[layer] for layer in range(start, start + size)) + self._weights[None]
            weights.append(held + (0 if start else _VAE_BYTES))
            start += size
        token = 2 * (model.num_query_groups // layout.cp) * model.kv_channels * _WIDTH
        branches = 2 if run.cfg_number > 1 else 1
        chunks = self.budget + run.window_size
        return Memory(weights=max(weights), kv=branches * chunks * self.tokens * token * max(self.split(layout)))

    def petaflops(self, plan: VideoPlan) -> float:
        """Operations of a video in 10^15, from the time that its passes take on one GPU."""
        return plan.seconds * self.mfu * self.hardware.peak / 1e15

    @cached_property
    def _weights(self) -> dict[int | None, int]:
        """Bytes of each layer, and of all else: layers in the model's dtype, or as fp8, and embedders in fp32."""
        with torch.device("meta"):
            dit = MagiDiT(self.config.model_config, fp8=self.config.engine_config.fp8_quant)
        found: dict[int | None, int] = {None: 0}
        for name, parameter in dit.named_parameters():
            parts = name.split(".")
            layer = int(parts[2]) if parts[0] == "videodit_blocks" and parts[1] == "layers" else None
            width = min(_WIDTH, parameter.element_size()) if parts[0] == "videodit_blocks" else parameter.element_size()
            found[layer] = found.get(layer, 0) + width * parameter.numel()
        return found

    @property
    def _reached(self) -> float:
        return self.hardware.bandwidth * self.hardware.used

    def _flops(self, chunks: float) -> int:
        """Of a pass that attends to so many chunks."""
        return pass_flops(
            self.config.model_config,
            tokens=self.tokens,
            keys=round(chunks * self.tokens),
            text=_TEXT,
            distilled=self.config.engine_config.distill,
        )
