"""Diffusion forcing made several ways on one model in one run: what structure saves, and what reuse saves on top.

`python -m benchmarks.quality --model NAME`, of a model of SkyReels-V2. The whole window at once, as it is published,
with and without TeaCache; its groups as chunks, which attend to what came before through KV and rest when they are not
denoised (structure); and FlowCache on those (reuse), by the published distance and by patch embeddings.

There are no weights of the model here: videos are made with those of the golden files, small and random, so pictures
are not shown and PSNR is of latents. Operations are those that the same passes take on the model itself, at its size.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Row, Verdict
from benchmarks.quality.trial import latent_error
from engine.engine import Engine
from engine.executor import LocalRunner
from engine.record import Recorder
from engine.request import Encoded, Request
from engine.reuse.policy import CONDITION, ReuseSettings
from engine.submission import Submission
from engine.video import Work, seeded_noise
from launch.conformance.golden import read_golden
from launch.conformance.wan_generation import Latents, wan_runs
from models.errors import InputError
from models.families import presets
from models.family import ReuseFigures
from models.protocols import CELL_PIXELS, CaptionTable, Sampling
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.family import WanFamily
from models.wan.sampling.changes import condition_changes
from models.wan.sampling.forcing import BlockSampling, WindowSampling

_GOLDEN = common.ROOT / "tests" / "data" / "goldens" / "skyreels" / "flowcache_slow.safetensors"
_STRUCTURE = 1.5  # groups alone save at least this, of the published two
_FRACTIONS, _QUICK_FRACTIONS = (0.8, 0.5, 0.22), (0.5,)  # computed, that both distances are compared at
_ERRORS = (0.02, 0.05, 0.1)  # of latents that a window goes on from
_TRIES, _QUICK_TRIES, _NEAR = 5, 2, 0.03
_QUICK = {"num_steps": 10, "window_frames": 6, "chunk_width": 2, "overlap_frames": 2, "stagger": 2}
VANILLA, IN_STEP, TEACACHE = "whole window, staggered", "whole window, in step", "whole window, TeaCache"
GROUPS, RENEWED = "groups", "groups, renewed when finished"
SLOW, FAST = "groups, FlowCache slow", "groups, FlowCache fast"
DISTANCES = {"published distance, without its fit": CONDITION, "distance between patch embeddings": "fp32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to make the window."""

    what: str
    sampling: Sampling
    reuse: ReuseSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What a way took and made."""

    way: Way
    latents: Tensor
    passes: int
    operations: float  # on the model itself
    shares: np.ndarray  # computed share of the steps of each chunk
    seconds: float

    @property
    def computed(self) -> float:
        """Share of all steps."""
        return float(self.shares.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Studio:
    """The small model, and the one that it stands for."""

    model: WanDiT
    captions: CaptionTable
    config: WanConfig

    def make(self, way: Way, given: Tensor | None = None) -> Made:
        """Make one window in one way, or what is left of it after `given` groups [1, C, t, h, w]."""
        sampling, (height, width) = way.sampling, (4, 6)
        chunks, frames = sampling.chunks_at_once or 1, sampling.chunk_width
        request = Request(
            prompt=way.what,
            chunks=chunks - (0 if given is None else sampling.prefix_chunks(given.shape[2])),
            height=height * CELL_PIXELS,
            width=width * CELL_PIXELS,
            num_steps=sampling.num_steps,
            seed=0,
        )
        whole = seeded_noise(0)(0, (1, self.model.latent_channels, chunks * frames, height, width), 0)
        parts = whole.split(frames, dim=2)

        def noise(chunk: int, shape: tuple[int, ...], draw: int) -> Tensor:
            return parts[chunk].clone()

        encoded = Encoded(captions=self.captions, prefix=given, noise=lambda span: noise)
        runner, recorder, began = _Counting(self, frames), Recorder(), time.perf_counter()
        engine = Engine(Latents(model=self.model, how=sampling), runner, reuse=way.reuse)
        submission = Submission(request=request, encoded=encoded)
        made = [chunk.latents for chunk in engine.generate(submission, recorder=recorder, decode=False)]
        return Made(
            way=way,
            latents=torch.cat(made, dim=2),
            passes=runner.passes,
            operations=runner.operations,
            shares=(recorder.finish({}).decisions == 0).mean(axis=1),
            seconds=time.perf_counter() - began,
        )


class _Counting(LocalRunner):
    """Counts passes, and what they would take on the model that is meant."""

    def __init__(self, studio: Studio, frames: int) -> None:
        super().__init__(studio.model, studio.model.attention)
        self.passes, self.operations, self._frames, self._config = 0, 0.0, frames, studio.config

    def begin(self, work: Work) -> None:
        item = work.item
        first = item.chunk if item.what.isolated else item.keys_from or 0
        self.passes += 1
        self.operations += pass_operations(self._config, self._frames, (item.chunk + 1 - first) * self._frames)
        super().begin(work)


def pass_operations(config: WanConfig, frames: int, key_frames: int) -> float:
    """Of a pass over so many latent frames that attend to so many, at the model's own size: products and attention."""
    shapes, runtime = config.shapes, config.runtime
    frame = config.chunk_tokens(runtime.height, runtime.width) // runtime.chunk_width
    tokens, keys, dim = frames * frame, key_frames * frame, shapes.dim
    products = tokens * (6 * dim**2 + 2 * dim * shapes.ffn_dim) + shapes.text_len * 2 * dim**2
    attention = 2 * dim * tokens * (keys + shapes.text_len)
    return 2.0 * shapes.num_layers * (products + attention)


def ways(studio: Studio, figures: ReuseFigures) -> list[Way]:
    """What is compared, in order."""
    runtime = studio.config.runtime
    common_figures: dict[str, Any] = {
        "steps": runtime.num_steps,
        "shift": runtime.shift,
        "guidance": runtime.guidance,
        "block": runtime.chunk_width,
        "ar_step": runtime.stagger,
        "frames": runtime.window_frames,
    }
    window, groups = WindowSampling(**common_figures), BlockSampling(**common_figures)
    rows = [window.times(row) for row in range(window.num_steps)]
    window = replace(window, changes=condition_changes(studio.model, rows, window.fps))
    steps: list[tuple[float, ...]] = [(float(time),) for time in groups.sigmas.timesteps]
    groups = replace(groups, changes=condition_changes(studio.model, steps, groups.fps))
    none, cycle = ReuseSettings(clean_pass=False, copy_pass=False), window.num_steps
    published = replace(
        none, warmup_steps=figures.warmup_steps, distance=CONDITION, polynomial=tuple(figures.polynomial)
    )
    teacache = replace(published, policy="teacache-cyclic", threshold=figures.teacache, cycle=cycle)
    flowcache = replace(published, policy="flowcache")
    return [
        Way(what=VANILLA, sampling=window, reuse=none),
        Way(what=IN_STEP, sampling=replace(window, ar_step=0, changes=None), reuse=none),
        Way(what=TEACACHE, sampling=window, reuse=teacache),
        Way(what=GROUPS, sampling=groups, reuse=none),
        Way(what=RENEWED, sampling=replace(groups, clean_pass=True), reuse=replace(none, clean_pass=True)),
        Way(what=SLOW, sampling=groups, reuse=flowcache.with_threshold(figures.slow)),
        Way(what=FAST, sampling=groups, reuse=flowcache.with_threshold(figures.fast)),
    ]


def at_equal_shares(studio: Studio, groups: Way, slow: Way, fractions: Sequence[float], tries: int) -> list[Made]:
    """FlowCache by each distance, without a fit, where it computes the shares that are asked for."""
    found = []
    for what, distance in DISTANCES.items():
        own = replace(slow.reuse, distance=distance, polynomial=())
        known, made = {0.001: math.inf, 3.0: -math.inf}, dict[float, Made]()

        def measure(
            threshold: float, own: ReuseSettings = own, made: dict[float, Made] = made, what: str = what
        ) -> float:
            way = Way(what=what, sampling=groups.sampling, reuse=own.with_threshold(threshold))
            made[threshold] = studio.make(way)
            return made[threshold].computed

        for fraction in fractions:
            common.search(measure, fraction, known, tries=tries, near=_NEAR, geometric=True)
            found.append(made[common.nearest({threshold: one.computed for threshold, one in made.items()}, fraction)])
    return found


def given_rows(studio: Studio, groups: Made) -> list[Row]:
    """What becomes of the next window if the latents that it goes on from are not exact, as an autoencoder has them."""
    assert isinstance(groups.way.sampling, BlockSampling)
    runtime, rows = studio.config.runtime, list[Row]()
    sampling = replace(groups.way.sampling, noise_condition=runtime.noise_condition)
    way = Way(what="the next window", sampling=sampling, reuse=groups.way.reuse)
    given = groups.latents[:, :, -runtime.overlap_frames :]
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(1)) * given.std()
    exact = studio.make(way, given).latents
    for share in _ERRORS:
        latents = studio.make(way, given + share * noise).latents
        off = latent_error(latents, exact)
        rows.append({"given latents off by": f"{share:.0%}", "next ones off by": off, "PSNR": psnr(latents, exact)})
    return rows


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Of latents, with the range of those that are wanted as the peak; infinite if they are equal."""
    error = (made - wanted).square().mean()
    return (20 * torch.log10(wanted.max() - wanted.min()) - 10 * torch.log10(error)).item()


def study(name: str, *, steps: int | None, quick: bool, out: Path) -> int:
    """Structure and reuse apart, on a model of that name; the exit status. An `InputError` if it is another kind."""
    if name not in (known := presets()):
        raise InputError(f"unknown model {name!r}: choose from {', '.join(known)}")
    config = known[name].config()
    figures = WanFamily().reuse_figures(config) if isinstance(config, WanConfig) else None
    if not isinstance(config, WanConfig) or figures is None:
        raise InputError(f"--model {name} is not sampled by diffusion forcing: choose another")
    changes: dict[str, Any] = (_QUICK if quick else {}) | ({} if steps is None else {"num_steps": steps})
    config = replace(config, runtime=replace(config.runtime, **changes))
    common.output_folder(out)
    golden = read_golden(_GOLDEN, "cpu")
    text, negative = (golden.tensor(f"input.{part}")[0] for part in ("context", "negative_context"))
    model = wan_runs(golden)[0].load(None)
    studio = Studio(model=model, captions=CaptionTable(text=text, null=negative), config=config)
    asked = {way.what: way for way in ways(studio, figures)}
    made = [studio.make(way) for way in common.progress(list(asked.values()), "ways", len(asked))]
    fractions, tries = (_QUICK_FRACTIONS, _QUICK_TRIES) if quick else (_FRACTIONS, _TRIES)
    equal = at_equal_shares(studio, asked[GROUPS], asked[SLOW], fractions, tries)
    given = given_rows(studio, next(one for one in made if one.way.what == GROUPS))
    return report(out, name, config, made, equal, given)


def report(
    out: Path, name: str, config: WanConfig, made: Sequence[Made], equal: Sequence[Made], given: Sequence[Row]
) -> int:
    """Write and print what was measured; the exit status."""
    by_name, runtime = {one.way.what: one for one in made}, config.runtime
    window, groups = by_name[VANILLA], by_name[GROUPS]
    rows = [_row(one, groups if one.way.what in (SLOW, FAST) else window, window, groups) for one in made]
    equal_rows = [_row(one, groups, window, groups) for one in equal]
    structure, slow, fast = window.operations / groups.operations, by_name[SLOW], by_name[FAST]
    saved = f"{structure:.2f} x"
    verdicts = [
        Verdict("groups over the whole window, operations", saved, f">= {_STRUCTURE} x", structure >= _STRUCTURE),
        Verdict(
            "reuse on top, slow and fast",
            f"{groups.operations / slow.operations:.2f} x, {groups.operations / fast.operations:.2f} x",
            "more than 1 x, fast no less than slow",
            groups.operations > slow.operations >= fast.operations,
        ),
        Verdict(
            "the published distance decides alike for all groups",
            ", ".join(f"{one.computed:.0%}" for one in (slow, fast)),
            "the same share of each",
            all(np.ptp(one.shares) == 0 for one in (slow, fast)),
        ),
    ]
    frames = f"{runtime.window_frames} latent frames, groups of {runtime.chunk_width}, {runtime.stagger} rows apart"
    return common.publish(
        out,
        "forcing",
        title=f"{name}: structure and reuse",
        about=(
            f"{frames}, {runtime.num_steps} steps, guidance {runtime.guidance:g}; operations of {name} at "
            f"{runtime.width}x{runtime.height}, videos of small random weights. {common.machine_line()}.\n\n"
            "Structure: groups rest when they are not denoised, and attend to what came before through KV; it changes "
            "the video of a model that was trained on whole windows. Reuse is counted against groups without it, of "
            "TeaCache against the whole window. Computed: share of the steps, of all groups and from the least to the "
            "most of one. Seconds are of the small model, in which all but its layers weighs more than it should."
        ),
        verdicts=verdicts,
        sections={
            "Ways": rows,
            "Distances at equal shares, each without a fit": equal_rows,
            "A window that goes on from latents which are not exact": given,
        },
        data=[*rows, *equal_rows],
    )


def _row(one: Made, reused_of: Made, window: Made, groups: Made) -> Row:
    baseline = one if one.computed == 1 else reused_of
    least, most = one.shares.min(), one.shares.max()
    return {
        "what": one.way.what,
        "threshold": one.way.reuse.threshold,
        "passes": one.passes,
        "computed": one.computed,
        "of a group": f"{least:.0%}" if least == most else f"{least:.0%} to {most:.0%}",
        "PFLOP": one.operations / 1e15,
        "speed-up": window.operations / one.operations,
        "by structure": window.operations / baseline.operations,
        "by reuse": baseline.operations / one.operations,
        "PSNR to window": psnr(one.latents, window.latents),
        "PSNR to groups": psnr(one.latents, groups.latents),
        "seconds": one.seconds,
    }
